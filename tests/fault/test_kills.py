"""Rows 1, 2, 5, 8, 13, 15 and 19 of the fault table together: processes die at any moment.

What was asked for happens all the same, once.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from uuid import UUID

import pytest
from installation import Installation, installed
from peers import eventually, tiny

from leveret.client import Leveret, Missing
from leveret.shared.documents import VmView
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State
from leveret.stack.layout import Options

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    """Two conductors, and four hosts that take their time for every step."""
    with installed(Options(conductors=2, fake_hosts=4, libvirt=False)) as installation:
        slow = json.dumps({"fetch_image": 0.2, "make_disk": 0.2, "define": 0.1, "start": 0.3, "remove": 0.2})
        installation.reconfigure("fake-hosts", LEVERET_SIMULATE_LATENCY_S=slow, LEVERET_HEARTBEAT_S="1")
        installation.wait_ready()
        yield installation


@pytest.fixture
async def client(house: Installation) -> AsyncIterator[Leveret]:
    async with house.client() as client:
        yield client


async def all_in(client: Leveret, ids: list[UUID], state: State, *, within_s: float = 60.0) -> list[VmView]:
    """These VMs, once every one is in this state. One that is queued may not be there yet."""

    async def there() -> list[VmView] | None:
        try:
            vms = [await client.get(vm_id) for vm_id in ids]
        except Missing:
            return None
        return vms if all(vm.state is state for vm in vms) else None

    found: list[VmView] = await eventually(there, within_s=within_s, what=f"all {state}")
    return found


async def remove(house: Installation, client: Leveret, ids: list[UUID]) -> None:
    await asyncio.gather(*(client.delete(vm_id) for vm_id in ids))
    await all_in(client, ids, State.DELETED)
    await house.settle()
    used = await house.query("SELECT sum(vcpus_used + memory_mib_used + disk_gib_used) AS used FROM hosts")
    assert used[0]["used"] == 0


@pytest.mark.parametrize("victim", ["api", "conductor-1", "fake-hosts", "rabbitmq", "postgres"])
async def test_ten_creates_in_flight_survive_the_death_of(victim: str, house: Installation, client: Leveret) -> None:
    ids = [new_id() for _ in range(10)]
    creating = asyncio.gather(*(client.create(tiny(), vm_id=vm_id) for vm_id in ids))
    await eventually(lambda: house.query("SELECT FROM vms WHERE state IN ('building', 'running')"), what="some at work")
    await asyncio.to_thread(house.kill, victim)
    await asyncio.to_thread(house.restart, victim)
    await creating
    vms = await all_in(client, ids, State.RUNNING)
    assert len({vm.name for vm in vms}) == len({vm.address for vm in vms}) == 10
    await house.settle()
    running = await house.query("SELECT vm_id, count(*) FROM events WHERE type = 'scheduled' GROUP BY vm_id")
    assert {row["count"] for row in running if row["vm_id"] in ids} == {1}
    await asyncio.to_thread(house.wait_ready)
    await remove(house, client, ids)


async def test_a_vm_deleted_while_it_is_built_is_gone(house: Installation, client: Leveret) -> None:
    ids = [new_id() for _ in range(5)]
    await asyncio.gather(*(client.create(tiny(), vm_id=vm_id) for vm_id in ids))
    for vm_id, pause_s in zip(ids, (0.0, 0.1, 0.3, 0.5, 0.7), strict=True):
        await asyncio.sleep(pause_s)  # the point in the build, not a wait for anything
        await client.delete(vm_id)
    await all_in(client, ids, State.DELETED)
    await house.settle()


async def test_a_frozen_host_comes_back_to_the_same_vms(house: Installation, client: Leveret) -> None:
    ids = [new_id() for _ in range(4)]
    await asyncio.gather(*(client.create(tiny(), vm_id=vm_id) for vm_id in ids))
    await all_in(client, ids, State.RUNNING)
    house.freeze("fake-hosts")
    try:
        await client.stop(ids[0], grace_s=0)
        await client.delete(ids[1])
        before = await house.query("SELECT id, host_id, token FROM vms WHERE id = ANY($1)", ids)
    finally:
        house.thaw("fake-hosts")
    await all_in(client, ids[:1], State.STOPPED)
    await all_in(client, ids[1:2], State.DELETED)
    after = await house.query("SELECT id, host_id, token FROM vms WHERE id = ANY($1) AND state <> 'deleted'", ids)
    assert {tuple(row) for row in after} <= {tuple(row) for row in before}
    await remove(house, client, ids)
