"""The installation that the storm goes over: its processes, its hosts, and what systemd would do for it."""

import asyncio
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from installation import Installation, installed
from proxy import Proxy

from chaos.schedule import LINKS
from chaos.workload import FLAKY, REAL, REAL_LABEL, ROOMY, TIGHT
from leveret.stack.layout import Options
from leveret.stack.libvirtd import Libvirtd
from leveret.stack.rabbitmq import greets
from leveret.stack.services import DRAIN_S

CONDUCTORS, APIS, HOSTS = 3, 2, 48
#: What verbs take on simulated hosts, in seconds: from, to.
LATENCY_S: Mapping[str, tuple[float, float]] = {
    "fetch_image": (0.02, 0.5),
    "make_disk": (0.02, 0.3),
    "make_config_drive": (0.01, 0.1),
    "define": (0.01, 0.2),
    "start": (0.05, 1.0),
    "stop": (0.05, 0.5),
    "reset": (0.05, 0.3),
    "mark": (0.0, 0.05),
    "remove": (0.05, 0.6),
}
#: How often verbs fail in the zone where they do.
FAILURES: Mapping[str, float] = {"make_disk": 0.1, "define": 0.25, "start": 0.35, "remove": 0.1}
#: The workers of simulated hosts, each with its zone.
WORKERS: Mapping[str, str] = {
    "fake-hosts": ROOMY[0],
    "fake-hosts-2": ROOMY[1],
    "fake-hosts-3": TIGHT,
    "fake-hosts-4": FLAKY,
}
#: What is worth a look in the logs, whatever the verdict.
COMPLAINTS: Mapping[str, str] = {
    "error:": '"level": "error"',
    "Postgres: deadlock": "ERROR:  deadlock detected",
    "Postgres: lock timeout": "ERROR:  canceling statement due to lock timeout",
}
_EVENT = re.compile(r'"event": "([^"]*)"')
POLL_S = 0.3
#: What everything else stands on, and what starting may take for the rest, in seconds.
STORES, STARTING_S = frozenset({"rabbitmq", "postgres"}), 15.0
READY_S = 90.0


@dataclass(frozen=True)
class Component:
    """One thing that can be killed, frozen and started again. All verbs block.

    `is_ready` says that it is of use. A service that waits for its broker is not; it may be hit all the same.
    """

    name: str
    kill: Callable[[], None]
    stop: Callable[[], object]
    start: Callable[[], object]
    processes: Callable[[], list[psutil.Process]]
    is_running: Callable[[], bool]
    is_ready: Callable[[], bool]
    log: Path


@dataclass
class Keeper:
    """What systemd would do: starts again whatever has ended. Those that the nemesis has in its hands are left to it.

    `ended` are the processes that ended by themselves: when, and which.
    """

    components: Mapping[str, Component]
    logs: Path
    began: float
    held: set[str] = field(default_factory=set)
    _started_at: dict[str, float] = field(default_factory=dict)
    ended: list[tuple[float, str]] = field(default_factory=list)
    _copies: int = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            for name in await asyncio.to_thread(self._down):
                if name not in self.held:
                    self.ended.append((time.monotonic() - self.began, name))
                    await self.start(name)
            await asyncio.sleep(POLL_S)

    def _down(self) -> list[str]:
        return [name for name, one in self.components.items() if name not in self.held and not one.is_running()]

    async def start(self, name: str) -> None:
        """Start it, and keep the log of its life before."""
        component = self.components[name]
        await asyncio.to_thread(self._keep_log, component)
        await asyncio.to_thread(component.start)
        self._started_at[name] = time.monotonic()

    async def may_be_hit(self, name: str) -> bool:
        """Whether it is not down. One that was started may be hit once it was of use, or has had time for that.

        On a slow machine it would never be of use, else.
        """
        if name in self.held:
            return False
        component = self.components[name]
        if await asyncio.to_thread(component.is_ready):
            self._started_at.pop(name, None)
            return True
        started_at = self._started_at.get(name, float("-inf"))
        has_had_time = name not in STORES and time.monotonic() - started_at > STARTING_S
        return has_had_time and await asyncio.to_thread(component.is_running)

    def complaints(self) -> Counter[str]:
        """What the logs that were kept say at level error, and what Postgres had to break off, by kind."""
        found: Counter[str] = Counter()
        for file in sorted(self.logs.glob("*.log")):
            for line in file.read_text(errors="replace").splitlines():
                for kind, mark in COMPLAINTS.items():
                    if mark in line:
                        event = _EVENT.search(line)
                        found[f"{kind} {event.group(1) if event else ''}".strip()] += 1
        return found

    def keep_logs(self) -> None:
        for component in self.components.values():
            self._keep_log(component)

    def _keep_log(self, component: Component) -> None:
        if component.log.exists():
            self._copies += 1
            shutil.copyfile(component.log, self.logs / f"{component.name}.{self._copies:04}.log")


@contextmanager
def standing(*, guests: bool, hosts: int = HOSTS, image_dir: Path | None = None) -> Iterator[Installation]:
    """An installation for a storm, not yet furnished. `guests`: with a real host, which needs root."""
    options = Options(
        conductors=CONDUCTORS,
        apis=APIS,
        fake_hosts=hosts,
        fake_workers=len(WORKERS),
        libvirt=guests,
        virt_type="qemu",
        image_dir=str(image_dir) if image_dir else None,
    )
    with installed(options) as installation:
        yield installation


def urls(installation: Installation) -> dict[str, str]:
    """Where each API process listens."""
    return {
        name: service.check.url.removesuffix("/readyz")
        for name, service in installation.services.items()
        if name.startswith("api") and service.check.url is not None
    }


class Lines:
    """The connections of some services to broker and database, by way of proxies: see schedule.LINKS."""

    def __init__(self) -> None:
        self.proxies: dict[tuple[str, str], Proxy] = {}

    async def open(self, installation: Installation) -> None:
        """Have the proxies; who runs already must be told by `settings`."""
        ports = {"rabbitmq": installation.rabbit.port, "postgres": installation.postgres.port}
        for name, servers in LINKS.items():
            for server in servers if name in installation.services else ():
                proxy = self.proxies[name, server] = Proxy(ports[server])
                await proxy.open()

    async def close(self) -> None:
        for proxy in self.proxies.values():
            await proxy.close()

    def settings(self, name: str, env: Mapping[str, str]) -> dict[str, str]:
        """The addresses of broker and database by way of the proxies that there are for this service."""
        return {
            _ADDRESSES[server]: proxy.through(env[_ADDRESSES[server]])
            for (service, server), proxy in self.proxies.items()
            if service == name
        }


_ADDRESSES = {"rabbitmq": "LEVERET_AMQP_URL", "postgres": "LEVERET_DATABASE_URL"}


def furnish(installation: Installation, lines: Lines) -> None:
    """Give every process its settings for the storm, and wait until all are of use. Blocks."""
    for name, service in installation.services.items():
        env = {**service.env, **_settings(name), **lines.settings(name, service.env)}
        installation.services[name] = replace(service, env=env)
    with ThreadPoolExecutor(max_workers=len(installation.services)) as pool:
        list(pool.map(installation.restart, installation.services))
    installation.wait_ready()


def _settings(name: str) -> dict[str, str]:
    if name.startswith("conductor"):
        # In the zone where builds fail, hosts would soon be out of service.
        return {"LEVERET_CORDON_AFTER_FAILURES": "1000000"}
    if name == "compute":
        return {"LEVERET_ZONE": REAL, "LEVERET_LABELS": json.dumps(REAL_LABEL), "LEVERET_HEARTBEAT_S": "2"}
    if name not in WORKERS:
        return {}
    zone = WORKERS[name]
    settings = {
        "LEVERET_ZONE": zone,
        "LEVERET_HEARTBEAT_S": "2",
        "LEVERET_SIMULATE_LATENCY_S": json.dumps(LATENCY_S),
        "LEVERET_SIMULATE_READY_S": "1",
    }
    if zone == FLAKY:
        settings["LEVERET_SIMULATE_FAILURES"] = json.dumps(FAILURES)
    if zone == TIGHT:
        settings |= {"LEVERET_SIMULATE_VCPUS": "1", "LEVERET_VCPU_RATIO": "1"}
    return settings


def components(installation: Installation) -> dict[str, Component]:
    """Everything that runs, by name."""
    found = {name: _service(installation, name) for name in installation.services}
    rabbit, postgres = installation.rabbit, installation.postgres
    found["rabbitmq"] = Component(
        "rabbitmq",
        kill=rabbit.kill,
        stop=rabbit.stop,
        start=rabbit.start,
        processes=lambda: _family(rabbit.pid)[:1],
        is_running=rabbit.is_running,
        is_ready=lambda: rabbit.is_running() and greets(rabbit.port),
        log=rabbit.log_file,
    )
    found["postgres"] = Component(
        "postgres",
        kill=postgres.kill,
        stop=postgres.stop,
        start=postgres.start,
        processes=lambda: _family(postgres.pid),
        is_running=postgres.is_running,
        is_ready=lambda: _takes_connections(installation),
        log=postgres.log_file,
    )
    if installation.options.libvirt:
        libvirtd = Libvirtd(installation.layout.libvirt)
        found["libvirtd"] = Component(
            "libvirtd",
            kill=libvirtd.kill,
            stop=libvirtd.stop,
            start=libvirtd.start,
            processes=lambda: _family(libvirtd.pid)[:1],
            is_running=libvirtd.is_running,
            is_ready=libvirtd.is_running,
            log=libvirtd.log_file,
        )
    return found


def _service(installation: Installation, name: str) -> Component:
    daemon, service = installation.runner.daemon(name), installation.services[name]
    return Component(
        name,
        kill=daemon.kill,
        stop=lambda: daemon.stop(DRAIN_S),
        start=lambda: installation.runner.ensure(service),
        processes=lambda: _family(daemon.pid)[:1],
        is_running=daemon.is_running,
        is_ready=lambda: daemon.is_running() and service.check.passes(),
        log=daemon.log_file,
    )


def _takes_connections(installation: Installation) -> bool:
    try:
        installation.postgres.wait_ready(0)
    except Exception:  # noqa: BLE001 - whatever the reason, it is not ready
        return False
    return True


def _family(pid: int | None) -> list[psutil.Process]:
    """A process and its children; nothing when it is gone."""
    if pid is None:
        return []
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end(installation: Installation, names: Sequence[str]) -> None:
    """End these processes at once: nobody will miss what they had in hand."""
    with ThreadPoolExecutor(max_workers=max(1, len(names))) as pool:
        list(pool.map(installation.kill, names))
