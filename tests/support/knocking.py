"""Asking for VMs again and again, without ever trying one twice: what a client is told while something is away."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx2
from installation import Installation
from lives import judged
from peers import tiny

from leveret.client import Leveret
from leveret.shared.errors import Code
from leveret.shared.ids import new_id

#: The API says "later" within this time; a machine that does much else may take a little longer.
TOLD_WITHIN_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What was said to one PUT, `took_s` after it was sent at `at` (monotonic)."""

    vm_id: UUID
    status: int
    document: dict[str, Any]
    retry_after_s: int
    at: float
    took_s: float

    @property
    def is_accepted(self) -> bool:
        return self.status == 202 and self.document["verdict"] == "accepted"


class Knocking:
    """Knocks at the API every so often; each knock is a VM of its own."""

    def __init__(self, house: Installation) -> None:
        self.answers: list[Answer] = []
        self._house = house
        self._body = tiny().model_dump_json(exclude_defaults=True)

    async def knock(self, client: httpx2.AsyncClient) -> Answer:
        vm_id, at = new_id(), time.monotonic()
        response = await client.put(f"/v1/vms/{vm_id}", content=self._body)
        retry_after_s = int(response.headers.get("retry-after", 0))
        took_s = time.monotonic() - at
        answer = Answer(vm_id, response.status_code, response.json(), retry_after_s, at, took_s)
        self.answers.append(answer)
        return answer

    @asynccontextmanager
    async def going_on(self, *, every_s: float) -> AsyncIterator[None]:
        """Knock while this lasts; at its end every answer is there."""
        stop = asyncio.Event()
        going = asyncio.create_task(self._go_on(every_s, stop))
        try:
            yield
        finally:
            stop.set()
            await going

    async def _go_on(self, every_s: float, stop: asyncio.Event) -> None:
        headers = {"Authorization": f"Bearer {self._house.token}", "Content-Type": "application/json"}
        async with (
            httpx2.AsyncClient(base_url=self._house.url, headers=headers, timeout=60, trust_env=False) as client,
            asyncio.TaskGroup() as knocks,
        ):
            while not stop.is_set():
                knocks.create_task(self.knock(client))
                await asyncio.sleep(every_s)

    def told_honestly(self, *, slack_s: float = 3.0) -> None:
        """Every answer was a yes, or "later" with a time, said soon enough."""
        for answer in self.answers:
            assert answer.status in {202, 503}, answer
            if answer.status == 503:
                assert answer.document["code"] == Code.UNAVAILABLE
                assert answer.retry_after_s > 0, answer
                assert answer.took_s < TOLD_WITHIN_S + slack_s, answer

    async def lost(self) -> set[UUID]:
        """What the API said yes to and nobody knows of."""
        rows = await self._house.query("SELECT id FROM vms UNION ALL SELECT vm_id FROM rejections")
        return {answer.vm_id for answer in self.answers if answer.status == 202} - {row["id"] for row in rows}

    async def insist(self, client: Leveret) -> list[UUID]:
        """Ask again for everything, under the same ids, until it is accepted."""
        await asyncio.gather(*(judged(client.create(tiny(), vm_id=answer.vm_id)) for answer in self.answers))
        return [answer.vm_id for answer in self.answers]

    def first_accepted_after(self, at: float) -> float | None:
        """How long after this moment the first knock was accepted; None if none was."""
        found = [answer.at + answer.took_s - at for answer in self.answers if answer.is_accepted]
        return min((after_s for after_s in found if after_s > 0), default=None)

    def slowest_refusal_s(self) -> float:
        return max((answer.took_s for answer in self.answers if answer.status == 503), default=0.0)
