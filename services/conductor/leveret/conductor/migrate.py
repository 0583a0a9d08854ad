"""Migrations: numbered plain SQL, each in its own transaction, checksummed, one runner at a time."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from importlib import resources

import asyncpg

from leveret.shared.errors import Code, fail

#: Arbitrary, and the same for every runner on a database.
LOCK = 0x6C657665726574

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
    connection = await asyncpg.connect(dsn)
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
            async with connection.transaction():
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO schema_migrations (number, name, checksum) VALUES ($1, $2, $3)",
                    migration.number,
                    migration.name,
                    migration.checksum,
                )
            done.append(f"{migration.number:04d}_{migration.name}")
        return done
    finally:
        await connection.close()


async def status(dsn: str) -> list[Applied]:
    """Every shipped migration, applied or not."""
    connection = await asyncpg.connect(dsn)
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
