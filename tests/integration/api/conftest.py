"""One API process for all its tests; a tenant and a scripted conductor for each."""

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import httpx2
import pytest
from api_process import Api, running_api
from api_world import ScriptedConductor, Tenant, conducting, verdict

from leveret.conductor.administration import carry_out
from leveret.conductor.database import prepare
from leveret.conductor.order import Order
from leveret.shared.bus import Delivery
from leveret.shared.messages import ADMINISTRATION, GROUPS, Verdict
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit

DATABASE = "api_tests"
ROLE = "api_reader"


@pytest.fixture(scope="session")
def api_dsn(postgres: Postgres) -> str:
    """The API's own database, as a user that may do what the API's role may."""
    postgres.create_database(DATABASE, template="leveret_template")
    postgres.create_role(ROLE)
    postgres.psql(f"GRANT leveret_api TO {ROLE}")
    return postgres.dsn(ROLE, DATABASE)


@pytest.fixture(scope="session")
def api(run_dir: Path, rabbit: Rabbit, api_dsn: str) -> Iterator[Api]:
    with running_api(run_dir, amqp_url=rabbit.url_of("leveret-api"), database_url=api_dsn) as api:
        api.wait_ready()
        yield api


@pytest.fixture
async def tenant(postgres: Postgres, api_dsn: str) -> AsyncIterator[Tenant]:
    """A project of the test's own."""
    connection = await asyncpg.connect(postgres.dsn(database=DATABASE))
    tenant = Tenant(f"p-{uuid.uuid4().hex[:12]}", connection)
    await tenant.move_in()
    yield tenant
    await connection.close()


@pytest.fixture
async def stranger(api: Api) -> AsyncIterator[httpx2.AsyncClient]:
    """A client without a token."""
    async with httpx2.AsyncClient(base_url=api.url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
async def client(stranger: httpx2.AsyncClient, tenant: Tenant) -> httpx2.AsyncClient:
    """A client with the tenant's member token."""
    stranger.headers.update(tenant.headers())
    return stranger


@pytest.fixture
async def conductor(broker: Rabbit) -> AsyncIterator[ScriptedConductor]:
    async with conducting(broker.url_of("leveret-conductor")) as conductor:
        yield conductor


@pytest.fixture
async def clerk(postgres: Postgres, api_dsn: str, conductor: ScriptedConductor) -> AsyncIterator[ScriptedConductor]:
    """A conductor that carries out orders about projects, hosts and groups, with its own function, and nothing else."""
    connection = await asyncpg.connect(postgres.dsn(database=DATABASE))
    await prepare(connection)

    async def carry(delivery: Delivery) -> Verdict | None:
        body = delivery.decoded(among=ADMINISTRATION | GROUPS)
        project, actor, name = (delivery.header(header) or "" for header in ("project", "actor", "request_id"))
        async with connection.transaction():
            return verdict(delivery, problem=await carry_out(connection, Order(project, actor, name, body)))

    conductor.script = carry
    yield conductor
    await connection.close()


@pytest.fixture
async def admin(stranger: httpx2.AsyncClient, tenant: Tenant) -> httpx2.AsyncClient:
    """A client with the tenant's administrator's token."""
    stranger.headers.update(tenant.headers("admin"))
    return stranger
