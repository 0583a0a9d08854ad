"""Postgres itself shows the API one project at a time and lets it write nothing, whatever its code may do wrong."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import asyncpg
import pytest
from api_world import Tenant
from peers import eventually

from leveret.api import queries
from leveret.api.database import EVERY_PROJECT, Database
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import new_id

pytestmark = pytest.mark.integration

#: Tables with rows of projects, and the column that says whose.
OWNED = {
    "projects": "id",
    "quotas": "project_id",
    "tokens": "project_id",
    "amqp_users": "project_id",
    "vms": "project_id",
    "rejections": "project_id",
    "tombstones": "project_id",
    "events": "project_id",
    "groups": "project_id",
}
#: What an administrator's list of projects needs.
SEEN_BY_ALL = {"projects", "quotas"}

Connection: TypeAlias = "asyncpg.Connection[Any]"


@pytest.fixture
async def pair(tenant: Tenant) -> tuple[Tenant, Tenant]:
    """Two projects with rows in every table."""
    other = Tenant(f"{tenant.project}-2", tenant.connection)
    await other.move_in()
    for whose in (tenant, other):
        await whose.tell(await whose.insert(), "running", "running")
        await whose.refuse(new_id(), "r-1", Problem.of(Code.NO_CAPACITY, "None."))
        await whose.connection.execute(
            "INSERT INTO tombstones (vm_id, project_id) VALUES ($1, $2)", new_id(), whose.project
        )
        await whose.connection.execute(
            "INSERT INTO amqp_users (name, project_id, role) VALUES ($1, $1, 'member')", whose.project
        )
        await whose.connection.execute(
            "INSERT INTO groups VALUES ($1, 'g', 'pack', 'soft', 'zone')",
            whose.project,
        )
    return tenant, other


@pytest.fixture
async def api_role(api_dsn: str) -> AsyncIterator[Connection]:
    """A connection as the API has it, without its own care of reading only."""
    connection = await asyncpg.connect(api_dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def database(api_dsn: str) -> AsyncIterator[Database]:
    database = Database(api_dsn, connections_max=1)
    await database.open()
    yield database
    await database.close()


async def show(connection: Connection, project: str) -> None:
    await connection.execute("SELECT set_config('leveret.project', $1, false)", project)


async def owners(connection: Connection, table: str) -> set[str]:
    return {row[0] for row in await connection.fetch(f"SELECT DISTINCT {OWNED[table]} FROM {table}")}


async def test_the_role_is_no_owner_and_stands_above_no_rule(api_role: Connection) -> None:
    role = await api_role.fetchrow("SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user")
    assert role is not None
    assert tuple(role) == (False, False)
    owned = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public' AND tableowner = current_user"
    assert await api_role.fetchval(owned) == 0


async def test_every_table_with_rows_of_projects_is_in_this_list(tenant: Tenant) -> None:
    """Holds the list above against the schema: a new table of a project's needs a policy, or no grant."""
    tables = await tenant.connection.fetch(
        """SELECT table_name FROM information_schema.columns c JOIN pg_class t ON t.relname = c.table_name
        WHERE table_schema = 'public' AND column_name = 'project_id' AND t.relkind = 'r'
          AND has_any_column_privilege('leveret_api', t.oid, 'SELECT')"""
    )
    assert {row[0] for row in tables} | {"projects"} == set(OWNED)


@pytest.mark.parametrize("table", OWNED)
async def test_only_the_rows_of_the_named_project_are_there(
    api_role: Connection, pair: tuple[Tenant, Tenant], table: str
) -> None:
    ours, theirs = (tenant.project for tenant in pair)
    assert await owners(api_role, table) == set()  # nothing is named
    for project in (ours, theirs):
        await show(api_role, project)
        assert await owners(api_role, table) == {project}
    for nobody in ("", "nobody", "%", f"{ours}' OR true --", ours.upper()):
        await show(api_role, nobody)
        assert await owners(api_role, table) == set()
    await show(api_role, EVERY_PROJECT)
    seen = await owners(api_role, table)
    assert {ours, theirs} <= seen if table in SEEN_BY_ALL else seen == set()


async def test_another_projects_rows_are_not_even_found_by_their_ids(
    api_role: Connection, pair: tuple[Tenant, Tenant]
) -> None:
    ours, theirs = pair
    vm_id = await theirs.insert()
    await show(api_role, ours.project)
    assert await api_role.fetchrow(queries.GET_VM, theirs.project, vm_id) is None
    assert await api_role.fetch(queries.LIST_EVENTS, theirs.project, 0, 10) == []
    assert await api_role.fetchval("SELECT count(*) FROM vms WHERE id = $1", vm_id) == 0
    assert await api_role.fetchval("SELECT count(*) FROM hosts h JOIN vms v ON v.host_id = h.id") == 1


@pytest.mark.parametrize(
    "query",
    [
        "SELECT hash FROM tokens",
        "SELECT * FROM tokens",
        "SELECT count(*) FROM tokens WHERE hash = ''",
        "SELECT id FROM tokens ORDER BY hash",
        "SELECT * FROM vm_user_data",
        "SELECT * FROM request_buckets",
        "SELECT * FROM take_requests(ARRAY['default'], ARRAY[1])",
        "SET ROLE leveret_conductor",
        "SET SESSION AUTHORIZATION postgres",
        "SET row_security = off; SELECT * FROM vms",
        "CREATE TABLE mine (x integer)",
        "ALTER TABLE vms DISABLE ROW LEVEL SECURITY",
        "CREATE POLICY mine ON vms USING (true)",
    ],
)
async def test_secrets_and_ways_around_are_out_of_reach(
    api_role: Connection, pair: tuple[Tenant, Tenant], query: str
) -> None:
    await show(api_role, pair[0].project)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await api_role.execute(query)


@pytest.mark.parametrize("table", [*OWNED, "hosts", "images", "networks", "addresses"])
async def test_nothing_can_be_written(api_role: Connection, tenant: Tenant, table: str) -> None:
    await show(api_role, tenant.project)
    column = await tenant.connection.fetchval(
        "SELECT column_name FROM information_schema.columns WHERE table_name = $1 AND is_identity = 'NO'", table
    )
    for query in (
        f"UPDATE {table} SET {column} = {column}",
        f"DELETE FROM {table}",
        f"INSERT INTO {table} DEFAULT VALUES",
        f"TRUNCATE {table}",
        f"SELECT * FROM {table} FOR UPDATE",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await api_role.execute(query)


async def test_whose_a_token_is_can_be_asked_of_one_that_is_known(
    api_role: Connection, pair: tuple[Tenant, Tenant]
) -> None:
    for tenant in pair:
        digest = hashlib.sha256(tenant.tokens["reader"].encode()).digest()
        row = await api_role.fetchrow(queries.IDENTIFY, digest)
        assert row is not None
        assert (row["project_id"], row["role"]) == (tenant.project, "reader")
    for unknown in (b"", bytes(32)):
        assert await api_role.fetchrow(queries.IDENTIFY, unknown) is None


async def test_a_connection_that_is_used_for_one_project_after_another_shows_each_its_own(
    database: Database, pair: tuple[Tenant, Tenant]
) -> None:
    """One connection, so that every read follows another's."""
    ours, theirs = (tenant.project for tenant in pair)
    everything = "SELECT DISTINCT project_id AS id FROM vms"
    for project in (ours, theirs, theirs, ours):
        assert [row["id"] for row in await database.rows(project, everything)] == [project]
        await database.rows(None, queries.LIST_IMAGES)
    assert {ours, theirs} <= {row["id"] for row in await database.rows(EVERY_PROJECT, "SELECT id FROM projects")}
    assert await database.rows(EVERY_PROJECT, everything) == []
    assert [row["id"] for row in await database.rows(ours, everything)] == [ours]


async def test_a_connection_that_was_replaced_is_told_anew(database: Database, pair: tuple[Tenant, Tenant]) -> None:
    ours, theirs = pair
    everything = "SELECT DISTINCT project_id AS id, pg_backend_pid() AS pid FROM vms"
    [first] = await database.rows(ours.project, everything)
    await ours.connection.execute("SELECT pg_terminate_backend($1)", first["pid"])

    async def is_gone() -> bool:
        seen = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $1"
        return bool(await ours.connection.fetchval(seen, first["pid"]))

    await eventually(is_gone)
    [second] = await database.rows(ours.project, everything)
    assert (second["id"], second["pid"] != first["pid"]) == (ours.project, True)
    assert [row["id"] for row in await database.rows(theirs.project, everything)] == [theirs.project]


async def test_naming_the_same_project_again_costs_no_round_trip(database: Database, tenant: Tenant) -> None:
    """Changed behind its back, the setting stays as it is while one project is read, and is set when another is."""
    named = "SELECT current_setting('leveret.project') AS project"

    async def read(project: str) -> str:
        row = await database.row(project, named)
        assert row is not None
        return str(row["project"])

    assert await read(tenant.project) == tenant.project
    await database.rows(None, "SELECT set_config('leveret.project', 'elsewhere', false)")
    assert await read(tenant.project) == "elsewhere"
    assert await read("other") == "other"
    assert await read(tenant.project) == tenant.project
