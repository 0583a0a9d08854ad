"""Clients that ask all the time, remember what they were told, and hold Leveret to it."""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from httpx2 import AsyncClient, Response, TransportError
from installation import Installation
from invariants import broken_in, checked
from peers import eventually

from leveret.shared.ids import new_id

TINY = {"image": {"name": "tiny"}, "vcpus": 1, "memory_mib": 128, "disk_gib": 1}


@dataclass
class Life:
    """What was asked of one VM, and answered: `accepted`, `queued`, or None when nobody knows whether it was queued."""

    created: str | None = None
    deleted: str | None = None
    is_delete_asked: bool = False


@dataclass
class Load:
    """Creates, deletes and reads, one after the other, several at a time."""

    house: Installation
    chance: random.Random
    lives: dict[UUID, Life] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    odd: list[str] = field(default_factory=list)
    #: Whether the API itself is restarted meanwhile: then some get no answer at all.
    is_cut_off: bool = False

    @property
    def told(self) -> list[UUID]:
        """The VMs of which somebody was told that they are accepted or queued."""
        return [vm_id for vm_id, life in self.lives.items() if life.created]

    @asynccontextmanager
    async def going_on(self, *, clients: int = 3, pause_s: float = 0.1) -> AsyncIterator[None]:
        """Ask all the while."""
        headers = {"Authorization": f"Bearer {self.house.token}"}
        async with AsyncClient(base_url=self.house.url, headers=headers, timeout=30, trust_env=False) as client:
            asking = [asyncio.create_task(self._ask(client, pause_s)) for _ in range(clients)]
            try:
                yield
            finally:
                for task in asking:
                    task.cancel()
                ends = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends

    async def _ask(self, client: AsyncClient, pause_s: float) -> None:
        mine: list[UUID] = []
        while True:
            vm_id = new_id()
            life = self.lives[vm_id] = Life()
            life.created = await self._send(client, "PUT", f"/v1/vms/{vm_id}", json=TINY)
            mine.append(vm_id)
            await self._send(client, "GET", "/v1/vms?limit=5")
            if len(mine) > 3 and self.chance.random() < 0.7:
                victim = mine.pop(self.chance.randrange(len(mine)))
                self.lives[victim].is_delete_asked = True
                self.lives[victim].deleted = await self._send(client, "DELETE", f"/v1/vms/{victim}")
            await asyncio.sleep(self.chance.uniform(0, 2 * pause_s))

    async def _send(self, client: AsyncClient, verb: str, path: str, **more: Any) -> str | None:
        """What was told of a write, if anything was."""
        began = time.monotonic()
        try:
            answer: Response = await client.request(verb, path, **more)
        except TransportError as error:
            if not self.is_cut_off:
                self.odd.append(f"{verb}: {error!r}")
            return None
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        self.statuses[f"{verb} {answer.status_code}"] += 1
        if answer.status_code == 503 and int(answer.headers.get("retry-after", 0)) < 1:
            self.odd.append(f"{verb}: 503 without Retry-After")
        if answer.status_code == 202:
            return str(answer.json()["verdict"])
        if answer.status_code not in {200, 503} and not (verb == "DELETE" and answer.status_code == 404):
            self.odd.append(f"{verb}: {answer.status_code} {answer.text}")
        return "gone" if answer.status_code == 404 else None

    async def caught_up(self, *, within_s: float) -> float:
        """Wait until every request of which somebody was told is carried out; how long that took."""
        began = time.monotonic()

        async def judged() -> bool:
            states = {row["id"]: row["state"] for row in await self.house.query("SELECT id, state FROM vms")}
            unmade = await self.house.query("SELECT vm_id FROM rejections UNION SELECT vm_id FROM tombstones")
            known = states.keys() | {row["vm_id"] for row in unmade}
            ending = [states.get(vm_id, "deleted") for vm_id, life in self.lives.items() if life.deleted]
            return known.issuperset(self.told) and {"deleting", "deleted"}.issuperset(ending)

        await eventually(judged, within_s=within_s, what="everything that was queued is judged")
        return time.monotonic() - began

    async def is_kept(self) -> None:
        """All is done and well, everybody got what was told, and nothing came twice."""
        assert not self.odd
        await self.caught_up(within_s=90)
        await whole(self.house)
        rows = {row["id"]: row for row in await self.house.query("SELECT id, state, problem FROM vms")}
        refused = {
            row["vm_id"]: row["code"]
            for row in await self.house.query("SELECT vm_id, problem->>'code' AS code FROM rejections")
        }
        wrong = [
            (vm_id, life, rows.get(vm_id), refused.get(vm_id))
            for vm_id, life in self.lives.items()
            if not _is_kept(life, rows.get(vm_id), refused.get(vm_id))
        ]
        assert not wrong, f"{len(wrong)} of {len(self.lives)}: {wrong[:5]}"
        counts = await self.house.query("SELECT count(*) AS n FROM events WHERE type = 'accepted' GROUP BY vm_id")
        assert {row["n"] for row in counts} <= {1}


def _is_kept(life: Life, row: Any, refused: str | None) -> bool:
    if life.created == "accepted":
        if row is None or refused is not None:
            return False
    elif life.created == "queued" and row is None:
        return refused in {"no_capacity", "vm_deleted"}
    if life.deleted:
        return row is None or row["state"] == "deleted"
    if row is None or (life.is_delete_asked and row["state"] == "deleted"):
        return True
    return bool(row["state"] == "running")


async def redelivered(house: Installation) -> int:
    """How many messages the broker has delivered more than once since it started."""
    counters = await asyncio.to_thread(house.rabbit.ctl, "eval", "rabbit_global_counters:overview().")
    return sum(map(int, re.findall(r"messages_redelivered_total => (\d+)", counters)))


async def whole(house: Installation, *, within_s: float = 120.0) -> None:
    """At rest, with every invariant kept, as the installation itself sees it too, and no dead letters."""
    await asyncio.to_thread(house.wait_ready)
    await house.settle(within_s=within_s)
    async with house.client() as client:
        assert broken_in(await checked(client)) == {}


def paused(house: Installation) -> int:
    """How often the conductors have said that they wait for Postgres."""
    logs = [house.runner.daemon(name).log_file for name in house.services if name.startswith("conductor")]
    return sum(log.read_text().count("consumer.paused") for log in logs)
