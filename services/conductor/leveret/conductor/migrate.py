"""Migrations: numbered plain SQL, each in its own transaction, checksummed, one runner at a time."""

import asyncio
import hashlib
import random
from dataclasses import dataclass
from datetime import datetime
from importlib import resources

import asyncpg

from leveret.shared.errors import Code, fail
from leveret.shared.primary import Primary

#: Arbitrary, and the same for every runner on a database.
LOCK = 0x6C657665726574

#: A runner whose machine is gone holds the lock until Postgres finds out.
SESSION = {
    "application_name": "leveret-migrate",
    "idle_in_transaction_session_timeout": "60s",
    "idle_session_timeout": "60s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}

CLOSE_TIMEOUT_S = 5.0
#: For a table to be free. Whoever waits for one makes everybody wait who comes after: the services that run meanwhile.
TABLE_TIMEOUT_S = 2
_IN_THE_WAY = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)

_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


@dataclass(frozen=True, slots=True)
class Migration:
    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Applied:
    """One migration and when it was applied; None when it still is to be."""

    number: int
    name: str
    applied_at: datetime | None


def shipped() -> list[Migration]:
    """The migrations of this version, in order."""
    found = []
    for file in (resources.files("leveret.conductor") / "migrations").iterdir():
        if file.name.endswith(".sql"):
            number, _, name = file.name.removesuffix(".sql").partition("_")
            found.append(Migration(int(number), name, file.read_text()))
    return sorted(found, key=lambda migration: migration.number)


async def migrate(dsn: str) -> list[str]:
    """Apply what is missing, and return the names of what was applied.

    Killed half-way, it goes on from the last whole migration. Raises LeveretError when an applied migration is not
    the shipped one any more.
    """
    connection = await Primary(dsn).connect(server_settings=SESSION)
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
        await connection.execute(_TABLE)
        rows = await connection.fetch("SELECT number, checksum FROM schema_migrations")
        applied = {row["number"]: row["checksum"] for row in rows}
        done = []
        for migration in shipped():
            if migration.number in applied:
                _check(migration, applied[migration.number])
                continue
            await _apply(connection, migration)
            done.append(f"{migration.number:04d}_{migration.name}")
        return done
    finally:
        await connection.close(timeout=CLOSE_TIMEOUT_S)


async def _apply(connection: "asyncpg.Connection[asyncpg.Record]", migration: Migration) -> None:
    """Again and again, until it meets nobody's transaction that holds what it changes, or waits for it in turn."""
    while True:
        try:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = '{TABLE_TIMEOUT_S}s'")
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO schema_migrations (number, name, checksum) VALUES ($1, $2, $3)",
                    migration.number,
                    migration.name,
                    migration.checksum,
                )
            return
        except _IN_THE_WAY:
            await asyncio.sleep(random.uniform(0.5, 1.5))


async def status(dsn: str) -> list[Applied]:
    """Every shipped migration, applied or not."""
    connection = await Primary(dsn).connect()
    try:
        there = await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
        rows = await connection.fetch("SELECT number, applied_at FROM schema_migrations") if there else []
    finally:
        await connection.close()
    applied = {row["number"]: row["applied_at"] for row in rows}
    return [Applied(m.number, m.name, applied.get(m.number)) for m in shipped()]


def _check(migration: Migration, checksum: str) -> None:
    if checksum != migration.checksum:
        raise fail(
            Code.INTERNAL,
            f"Migration {migration.number:04d}_{migration.name} was applied in another version than the shipped one.",
            hint="Run the version of Leveret that this database belongs to; applied migrations never change.",
        )
