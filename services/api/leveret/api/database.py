"""Reading Postgres: a small pool of read-only connections, and one way to say that it is away."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import asyncpg
import structlog
from asyncpg.pool import PoolConnectionProxy
from pydantic_core import from_json, to_json

from leveret.shared.errors import Code, LeveretError, fail

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


class Database:
    """A pool that is opened without Postgres and comes back by itself. Every verb raises LeveretError `unavailable`."""

    def __init__(self, url: str, *, connections_max: int) -> None:
        self._url = url
        self._connections_max = connections_max
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self) -> None:
        """Make the pool. It connects at the first read, so Postgres may still be away."""
        self._pool = await asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=self._connections_max,
            timeout=CONNECT_TIMEOUT_S,
            server_settings=SESSION,
            init=_speak_json,
            reset=_keep_session,
        )

    async def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    async def rows(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        return await self._read(lambda connection: connection.fetch(query, *arguments))

    async def row(self, query: str, *arguments: object) -> asyncpg.Record | None:
        return await self._read(lambda connection: connection.fetchrow(query, *arguments))

    async def _read(self, read: Callable[[Connection], Awaitable[Result]]) -> Result:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                try:
                    return await self._read_once(read)
                except _STALE:
                    await self._renew()
                    return await self._read_once(read)
        except AWAY as error:
            log.warning("database.away", error=type(error).__name__)
            raise away(error) from error

    async def _renew(self) -> None:
        """One connection was ended, so others may have been too: all are made anew at their next use."""
        if self._pool is not None:
            await self._pool.expire_connections()

    async def _read_once(self, read: Callable[[Connection], Awaitable[Result]]) -> Result:
        if self._pool is None:
            raise ConnectionError("the pool is closed")
        async with self._pool.acquire() as connection:
            try:
                return await read(connection)
            except asyncio.CancelledError:
                connection.terminate()  # a polite end would wait for a server that does not answer
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
