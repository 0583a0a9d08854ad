"""The pool, and what counts as Postgres being away."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from asyncpg.transaction import Transaction

from leveret.shared import fault_points
from leveret.shared.bus import Paused
from leveret.shared.primary import Primary

# asyncpg's classes are generic for the type checker only.
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

#: What only the message at hand can be blamed for: values that no column takes, rows that no constraint allows.
MESSAGE_FAULTS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, ValueError)
#: The SQLSTATE class of our own triggers.
GUARD_STATES = "LV"
#: Anything else that Postgres or the way to it may say: it is down, coming up, read-only, full, not migrated yet, slow,
#: or has broken a deadlock. What it did with a COMMIT that failed so is unknown: the batch is tried again, and reads
#: by id.
AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

#: What speaks against the server that we are on: another one may be the primary now.
_LEFT_BEHIND = (TimeoutError, asyncpg.ReadOnlySQLTransactionError)

CONNECT_TIMEOUT_S = 5.0
#: For a connection to be free, or made.
ACQUIRE_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 30.0
#: Less than a command may take, since the driver would cancel it then.
COMMIT_TIMEOUT_S = 15.0


async def prepare(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Speak JSON on this connection."""
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")


async def _keep(_connection: object) -> None:
    """Nothing to reset: we leave no state in sessions, and a round trip for every transaction would be for nothing."""


async def open_pool(dsn: str, *, max_size: int) -> Pool:
    """A pool that starts without waiting for Postgres to be there, and moves over when another server takes over."""
    primary = Primary(dsn)
    pool: Pool = await asyncpg.create_pool(
        dsn,
        connect=primary.connect,
        timeout=CONNECT_TIMEOUT_S,
        min_size=0,
        max_size=max_size,
        init=prepare,
        reset=_keep,
        command_timeout=COMMAND_TIMEOUT_S,
        server_settings={
            "application_name": "leveret-conductor",
            # Of a conductor that cannot be reached any more, Postgres lets go within half a minute: its locks hold up
            # the others.
            "idle_in_transaction_session_timeout": "25s",
            "tcp_keepalives_idle": "10",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "3",
            "tcp_user_timeout": "25s",
            "lock_timeout": "15s",
        },
    )
    primary.on_move = pool.expire_connections
    return pool


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """One transaction. Raises Paused when Postgres is away: the caller's batch waits and is tried again."""
    async with statement(pool) as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            yield connection
            if fault_points.dies_at_commit() and await connection.fetchval("SELECT pg_current_xact_id_if_assigned()"):
                fault_points.die()
        except (asyncio.CancelledError, TimeoutError):
            raise  # the connection is ended, and the transaction with it
        except BaseException:
            await transaction.rollback()
            raise
        await _commit(connection, transaction)


async def _commit(connection: Connection, transaction: Transaction) -> None:
    """COMMIT, and never cancel it: who has no more time hangs up.

    To a primary that waits for its standby, a cancellation is leave to show what the standby does not have. It would be
    read, told, and lost with the primary.
    """
    committing = asyncio.ensure_future(transaction.commit())
    committing.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait({committing}, timeout=COMMIT_TIMEOUT_S)
    if not committing.done():
        connection.terminate()
        raise TimeoutError("COMMIT was not answered")
    committing.result()


@asynccontextmanager
async def statement(pool: Pool) -> AsyncIterator[Connection]:
    """For a statement that is a transaction by itself. Raises Paused when Postgres is away."""
    try:
        async with pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection:
            try:
                yield connection
            except (asyncio.CancelledError, TimeoutError):
                connection.terminate()  # a polite end would wait for a server that does not answer
                raise
    except AWAY as error:
        if isinstance(error, MESSAGE_FAULTS) or (getattr(error, "sqlstate", None) or "").startswith(GUARD_STATES):
            raise
        if isinstance(error, _LEFT_BEHIND):
            await pool.expire_connections()
        raise Paused(f"{type(error).__name__}: {error}") from error


def count_of(status: str) -> int:
    """The number of rows in a command's status, such as `UPDATE 3`."""
    return int(status.rsplit(" ", 1)[-1])


Row = dict[str, Any]
