"""What do long lists and many watchers cost? Ten thousand VMs, read through the real API and Postgres.

Prints one table; `--write` puts it into docs/benchmarks.md. The rows are copied straight into the database: what is
measured is reading.
"""

import argparse
import asyncio
import statistics
import time
from contextlib import aclosing
from uuid import UUID

import httpx2
import page
import psutil
from installation import Installation, installed
from peers import eventually, tiny

from leveret.client import Leveret
from leveret.shared.documents import UpdateVm
from leveret.shared.ids import new_id
from leveret.stack.layout import Options

# In error and without a host: no host misses them.
_MORE_VMS = """
INSERT INTO vms (id, project_id, name, spec, spec_hash, labels, vcpus, memory_mib, disk_gib, image, network, mac,
                 desired, state, problem)
SELECT gen_random_uuid(), project_id, 'copy-' || n, spec, spec_hash, labels, vcpus, memory_mib, disk_gib, image,
       network, mac, desired, 'error', '{"code": "no_capacity", "message": "A copy for the bench."}'
FROM vms, generate_series(1, $2::int) AS n WHERE id = $1
"""
_MORE_EVENTS = """
WITH more AS (
    INSERT INTO events (project_id, vm_id, vm_name, seq, type, state, data)
    SELECT p.id, $1, 'copy', p.last_seq + n, 'progress', 'running', jsonb_build_object('step', 'start')
    FROM projects p, generate_series(1, $2::int) AS n WHERE p.id = 'default'
)
UPDATE projects SET last_seq = last_seq + $2, published_seq = last_seq + $2 WHERE id = 'default'
"""


class Reader:
    """Reads the API as any client does, and looks at what that costs it."""

    def __init__(self, house: Installation) -> None:
        self._headers = {"Authorization": f"Bearer {house.token}"}
        self._url = house.url
        self._api = psutil.Process(house.runner.daemon("api").pid)

    def rss_mib(self) -> float:
        return float(self._api.memory_info().rss) / 2**20

    async def read(self, path: str, until: bytes, **headers: str) -> tuple[float, float, int]:
        """Seconds to the first byte and to the end, and the bytes; a stream ends for us with these bytes."""
        size, first, tail = 0, 0.0, b""
        async with httpx2.AsyncClient(
            base_url=self._url, headers=self._headers | headers, timeout=60, verify=False
        ) as web:
            began = time.perf_counter()
            async with web.stream("GET", path) as answer:
                answer.raise_for_status()
                async for chunk in answer.aiter_bytes():
                    first = first or time.perf_counter() - began
                    size += len(chunk)
                    tail = (tail + chunk)[-4096:]
                    if until and until in tail:
                        break
        return first, time.perf_counter() - began, size


async def lists(reader: Reader, vms: int) -> list[str]:
    rows = []
    await reader.read("/v1/vms?limit=100", b"")
    for limit in (100, 1000, vms):
        before = reader.rss_mib()
        first, last, size = await reader.read(f"/v1/vms?limit={limit}", b"")
        rows.append(
            f"| list of {limit} VMs | {first * 1000:.0f} ms | {last * 1000:.0f} ms | {size / 2**20:.1f} MiB |"
            f" {reader.rss_mib() - before:+.1f} MiB |"
        )
    return rows


async def stream(reader: Reader, events: int, last_seq: int) -> str:
    before = reader.rss_mib()
    mark = f"id: {last_seq}\n".encode()
    first, last, size = await reader.read("/v1/events", mark, Accept="text/event-stream")
    return (
        f"| stream of {events} events | {first * 1000:.0f} ms | {last * 1000:.0f} ms | {size / 2**20:.1f} MiB |"
        f" {reader.rss_mib() - before:+.1f} MiB |"
    )


async def delays(house: Installation, watchers: int, changes: int) -> str:
    """From the change of a VM until each of many watchers heard of it. The clock of both ends is this machine's."""
    heard: dict[int, list[float]] = {}

    async def watch(client: Leveret) -> None:
        async with aclosing(client.watch(after="latest")) as seen:
            async for event in seen:
                heard.setdefault(event.seq, []).append(time.time() - event.at.timestamp())

    async def change(client: Leveret, vm_id: UUID, value: int) -> None:
        await client.update(vm_id, UpdateVm(labels={"change": str(value)}))

    clients = [house.client() for _ in range(watchers)]
    tasks = [asyncio.create_task(watch(client)) for client in clients]
    try:
        async with house.client() as client:
            vm_id = (await client.create(tiny(f"delays-{watchers}"), wait="running")).vm_id
            listening = 0
            while not any(len(times) == watchers for times in heard.values()):
                listening += 1
                await change(client, vm_id, -listening % 2)
                await asyncio.sleep(0.2)
            _, start = await client.events_page(after="latest")
            for n in range(changes):
                await change(client, vm_id, n + 2)
                await asyncio.sleep(0.1)
            _, end = await client.events_page(after="latest")
        wanted = range(start + 1, end + 1)
        await eventually(lambda: all(len(heard.get(seq, ())) == watchers for seq in wanted), within_s=60)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in clients:
            await client.close()
    middle = statistics.median(delay for seq in wanted for delay in heard[seq])
    last = statistics.median(max(heard[seq]) for seq in wanted)
    return f"| {watchers} | {middle * 1000:.0f} ms | {last * 1000:.0f} ms |"


async def measure(house: Installation, vms: int, events: int) -> str:
    async with house.client() as client:
        receipt = await client.create(tiny("original"), vm_id=new_id(), wait="running")
    await house.query(_MORE_VMS, receipt.vm_id, vms - 1)
    reader = Reader(house)
    table = [
        page.machine(),
        "",
        "| what | first byte | all of it | size | memory of the API |",
        "|---|---:|---:|---:|---:|",
        *await lists(reader, vms),
    ]
    await house.query(_MORE_EVENTS, receipt.vm_id, events)
    [row] = await house.query("SELECT last_seq FROM projects WHERE id = 'default'")
    table.append(await stream(reader, events, row["last_seq"]))
    table += [
        "",
        "| watchers of one project | change to watcher, median | to the last of them, median |",
        "|---:|---:|---:|",
    ]
    table += [await delays(house, watchers, 10) for watchers in (1, 10, 100)]
    return "\n".join(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    with installed(Options(fake_hosts=4, libvirt=False)) as house:
        text = asyncio.run(measure(house, arguments.vms, arguments.events))
    print(text)
    if arguments.write:
        page.write("reading", text)


if __name__ == "__main__":
    main()
