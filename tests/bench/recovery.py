"""How soon is it of use again? Each process is killed in turn, and started again at once, as a supervisor would.

Prints one table; `--write` puts it into docs/benchmarks.md. All the while VMs are asked for, ten a second, each once:
what counts is the first that is accepted, and the first that runs. The hosts are simulated; RabbitMQ and Postgres are
real.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import httpx2
import page
from installation import Installation, installed
from load import TINY, whole

from leveret.shared.ids import new_id
from leveret.stack.layout import Options

ASK_EVERY_S = 0.1
GIVE_UP_S = 120.0


@dataclass(frozen=True)
class Victim:
    """What is killed, from when its recovery counts, and how long it may take, in seconds."""

    name: str
    target_s: float
    listens: Callable[[Installation], None] | None = None

    @property
    def since(self) -> str:
        return "SIGKILL" if self.listens is None else "it listens again"


VICTIMS = {
    "API": Victim("api", 2.0),
    "conductor": Victim("conductor-1", 5.0),
    "worker": Victim("fake-hosts", 10.0),
    "Postgres": Victim("postgres", 5.0, lambda house: house.postgres.wait_ready(60)),
    "broker": Victim("rabbitmq", 10.0, lambda house: house.rabbit.wait_ready(60)),
}


class Asker:
    """Asks for a VM every tenth of a second, whether the last one was answered or not."""

    def __init__(self, web: httpx2.AsyncClient) -> None:
        self._web = web
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted_at: float | None = None
        self.running_at: float | None = None
        self._since = float("inf")
        self._ended = asyncio.Event()

    async def ask_until_served(self) -> None:
        """Return when a VM runs that was asked for after `begin`."""
        async with asyncio.timeout(GIVE_UP_S):
            while self.running_at is None:
                task = asyncio.create_task(self._ask(new_id()))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                await asyncio.sleep(ASK_EVERY_S)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def begin(self) -> None:
        """Whoever is asked from now on meets what was killed."""
        self._since = time.monotonic()

    async def _ask(self, vm_id: UUID) -> None:
        asked_at = time.monotonic()
        try:
            answer = await self._web.put(f"/v1/vms/{vm_id}", json=TINY)
            if answer.status_code != 202 or asked_at < self._since:
                return
            if answer.json()["verdict"] == "accepted":
                self.accepted_at = self.accepted_at or time.monotonic()
            while self.running_at is None:
                vm = await self._web.get(f"/v1/vms/{vm_id}?wait=running&timeout_s=20")
                if vm.status_code == 200 and vm.json()["state"] == "running":
                    self.accepted_at = self.accepted_at or time.monotonic()
                    self.running_at = self.running_at or time.monotonic()
        except httpx2.TransportError:
            return


async def recover(house: Installation, web: httpx2.AsyncClient, victim: Victim) -> tuple[float, float]:
    """Seconds until the first request was accepted, and until the first VM ran."""
    await asyncio.to_thread(house.kill, victim.name)
    since = time.monotonic()
    asker = Asker(web)
    asker.begin()
    asking = asyncio.create_task(asker.ask_until_served())
    await asyncio.to_thread(house.restart, victim.name)
    if victim.listens is not None:
        await asyncio.to_thread(victim.listens, house)
        since = time.monotonic()
    await asking
    assert asker.accepted_at is not None
    assert asker.running_at is not None
    return max(0.0, asker.accepted_at - since), max(0.0, asker.running_at - since)


async def measure(house: Installation, times: int) -> str:
    headers = {"Authorization": f"Bearer {house.token}"}
    table = [
        page.machine(),
        "",
        f"| killed, {times} times each | since | wanted | first accepted, median | worst | first VM runs | worst |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for what, victim in VICTIMS.items():
        found = []
        for _ in range(times):
            async with httpx2.AsyncClient(base_url=house.url, headers=headers, timeout=30, trust_env=False) as web:
                found.append(await recover(house, web, victim))
            await whole(house)
            await remove_all(house)
        accepted, running = (sorted(column) for column in zip(*found, strict=True))
        table.append(
            f"| {what} | {victim.since} | {victim.target_s:g} s | {statistics.median(accepted):.1f} s |"
            f" {accepted[-1]:.1f} s | {statistics.median(running):.1f} s | {running[-1]:.1f} s |"
        )
        print(table[-1], flush=True)
    return "\n".join(table)


async def remove_all(house: Installation) -> None:
    async with house.client() as client:
        await asyncio.gather(*[client.delete(vm.id) async for vm in client.list()])
    await whole(house)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="how often each is killed")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    with installed(Options(conductors=1, fake_hosts=4, libvirt=False)) as house:
        room = json.dumps({"start": 0.05})
        house.reconfigure("fake-hosts", LEVERET_SIMULATE_LATENCY_S=room, LEVERET_SIMULATE_VCPUS="1000")
        house.wait_ready()
        text = asyncio.run(measure(house, arguments.times))
    print(text)
    if arguments.write:
        page.write("recovery", text)


if __name__ == "__main__":
    main()
