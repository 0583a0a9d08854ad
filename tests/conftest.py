"""Servers and clean slates for the tests. Everything is private to the run: directories, ports, sockets."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import aio_pika
import asyncpg
import hypothesis
import pytest

from leveret.conductor.migrate import migrate
from leveret.shared import logs, topology
from leveret.stack.client_permissions import client_permissions
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit

ROOT = Path(__file__).resolve().parents[1]

#: Broker users with the permissions of AMQP clients; which project they speak for, each test's own database says.
CLIENTS: dict[str, tuple[str, Literal["member", "reader"]]] = {
    "ada": ("default", "member"),
    "rex": ("default", "reader"),
    "otto": ("other", "member"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take more than a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


@pytest.fixture(scope="session", autouse=True)
def _plain_logs() -> None:
    logs.configure("test", level="info", style="console")


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """What a shell starts in the background ignores SIGINT, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def run_dir() -> Iterator[Path]:
    """A directory that servers under other accounts can reach; gone after the run."""
    directory = Path(tempfile.mkdtemp(prefix="leveret-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def rabbit(run_dir: Path) -> Iterator[Rabbit]:
    """A real broker with one user a service."""
    server = Rabbit(run_dir / "rabbitmq")
    for user in ("leveret-api", "leveret-conductor", "leveret-compute"):
        server.create_user(user, configure=".*", write=".*", read=".*")
    for user, (project, role) in CLIENTS.items():
        may = client_permissions(user, project, role)
        server.create_user(user, configure=may.configure, write=may.write, read=may.read)
    server.start()
    server.wait_ready()
    yield server
    server.destroy()


@pytest.fixture(scope="session")
def postgres(run_dir: Path) -> Iterator[Postgres]:
    """A real Postgres with a migrated template, of which every test gets a copy."""
    server = Postgres(run_dir / "postgres", durable=False)
    server.start()
    server.wait_ready()
    server.create_database("leveret_template")
    asyncio.run(_furnish(server.dsn(database="leveret_template")))
    yield server
    server.destroy()


async def _furnish(dsn: str) -> None:
    await migrate(dsn)
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("INSERT INTO projects (id) VALUES ('default'), ('other')")
        await connection.execute("SELECT create_network('default', '10.80.0.0/20', '10.80.0.1', '{}')")
        await connection.execute(
            "INSERT INTO images VALUES ('tiny', 'file:///images/tiny.qcow2', $1, 'qcow2')", "0" * 64
        )
    finally:
        await connection.close()


@pytest.fixture
def database(postgres: Postgres) -> Iterator[str]:
    """A fresh, migrated database of its own with project, network and image; the DSN of its owner."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    postgres.create_database(name, template="leveret_template")
    yield postgres.dsn(database=name)
    postgres.psql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def broker(rabbit: Rabbit) -> Rabbit:
    """The broker with empty queues."""
    connection = await aio_pika.connect(rabbit.url)
    async with connection:
        channel = await connection.channel()
        await topology.declare(channel)
        for queue in topology.CORE_QUEUES:
            await (await channel.get_queue(queue.name)).purge()
    return rabbit


@pytest.fixture(scope="session")
def appliance() -> Path:
    """The tiny guest, built if it was not yet."""
    done = subprocess.run([ROOT / "script" / "guest-images"], capture_output=True, text=True, check=True, timeout=600)
    return Path(done.stdout.split()[1])


# Few examples each time, on a machine of any speed; HYPOTHESIS_PROFILE=thorough looks longer.
hypothesis.settings.register_profile("default", max_examples=25, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
