"""Migrations on a real Postgres."""

import asyncio
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from peers import eventually

from leveret.conductor import migrate
from leveret.shared.errors import LeveretError
from leveret.shared.lifecycle import MOVES, State
from leveret.stack.postgres import Postgres

pytestmark = pytest.mark.integration


@pytest.fixture
def empty(postgres: Postgres) -> Iterator[str]:
    name = f"empty_{uuid.uuid4().hex[:12]}"
    postgres.create_database(name)
    yield postgres.dsn(database=name)
    postgres.drop_database(name)


async def test_migrations_are_applied_once_and_by_one_runner_at_a_time(empty: str) -> None:
    assert all(one.applied_at is None for one in await migrate.status(empty))
    done = await asyncio.gather(*(migrate.migrate(empty) for _ in range(4)))
    assert sorted(map(len, done)) == [0, 0, 0, len(migrate.shipped())]
    assert all(one.applied_at for one in await migrate.status(empty))


async def test_a_migration_that_was_changed_after_it_was_applied_is_refused(empty: str) -> None:
    await migrate.migrate(empty)
    connection = await asyncpg.connect(empty)
    await connection.execute("UPDATE schema_migrations SET checksum = 'another' WHERE number = 1")
    await connection.close()
    with pytest.raises(LeveretError, match="another version"):
        await migrate.migrate(empty)


async def test_a_migration_that_fails_leaves_nothing_behind(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [*migrate.shipped(), migrate.Migration(9999, "broken", "CREATE TABLE half (id int); SELECT 1 / 0;")]
    monkeypatch.setattr(migrate, "shipped", lambda: broken)
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate.migrate(empty)
    assert [one.applied_at is None for one in await migrate.status(empty)] == [False] * (len(broken) - 1) + [True]
    connection = await asyncpg.connect(empty)
    assert await connection.fetchval("SELECT to_regclass('half')") is None
    await connection.close()


async def test_an_installation_from_before_projects_had_quotas_is_carried_over(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = migrate.shipped()
    monkeypatch.setattr(migrate, "shipped", lambda: shipped[:1])
    await migrate.migrate(empty)
    connection = await asyncpg.connect(empty)
    await connection.execute("INSERT INTO projects (id) VALUES ('default')")
    await connection.execute("SELECT create_network('default', '10.0.0.0/24', '10.0.0.1', '{}')")
    for n in range(3):
        await connection.execute(
            """INSERT INTO vms (id, project_id, name, spec, spec_hash, vcpus, memory_mib, disk_gib, image, network, mac,
                                desired, state, problem)
            VALUES ($1, 'default', $2, '{}', $3, 2, 512, 10, '{}', 'default', 'm', 'running', 'error', '{}')""",
            uuid.uuid4(),
            f"vm-{n}",
            bytes(32),
        )
        await connection.execute(
            """INSERT INTO tokens (id, project_id, name, role, hash, created_at)
            VALUES ($1, 'default', 'same', 'member', $2, '2026-01-01')""",
            uuid.uuid4(),
            bytes([n]) * 32,
        )
    monkeypatch.setattr(migrate, "shipped", lambda: shipped)
    await migrate.migrate(empty)
    used = await connection.fetchrow("SELECT vms_used, vcpus_used, memory_mib_used, disk_gib_used FROM quotas")
    tokens = await connection.fetch("SELECT name FROM tokens WHERE revoked_at IS NULL")
    await connection.close()
    assert used is not None
    assert tuple(used) == (3, 6, 1536, 30)
    assert len({row["name"] for row in tokens}) == 3, "every token still works, under a name of its own"


MIGRATE = "import asyncio, sys; from leveret.conductor.migrate import migrate; asyncio.run(migrate(sys.argv[1]))"
HALF_WAY = """
SELECT FROM pg_stat_activity
WHERE application_name = 'leveret-migrate' AND wait_event = 'relation' AND datname = current_database()
"""


@asynccontextmanager
async def stuck_half_way(dsn: str, shipped: list[migrate.Migration]) -> AsyncIterator[None]:
    """The first migration is applied; whoever applies the second comes as far as the tokens, which somebody reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrate, "shipped", lambda: shipped[:1])
        await migrate.migrate(dsn)
    reader = await asyncpg.connect(dsn)
    try:
        await reader.execute("BEGIN; SELECT count(*) FROM tokens")
        yield
    finally:
        reader.terminate()


@asynccontextmanager
async def migrating(dsn: str) -> AsyncIterator["subprocess.Popen[bytes]"]:
    """A process that migrates, and is half way."""
    command = [sys.executable, "-c", MIGRATE, dsn]
    process = await asyncio.to_thread(subprocess.Popen, command, stderr=subprocess.DEVNULL)
    try:
        looking = await asyncpg.connect(dsn)
        try:
            await eventually(lambda: looking.fetch(HALF_WAY), within_s=30, what="a migration half way")
        finally:
            await looking.close()
        yield process
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


async def is_whole(dsn: str, shipped: list[migrate.Migration]) -> None:
    """Migrating once more applies all that is missing, and says that it is what was shipped."""
    assert len(await migrate.migrate(dsn)) == len(shipped) - 1
    assert all(one.applied_at for one in await migrate.status(dsn))
    assert await migrate.migrate(dsn) == []


async def test_a_migration_whose_process_is_killed_half_way_is_applied_by_the_next(empty: str) -> None:
    shipped = migrate.shipped()
    async with stuck_half_way(empty, shipped), migrating(empty) as process:
        process.kill()
        await asyncio.to_thread(process.wait)
        assert [one.applied_at is None for one in await migrate.status(empty)] == [False] + [True] * (len(shipped) - 1)
    await is_whole(empty, shipped)


async def test_a_migration_goes_on_when_postgres_has_died_half_way(empty: str, postgres: Postgres) -> None:
    shipped = migrate.shipped()
    async with stuck_half_way(empty, shipped), migrating(empty) as process:
        await asyncio.to_thread(postgres.restart, "immediate")
        assert await asyncio.to_thread(process.wait, 30) != 0
    await is_whole(empty, shipped)


async def test_whoever_waits_to_migrate_takes_over_from_one_that_is_killed(empty: str) -> None:
    shipped = migrate.shipped()
    async with stuck_half_way(empty, shipped), migrating(empty) as process:
        waiting = asyncio.create_task(migrate.migrate(empty))
        process.kill()
        await asyncio.to_thread(process.wait)
    assert len(await waiting) == len(shipped) - 1
    assert await migrate.migrate(empty) == []


async def test_a_migration_that_has_to_wait_keeps_nobody_else_waiting(empty: str) -> None:
    """A lock that is waited for would be waited for by everybody who comes after: all the services."""
    shipped = migrate.shipped()
    async with stuck_half_way(empty, shipped), migrating(empty) as process:
        service = await asyncpg.connect(empty, command_timeout=30)
        for _ in range(5):
            await service.execute("SELECT count(*) FROM tokens")
        await service.close()
        assert process.poll() is None
    await eventually(lambda: process.poll() is not None, within_s=1)
    await is_whole(empty, shipped)


async def test_a_migration_that_is_in_a_circle_of_locks_is_tried_again(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Services that run meanwhile take tables in an order of their own."""
    await migrate.migrate(empty)
    touching = migrate.Migration(
        9999,
        "touching",
        "ALTER TABLE hosts ADD COLUMN x int; SELECT pg_advisory_lock(7); ALTER TABLE vms ADD COLUMN x int;",
    )
    shipped = [*migrate.shipped(), touching]
    monkeypatch.setattr(migrate, "shipped", lambda: shipped)
    service, gate = await asyncpg.connect(empty), await asyncpg.connect(empty)
    await gate.execute("SELECT pg_advisory_lock(7)")
    applying = asyncio.create_task(migrate.migrate(empty))
    holding = "SELECT FROM pg_locks l JOIN pg_class c ON c.oid = l.relation WHERE c.relname = 'hosts' AND l.granted"
    await eventually(lambda: gate.fetch(f"{holding} AND mode = 'AccessExclusiveLock'"), what="hosts are taken")
    await service.execute("SET deadlock_timeout = '30s'")  # so that it is the migration that is ended
    await service.execute("BEGIN; SELECT count(*) FROM vms")
    reading = asyncio.create_task(service.execute("SELECT count(*) FROM hosts"))
    await eventually(lambda: gate.fetch("SELECT FROM pg_locks WHERE NOT granted AND relation IS NOT NULL"))
    await gate.execute("SELECT pg_advisory_unlock(7)")
    await reading
    await service.execute("ROLLBACK")
    assert await applying == ["9999_touching"]
    await service.close()
    await gate.close()


async def test_the_api_cannot_lead_the_owners_functions_astray(empty: str) -> None:
    await migrate.migrate(empty)
    connection = await asyncpg.connect(empty)
    await connection.execute("SET ROLE leveret_api")
    for sql in ("CREATE TEMP VIEW tokens AS SELECT 1", "CREATE TABLE tokens (id int)", "SELECT * FROM addresses"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(sql)
    await connection.close()


async def test_the_database_knows_the_same_moves_as_the_code(database: str) -> None:
    connection = await asyncpg.connect(database)
    legal = {
        (old, new)
        for old in State
        for new in State
        if await connection.fetchval("SELECT vm_move_is_legal($1, $2)", old, new)
    }
    await connection.close()
    assert legal == {(old, new) for old in State for new in State if old is new or new in MOVES[old]}


async def test_the_api_can_read_but_not_write_and_never_sees_user_data(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("SET ROLE leveret_api")
    await connection.fetch("SELECT * FROM vms")
    for sql in (
        "SELECT * FROM vm_user_data",
        "DELETE FROM vms",
        "UPDATE hosts SET vcpus = 1",
        "INSERT INTO tombstones DEFAULT VALUES",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(sql)
    await connection.close()


async def test_no_transaction_can_overbook_a_host(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        """INSERT INTO hosts (id, name, zone, epoch, virt_type, version, vcpus, memory_mib, disk_gib)
        VALUES ($1, 'h', 'z', 1, 'qemu', '1', 4, 1024, 10)""",
        uuid.uuid4(),
    )
    for column, too_much in (("vcpus_used", 5), ("memory_mib_used", 1025), ("disk_gib_used", 11), ("vcpus_used", -1)):
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(f"UPDATE hosts SET {column} = $1", too_much)
    await connection.close()
