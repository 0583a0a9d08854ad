"""A whole installation under a directory of its own, to be broken and put right again."""

import asyncio
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
from invariants import violations
from peers import eventually

from leveret.client import Leveret
from leveret.stack.composition import Peers, Ports, compose
from leveret.stack.down import down
from leveret.stack.hypervisor import ready_libvirt
from leveret.stack.layout import Layout, Options
from leveret.stack.ports import free_port
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit
from leveret.stack.services import Runner, Service
from leveret.stack.up import BROKER_USERS, DATABASE, DATABASE_ROLES, OWNER, Summary, up


class Silent:
    """Nobody watches this `up`."""

    def doing(self, what: str) -> None: ...
    def done(self, name: str, note: str = "") -> None: ...


class Installation:
    """What `leveret up` made, with a grip on every process."""

    def __init__(self, layout: Layout, options: Options, summary: Summary) -> None:
        self.layout = layout
        self.options = options
        self.url, self.token = summary.url, summary.token
        self.rabbit, self.postgres = Rabbit(layout.rabbitmq), Postgres(layout.postgres)
        self.runner = Runner(layout.services)
        self.services = {service.name: service for service in self._compose()}

    def _compose(self) -> tuple[Service, ...]:
        peers = Peers(
            amqp_urls={user: self.rabbit.url_of(user) for user in BROKER_USERS},
            database_urls={role: self.postgres.dsn(role, DATABASE) for role in DATABASE_ROLES},
            libvirt_uri=ready_libvirt(self.layout, self.options).uri if self.options.libvirt else None,
        )
        return compose(self.layout, self.options, peers, Ports(self.layout.ports(), self.runner)).services

    def reconfigure(self, name: str, **env: str) -> None:
        """Run a service with these settings too."""
        service = self.services[name]
        self.services[name] = replace(service, env={**service.env, **env})
        self.restart(name)

    def add_fake_hosts(self, name: str, count: int, **env: str) -> None:
        """Have another worker process with simulated hosts of its own, which can be broken by themselves."""
        service = self.services["fake-hosts"]
        own = {"LEVERET_HOST_STATE_DIR": str(self.layout.root / name), "LEVERET_HOST_NAME": name}
        argv = ("leveret.compute.app", "--simulate", str(count))
        self.services[name] = replace(service, name=name, argv=argv, env={**service.env, **own, **env})
        self.restart(name)

    def kill(self, name: str) -> None:
        """SIGKILL, in the middle of whatever it does."""
        match name:
            case "rabbitmq":
                self.rabbit.kill()
            case "postgres":
                self.postgres.kill()
            case _:
                self.runner.daemon(name).kill()

    def restart(self, name: str) -> None:
        """Start it again, as a supervisor would; does not wait."""
        match name:
            case "rabbitmq":
                self.rabbit.start()
            case "postgres":
                self.postgres.start()
            case _:
                self.runner.ensure(self.services[name])

    def wait_ready(self) -> None:
        """Everything is of use."""
        self.postgres.wait_ready(60)
        self.rabbit.wait_ready(60)
        for service in self.services.values():
            self.runner.wait_ready(service, 60)

    def freeze(self, name: str) -> None:
        process = self.runner.daemon(name).process()
        assert process is not None
        process.send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        process = self.runner.daemon(name).process()
        assert process is not None
        process.send_signal(signal.SIGCONT)

    def client(self, *, retry_for_s: float = 60.0) -> Leveret:
        return Leveret(self.url, self.token, retry_for_s=retry_for_s)

    async def query(self, sql: str, *arguments: Any) -> list[Any]:
        connection = await asyncpg.connect(self.postgres.dsn(OWNER, DATABASE))
        try:
            return list(await connection.fetch(sql, *arguments))
        finally:
            await connection.close()

    async def settle(self, *, within_s: float = 60.0) -> None:
        """Wait until nothing is left to do, then check every invariant."""

        async def at_rest() -> bool:
            rows = await self.query(
                """SELECT FROM vms WHERE deadline IS NOT NULL
                UNION ALL SELECT FROM events WHERE seq IS NULL LIMIT 1"""
            )
            return not rows

        await eventually(at_rest, within_s=within_s, what="everything at rest")
        connection = await asyncpg.connect(self.postgres.dsn(OWNER, DATABASE))
        try:
            assert await violations(connection) == {}
        finally:
            await connection.close()

    async def register_image(self, name: str, path: Path, sha256: str) -> None:
        await self.query(
            "INSERT INTO images VALUES ($1, $2, $3, 'qcow2') ON CONFLICT DO NOTHING", name, path.as_uri(), sha256
        )


@contextmanager
def installed(options: Options) -> Iterator[Installation]:
    """An installation, and nothing left of it afterwards."""
    root = Path(tempfile.mkdtemp(prefix="leveret-test-"))
    root.chmod(0o755)
    layout = Layout(root)
    # Never the usual port: two installations that begin at the same moment would both take it for free.
    options = replace(options, api_port=options.api_port or free_port())
    try:
        installation = Installation(layout, options, up(layout, options, Silent()))
        asyncio.run(installation.query("INSERT INTO images VALUES ('tiny', 'file:///tiny', $1, 'raw')", "0" * 64))
        yield installation
    finally:
        down(layout, Silent(), purge=True)
        shutil.rmtree(root, ignore_errors=True)


def latencies(**seconds: float) -> str:
    """LEVERET_SIMULATE_LATENCY_S for these verbs."""
    return json.dumps(seconds)
