"""Reading Postgres: a small pool of read-only connections, and one way to say that it is away.

Postgres itself shows a connection only the rows of the project that it names (row-level security), so every read says
whose rows it is about. A pooler between the API and Postgres must give each connection a session of its own.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import asyncpg
import structlog
from asyncpg.pool import PoolConnectionProxy
from pydantic_core import from_json, to_json

from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.primary import Primary

log = structlog.get_logger()

CONNECT_TIMEOUT_S = 3.0
STATEMENT_TIMEOUT_S = 5.0
#: For a whole read: getting a connection, making it if need be, and the answer.
READ_TIMEOUT_S = 4.5

#: The whole API only reads, and says so to Postgres: a defect here cannot change a row.
SESSION = {
    "application_name": "leveret-api",
    "default_transaction_read_only": "on",
    "statement_timeout": str(int(STATEMENT_TIMEOUT_S * 1000)),
    "jit": "off",
}

#: As the project of a read: every project with its limits, and nothing of what is in them.
EVERY_PROJECT = "*"
_SEE = "SELECT set_config('leveret.project', $1, false)"

#: What Postgres says when it is away, starting, stopping, failing over, full, hung, or not yet migrated.
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InternalClientError,
)

#: What a pooled connection says that was ended while nobody looked. Reading again is safe.
_STALE = (
    ConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the farewell of a server that came while the connection was idle
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)

# Text, because neither class is generic at run time.
Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record] | asyncpg.Connection[asyncpg.Record]"
Result = TypeVar("Result")

if TYPE_CHECKING:
    _Base = asyncpg.Connection[asyncpg.Record]
else:
    _Base = asyncpg.Connection


class Session(_Base):
    """A connection that remembers whose rows it shows."""

    __slots__ = ("_shown",)

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._shown: str | None = None

    async def show(self, project: str) -> None:
        """From now on this project's rows, and nobody else's. Costs a round trip when it was another's before."""
        if project != self._shown:
            self._shown = None  # until it is known to be set
            await self.execute(_SEE, project)
            self._shown = project


class Database:
    """A pool that is opened without Postgres and comes back by itself. Every verb raises LeveretError `unavailable`.

    `project` is the one whose rows a query may see: None for what belongs to no project, EVERY_PROJECT to list them.
    """

    def __init__(self, url: str, *, connections_max: int) -> None:
        self._primary = Primary(url)
        self._primary.on_move = self._renew
        self._connections_max = connections_max
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self) -> None:
        """Make the pool. It connects at the first read, so Postgres may still be away."""
        self._pool = await asyncpg.create_pool(
            connect=self._primary.connect,
            min_size=0,
            max_size=self._connections_max,
            timeout=CONNECT_TIMEOUT_S,
            server_settings=SESSION,
            connection_class=Session,
            init=_speak_json,
            reset=_keep_session,
        )

    async def connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        """A connection outside of the pool. Raises one of AWAY."""
        return await self._primary.connect(timeout=CONNECT_TIMEOUT_S, server_settings=SESSION)

    async def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    async def rows(self, project: str | None, query: str, *arguments: object) -> list[asyncpg.Record]:
        return await self._read(project, lambda session: session.fetch(query, *arguments))

    async def row(self, project: str | None, query: str, *arguments: object) -> asyncpg.Record | None:
        return await self._read(project, lambda session: session.fetchrow(query, *arguments))

    async def _read(self, project: str | None, read: Callable[[Session], Awaitable[Result]]) -> Result:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                try:
                    return await self._read_once(project, read)
                except _STALE:
                    await self._renew()
                    return await self._read_once(project, read)
        except AWAY as error:
            log.warning("database.away", error=type(error).__name__)
            raise away(error) from error

    async def _renew(self) -> None:
        """One connection was ended, so others may have been too: all are made anew at their next use."""
        if self._pool is not None:
            await self._pool.expire_connections()

    async def _read_once(self, project: str | None, read: Callable[[Session], Awaitable[Result]]) -> Result:
        if self._pool is None:
            raise ConnectionError("the pool is closed")
        async with self._pool.acquire() as connection:
            # A proxy of the pool, which passes on everything that a session can do.
            session = cast(Session, connection)
            try:
                if project is not None:
                    await session.show(project)
                return await read(session)
            except asyncio.CancelledError:
                session.terminate()  # a polite end would wait for a server that does not answer
                raise


def away(error: BaseException) -> LeveretError:
    """What to tell a user. The driver's own words may name addresses and users, so only its kind is told."""
    return fail(Code.UNAVAILABLE, f"The database does not answer ({type(error).__name__}).")


async def _speak_json(connection: Connection) -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: to_json(value).decode(),
        decoder=from_json,
    )


async def _keep_session(_connection: "asyncpg.Connection[Any]") -> None:
    """Reads leave nothing behind in a session; the driver's own reset would cost a round trip for each."""
