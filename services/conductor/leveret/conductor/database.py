"""The pool, and what counts as Postgres being away."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from leveret.shared.bus import Paused

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

COMMAND_TIMEOUT_S = 30


async def prepare(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Speak JSON on this connection."""
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")


async def _keep(_connection: object) -> None:
    """Nothing to reset: we leave no state in sessions, and a round trip for every transaction would be for nothing."""


async def open_pool(dsn: str, *, max_size: int) -> Pool:
    """A pool that starts without waiting for Postgres to be there."""
    return await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=max_size,
        init=prepare,
        reset=_keep,
        command_timeout=COMMAND_TIMEOUT_S,
        server_settings={
            "application_name": "leveret-conductor",
            "idle_in_transaction_session_timeout": "60s",
            "lock_timeout": "15s",
        },
    )


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """One transaction. Raises Paused when Postgres is away: the caller's batch waits and is tried again."""
    async with statement(pool) as connection, connection.transaction():
        yield connection


@asynccontextmanager
async def statement(pool: Pool) -> AsyncIterator[Connection]:
    """For a statement that is a transaction by itself. Raises Paused when Postgres is away."""
    try:
        async with pool.acquire(timeout=10) as connection:
            yield connection
    except AWAY as error:
        if isinstance(error, MESSAGE_FAULTS) or (getattr(error, "sqlstate", None) or "").startswith(GUARD_STATES):
            raise
        if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            await pool.expire_connections()  # a failover left us on the old primary
        raise Paused(f"{type(error).__name__}: {error}") from error


def count_of(status: str) -> int:
    """The number of rows in a command's status, such as `UPDATE 3`."""
    return int(status.rsplit(" ", 1)[-1])


Row = dict[str, Any]
