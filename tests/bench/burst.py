"""How fast is Leveret? A burst of VMs on simulated hosts, through the real API, RabbitMQ and Postgres.

Prints one table; `--write` puts it into docs/benchmarks.md. Every process that works on the burst is on this machine,
the asking client included, so the CPU figures matter more than the wall times.
"""

import argparse
import asyncio
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import UUID

import asyncpg
import page
import psutil
from invariants import violations

from leveret.client import Leveret
from leveret.shared.documents import CreateVm, ImageByName
from leveret.shared.ids import new_id
from leveret.stack.layout import Layout, Options
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit
from leveret.stack.services import Runner
from leveret.stack.up import local_database_url, up

IN_FLIGHT = 100


class Narrator:
    """Says what is being started."""

    def doing(self, what: str) -> None:
        print(f"  ... {what}", file=sys.stderr)

    def done(self, name: str, note: str = "") -> None:
        print(f"  {name} {note}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Burst:
    """What one burst took. Times in seconds, from sending the request to hearing of `running`."""

    vms: int
    wall_s: float
    accepted_s: list[float]
    running_s: list[float]
    cpu_s: dict[str, float]


def cpu_of(pids: Iterable[int]) -> float:
    """User and system CPU seconds of these processes and their children, also of children that ended."""
    total = 0.0
    for pid in pids:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            try:
                times = one.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
    return total


def meters(layout: Layout) -> dict[str, Callable[[], float]]:
    """The CPU clock of each part."""
    runner = Runner(layout.services)
    pids: dict[str, list[int]] = {}
    for name in runner.known():
        pids.setdefault(re.sub(r"-\d+$", "", name), []).append(runner.daemon(name).pid or 0)
    pids["rabbitmq"] = [Rabbit(layout.rabbitmq).pid or 0]
    pids["postgres"] = [Postgres(layout.postgres).pid or 0]
    pids["this client"] = [os.getpid()]
    return {name: partial(cpu_of, owned) for name, owned in sorted(pids.items())}


async def watch(client: Leveret, after: int, count: int, seen: dict[UUID, float]) -> None:
    """Note when each VM is heard to run."""
    async for event in client.events(after=after, follow=True):
        if event.type == "running" and event.vm_id is not None:
            seen[event.vm_id] = time.monotonic()
            if len(seen) == count:
                return


async def burst(client: Leveret, count: int, in_flight: int, clocks: dict[str, Callable[[], float]]) -> Burst:
    """Ask for `count` VMs, `in_flight` at a time, and wait until every one runs."""
    asked: dict[UUID, float] = {}
    accepted: list[float] = []
    seen: dict[UUID, float] = {}
    slots = asyncio.Semaphore(in_flight)
    spec = CreateVm(vcpus=1, memory_mib=512, disk_gib=1, image=ImageByName(name="bench"))

    async def one() -> None:
        async with slots:
            vm_id = new_id()
            asked[vm_id] = time.monotonic()
            await client.create(spec, vm_id=vm_id)
            accepted.append(time.monotonic() - asked[vm_id])

    _, after = await client.events_page(after="latest")
    before = {name: clock() for name, clock in clocks.items()}
    began = time.monotonic()
    watcher = asyncio.create_task(watch(client, after, count, seen))
    await asyncio.gather(*(one() for _ in range(count)))
    async with asyncio.timeout(300):
        await watcher
    wall_s = time.monotonic() - began
    cpu_s = {name: clock() - before[name] for name, clock in clocks.items()}
    return Burst(count, wall_s, accepted, [seen[vm_id] - at for vm_id, at in asked.items()], cpu_s)


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def table(hosts: int, conductors: int, busy: Burst, idle: Burst) -> str:
    """The figures, as Markdown."""
    total = sum(busy.cpu_s.values())
    rows = [
        f"{busy.vms} VMs on {hosts} simulated hosts, {conductors} conductor(s), {IN_FLIGHT} requests in flight;",
        page.machine(),
        "",
        "| figure | burst | one at a time |",
        "|---|---:|---:|",
        f"| VMs/s, request to `running` | {busy.vms / busy.wall_s:.0f} | {idle.vms / idle.wall_s:.0f} |",
    ]
    for name, times in (
        ("accepted", (busy.accepted_s, idle.accepted_s)),
        ("running", (busy.running_s, idle.running_s)),
    ):
        for percent in (50, 99):
            cells = " | ".join(f"{percentile(values, percent) * 1000:.1f} ms" for values in times)
            rows.append(f"| request to {name}, p{percent} | {cells} |")
    rows += ["", "| CPU per VM in the burst | ms | share |", "|---|---:|---:|"]
    for name, cpu in sorted(busy.cpu_s.items(), key=lambda item: -item[1]):
        rows.append(f"| {name} | {cpu / busy.vms * 1000:.2f} | {cpu / total:.0%} |")
    rows.append(f"| **all** | **{total / busy.vms * 1000:.2f}** | |")
    return "\n".join(rows)


async def measure(layout: Layout, url: str, token: str, arguments: argparse.Namespace) -> str:
    database = await asyncpg.connect(local_database_url(layout))
    try:
        await database.execute(
            "INSERT INTO images VALUES ('bench', 'file:///bench', $1, 'raw') ON CONFLICT DO NOTHING", "0" * 64
        )
        clocks = meters(layout)
        async with Leveret(url, token) as client:
            await burst(client, 20, 10, clocks)  # warm up: connections, statements, caches
            idle = await burst(client, arguments.single, 1, clocks)
            busy = await burst(client, arguments.vms, IN_FLIGHT, clocks)
        broken = await violations(database)
        assert not broken, broken
    finally:
        await database.close()
    return table(arguments.hosts, arguments.conductors, busy, idle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=1000)
    parser.add_argument("--hosts", type=int, default=100)
    parser.add_argument("--conductors", type=int, default=1)
    parser.add_argument("--single", type=int, default=50, help="VMs asked for one at a time")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="leveret-bench-"))
    root.chmod(0o755)
    layout = Layout(root)
    try:
        options = Options(conductors=arguments.conductors, fake_hosts=arguments.hosts, libvirt=False)
        summary = up(layout, options, Narrator())
        text = asyncio.run(measure(layout, summary.url, summary.token, arguments))
        print(text)
        if arguments.write:
            page.write("burst", text)
    finally:
        runner = Runner(layout.services)
        runner.stop(runner.known(), lambda name: None)
        Rabbit(layout.rabbitmq).destroy()
        Postgres(layout.postgres).destroy()
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
