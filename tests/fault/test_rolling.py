"""Row 21 of the fault table: everything is restarted in good order, one process after the other, under load.

Whoever is told to end finishes what it has in hand within its time; nothing is lost, and nobody who asks is left
without an answer that says what to do.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx2
import pytest
from installation import Installation, installed, latencies
from load import TINY, whole

from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State
from leveret.stack.layout import Options
from leveret.stack.services import DRAIN_S

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

#: What each process is given (LEVERET_DRAIN_S), and a little for what comes before and after.
WITHIN_S = 12.0
TURN = ("conductor-1", "fake-hosts", "conductor-2", "api")
CLIENTS = 4


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    with installed(Options(conductors=2, fake_hosts=3, libvirt=False)) as installation:
        steps = latencies(fetch_image=0.05, make_disk=0.05, define=0.05, start=0.1, remove=0.1)
        installation.reconfigure("fake-hosts", LEVERET_SIMULATE_LATENCY_S=steps, LEVERET_HEARTBEAT_S="1")
        installation.wait_ready()
        yield installation


@dataclass
class Callers:
    """Clients that ask for VMs and change their minds, each with a new connection, until somebody takes the request."""

    house: Installation
    wished: dict[UUID, State] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    odd: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Ask all the while, and finish what was begun."""
        headers = {"Authorization": f"Bearer {self.house.token}", "Connection": "close"}
        done = asyncio.Event()
        async with httpx2.AsyncClient(base_url=self.house.url, headers=headers, timeout=40, trust_env=False) as web:
            tasks = [asyncio.create_task(self._live(web, done, random.Random(n))) for n in range(CLIENTS)]
            tasks.append(asyncio.create_task(self._wait(web, done)))
            try:
                yield
            finally:
                done.set()
                await asyncio.gather(*tasks)

    async def _live(self, web: httpx2.AsyncClient, done: asyncio.Event, chance: random.Random) -> None:
        while not done.is_set():
            vm_id = new_id()
            await self._ask(web, "PUT", f"/v1/vms/{vm_id}", json=TINY)
            self.wished[vm_id] = State.RUNNING
            await asyncio.sleep(chance.uniform(0, 0.5))
            match chance.choice(("delete", "delete", "delete", "stop", "keep")):
                case "delete":
                    await self._ask(web, "DELETE", f"/v1/vms/{vm_id}")
                    self.wished[vm_id] = State.DELETED
                case "stop":
                    await self._ask(web, "POST", f"/v1/vms/{vm_id}/actions/stop", json={"grace_s": 0})
                    self.wished[vm_id] = State.STOPPED
            await self._ask(web, "GET", "/v1/vms?limit=3")

    async def _wait(self, web: httpx2.AsyncClient, done: asyncio.Event) -> None:
        """Wait for what does not come: such a request is always under way."""
        while not done.is_set():
            vm_id = new_id()
            await self._ask(web, "PUT", f"/v1/vms/{vm_id}?wait=stopped&timeout_s=20", json=TINY)
            self.wished[vm_id] = State.DELETED
            await self._ask(web, "DELETE", f"/v1/vms/{vm_id}?wait=deleted&timeout_s=20")

    async def _ask(self, web: httpx2.AsyncClient, verb: str, path: str, **more: Any) -> None:
        """Ask with the same X-Request-Id until it is taken. Nobody listening is an answer too, and so is "later"."""
        more["headers"] = {"X-Request-Id": str(new_id())}
        while True:
            try:
                answer = await web.request(verb, path, **more)
            except httpx2.ConnectError:
                self.answers["nobody listens"] += 1
            except httpx2.TransportError as error:
                self.answers["cut off"] += 1
                self.odd.append(f"{verb} {path}: {error!r}")
            else:
                self.answers[f"{verb} {answer.status_code}"] += 1
                if answer.is_success:
                    return
                if answer.status_code not in {429, 503} or int(answer.headers.get("retry-after", 0)) < 1:
                    self.odd.append(f"{verb} {path}: {answer.status_code} {answer.text}")
                    return
            await asyncio.sleep(0.1)


async def roll(house: Installation, name: str) -> float:
    """Stop a process as a supervisor does, and start it again. How long it took to end, which it must do by itself."""
    began = time.monotonic()
    polite = await asyncio.to_thread(house.runner.daemon(name).stop, DRAIN_S)
    took_s = time.monotonic() - began
    assert polite, f"{name} had to be killed:\n{house.runner.daemon(name).log_tail()}"
    await asyncio.to_thread(house.restart, name)
    await asyncio.to_thread(house.runner.wait_ready, house.services[name], 60)
    return took_s


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
async def test_rolling_restarts_under_load_lose_nothing_and_leave_nobody_without_an_answer(
    house: Installation, rounds: int, record_property: Any
) -> None:
    callers = Callers(house)
    longest = dict.fromkeys(TURN, 0.0)
    async with callers.asking():
        for _ in range(rounds):
            for name in TURN:
                longest[name] = max(longest[name], await roll(house, name))
    print({name: round(seconds, 1) for name, seconds in longest.items()}, dict(callers.answers))
    record_property("longest_drain_s", longest)
    record_property("answers", dict(callers.answers))
    assert max(longest.values()) < WITHIN_S, longest
    assert callers.odd == []
    await whole(house)
    found = {row["id"]: row["state"] for row in await house.query("SELECT id, state FROM vms")}
    assert len(callers.wished) > 5 * rounds
    assert {vm_id: found.get(vm_id) for vm_id in callers.wished} == callers.wished
    told = await house.query("SELECT count(*) AS n FROM events WHERE type = 'accepted' GROUP BY vm_id")
    assert {row["n"] for row in told} == {1}
    assert not await house.query("SELECT FROM events WHERE type IN ('error', 'build_failed')")


async def test_stores_restarted_in_good_order_under_load_cost_waiting_and_nothing_else(house: Installation) -> None:
    callers = Callers(house)
    async with callers.asking():
        await asyncio.to_thread(house.postgres.restart, "fast")
        await asyncio.to_thread(house.rabbit.stop)
        await asyncio.to_thread(house.rabbit.start)
        await asyncio.to_thread(house.wait_ready)
    assert callers.odd == []
    await whole(house)
    found = {row["id"]: row["state"] for row in await house.query("SELECT id, state FROM vms")}
    assert {vm_id: found.get(vm_id) for vm_id in callers.wished} == callers.wished
