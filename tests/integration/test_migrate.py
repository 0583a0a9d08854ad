"""Migrations on a real Postgres."""

import asyncio
import uuid
from collections.abc import Iterator

import asyncpg
import pytest

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
