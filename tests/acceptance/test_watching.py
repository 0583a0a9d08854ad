"""A watch that never misses: cut off again and again, it tells every event once and in order."""

import asyncio
import random
from contextlib import aclosing
from itertools import accumulate
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from installation import Installation
from peers import eventually, tiny
from proxy import Proxy

from leveret.client import Leveret
from leveret.shared.documents import CreateToken, EventView
from leveret.shared.ids import new_id

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]

VMS = 1000
CUTS = 50


async def test_a_watcher_cut_off_fifty_times_sees_every_event_of_a_thousand_vms_once_and_in_order(
    house: Installation,
) -> None:
    async with house.client() as admin:
        await admin.create_project("watched")
        token = (await admin.create_token("watched", CreateToken(name="watcher"))).token
    proxy = Proxy(urlsplit(house.url).port or 0)
    await proxy.open()
    seen: list[EventView] = []
    dice = random.Random(7)
    cut_after = list(accumulate(dice.randrange(20, 100) for _ in range(CUTS)))

    async def watch() -> None:
        async with Leveret(f"http://127.0.0.1:{proxy.port}", token) as far, aclosing(far.watch()) as events:
            async for event in events:
                seen.append(event)
                if cut_after and len(seen) >= cut_after[0]:
                    cut_after.pop(0)
                    proxy.cut()

    watcher = asyncio.create_task(watch())
    try:
        async with Leveret(house.url, token, retry_for_s=60) as near:
            ids = [new_id() for _ in range(VMS)]
            in_flight = asyncio.Semaphore(50)

            async def live(vm_id: UUID) -> None:
                async with in_flight:
                    await near.create(tiny(), vm_id=vm_id, wait="running", timeout_s=60)
                    await near.delete(vm_id, wait=True, timeout_s=60)

            await asyncio.gather(*(live(vm_id) for vm_id in ids))
            await house.settle()
            rows = await house.query("SELECT seq, vm_id, type FROM events WHERE project_id = 'watched' ORDER BY seq")
            await eventually(lambda: len(seen) >= len(rows), within_s=30, what="the watcher to catch up")
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await proxy.close()
    assert not cut_after, "every cut was made"
    assert [event.seq for event in seen] == list(range(1, len(rows) + 1))
    assert [(event.vm_id, event.type) for event in seen] == [(row["vm_id"], row["type"]) for row in rows]
    assert len({event.vm_id for event in seen if event.vm_id}) == VMS
