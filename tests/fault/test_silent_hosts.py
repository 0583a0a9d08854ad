"""Row 8 of the fault table: a host falls silent, and comes back.

A worker that is frozen with SIGSTOP looks to everybody else like a host that was cut off, or whose machine hangs: it is
suspected, and nothing of it is destroyed.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aio_pika
import httpx2
import psutil
import pytest
from aio_pika.abc import AbstractIncomingMessage
from installation import Installation, installed, latencies
from invariants import broken_in, checked
from peers import eventually, tiny

from leveret.client import ApiError, Leveret
from leveret.conductor.settings import ConductorSettings
from leveret.shared import topology
from leveret.shared.documents import HostView, Placement
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State
from leveret.stack.layout import Options
from leveret.stack.ports import free_port

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

LEASE_S = 4.0
FAR, NEAR = 2, 2
IN_FAR = Placement(zones=("far",))


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    """Two hosts near by, and two far ones in a process of their own."""
    with installed(Options(conductors=1, fake_hosts=NEAR, libvirt=False)) as installation:
        quick = {"LEVERET_HEARTBEAT_S": "0.5", "LEVERET_SIMULATE_LATENCY_S": latencies(start=0.5)}
        installation.reconfigure("conductor-1", LEVERET_LEASE_S=str(LEASE_S), LEVERET_RESEND_S="1")
        installation.reconfigure("fake-hosts", LEVERET_ZONE="near", **quick)
        metrics = str(free_port(set()))
        installation.add_fake_hosts("far-hosts", FAR, LEVERET_ZONE="far", LEVERET_METRICS_PORT=metrics, **quick)
        installation.wait_ready()
        yield installation


@pytest.fixture
async def client(house: Installation) -> AsyncIterator[Leveret]:
    async with house.client() as client:
        await eventually(lambda: all_up(client), within_s=60, what="every host up")
        yield client


async def far(client: Leveret) -> list[HostView]:
    return [host for host in await client.hosts() if host.zone == "far"]


async def taken(client: Leveret) -> list[tuple[str, int, int, int]]:
    """What is placed on each of the far hosts."""
    return [(one.name, one.vcpus_used, one.memory_mib_used, one.disk_gib_used) for one in await far(client)]


async def all_up(client: Leveret) -> bool:
    hosts = await client.hosts()
    return len(hosts) == FAR + NEAR and all(host.state == "up" for host in hosts)


async def far_silent(client: Leveret) -> bool:
    return {host.state for host in await far(client)} == {"silent"}


@contextlib.asynccontextmanager
async def silent(house: Installation, client: Leveret) -> AsyncIterator[None]:
    """The far hosts are frozen, and that was noticed."""
    house.freeze("far-hosts")
    try:
        await eventually(lambda: far_silent(client), within_s=60, what="the far hosts are suspected")
        yield
    finally:
        if house.runner.daemon("far-hosts").is_running():
            house.thaw("far-hosts")


async def made(client: Leveret, count: int, state: State = State.RUNNING) -> list[UUID]:
    """VMs on the far hosts, in this state."""
    ids = [new_id() for _ in range(count)]
    await asyncio.gather(*(client.create(tiny(placement=IN_FAR), vm_id=vm_id) for vm_id in ids))
    await become(client, state, *ids)
    return ids


async def become(client: Leveret, state: State, *ids: UUID) -> None:
    async def there() -> bool:
        return all([(await client.get(vm_id)).state is state for vm_id in ids])

    await eventually(there, within_s=60, what=f"{len(ids)} VMs {state}")


async def placements(house: Installation, ids: list[UUID]) -> dict[UUID, tuple[Any, ...]]:
    """Where these VMs stand and in which state, by their rows."""
    rows = await house.query("SELECT id, host_id, token, state FROM vms WHERE id = ANY($1)", ids)
    return {row["id"]: (row["host_id"], row["token"], row["state"]) for row in rows}


async def clear(house: Installation, client: Leveret) -> None:
    """Everything is deleted, at rest, and as it should be on the hosts too."""
    living = [vm.id async for vm in client.list()]
    await asyncio.gather(*(client.delete(vm_id) for vm_id in living))
    await become(client, State.DELETED, *living)
    await house.settle()
    assert broken_in(await checked(client)) == {}
    used = await house.query("SELECT sum(vcpus_used + memory_mib_used + disk_gib_used) AS used FROM hosts")
    assert used[0]["used"] == 0


async def test_a_frozen_host_gets_no_work_and_loses_nothing_and_goes_on_when_it_is_back(
    house: Installation, client: Leveret, record_property: Any
) -> None:
    ids = await made(client, 4)
    building = new_id()
    await client.create(tiny(placement=IN_FAR), vm_id=building)
    await become(client, State.BUILDING, building)
    async with silent(house, client):
        before = await placements(house, [*ids, building])
        used = await taken(client)

        with pytest.raises(ApiError) as refused:
            await client.create(tiny(placement=IN_FAR))
        assert refused.value.code == Code.NO_CAPACITY
        assert refused.value.details["constraints"] == {"state": FAR, "zone": NEAR}
        assert all("no heartbeat since" in (host.state_reason or "") for host in await far(client))

        elsewhere = [(await client.create(tiny())).vm_id for _ in range(6)]
        await become(client, State.RUNNING, *elsewhere)
        near = {host.id for host in await client.hosts() if host.zone == "near"}
        assert {place[0] for place in (await placements(house, elsewhere)).values()} <= near

        await client.stop(ids[0], grace_s=0)
        await client.delete(ids[1])
        await client.reboot(ids[2])
        wished = await placements(house, [*ids, building])
        assert {vm_id: place[:2] for vm_id, place in wished.items()} == {
            vm_id: place[:2] for vm_id, place in before.items()
        }
        assert [wished[vm_id][2] for vm_id in (*ids, building)] == [
            *("running", "deleting", "running", "running"),
            before[building][2],
        ]
        assert await taken(client) == used, "nothing is given away"
    began = asyncio.get_running_loop().time()
    await eventually(lambda: all_up(client), within_s=60, what="every host up")
    record_property("recovery_s", asyncio.get_running_loop().time() - began)
    await become(client, State.STOPPED, ids[0])
    await become(client, State.DELETED, ids[1])
    await become(client, State.RUNNING, ids[2], ids[3], building)
    after = await placements(house, [*ids, building])
    del after[ids[1]]
    assert {vm_id: place[:2] for vm_id, place in after.items()} == {vm_id: before[vm_id][:2] for vm_id in after}
    await made(client, 4)  # it takes work again
    scheduled = await house.query("SELECT vm_id, count(*) AS n FROM events WHERE type = 'scheduled' GROUP BY vm_id")
    assert {row["n"] for row in scheduled} == {1}
    assert not await house.query("SELECT FROM events WHERE type IN ('error', 'build_failed')")
    await clear(house, client)


async def test_commands_that_come_late_change_nothing(house: Installation, client: Leveret) -> None:
    """Old wishes are told by their generation, and those to a worker that was killed in its sleep by its epoch."""
    keys = [str(host.id) for host in await far(client)]
    async with hearing(house, topology.HOSTS.name, *keys) as heard:
        ids = await made(client, 4)
        before = await placements(house, ids)
        async with silent(house, client):
            await client.stop(ids[0], grace_s=0)
            await client.delete(ids[1])
            await asyncio.to_thread(house.kill, "far-hosts")
        await asyncio.to_thread(house.restart, "far-hosts")
        await eventually(lambda: all_up(client), within_s=60, what="every host up")
        await become(client, State.STOPPED, ids[0])
        await become(client, State.DELETED, ids[1])
        await become(client, State.RUNNING, ids[2], ids[3])
        await client.start(ids[0])
        await become(client, State.RUNNING, ids[0])
        [gone] = await made(client, 1)
        await client.delete(gone)
        await become(client, State.DELETED, gone)
        await house.settle()
        commands = [one for one in await heard() if one.type == "host.desired"]
    epochs = {json.loads(one.body)["host_epoch"] for one in commands}
    assert len(epochs) == 2, "the successor was told anew"
    assert len({one.body for one in commands}) >= 6
    await unchanged(house, client, [*ids, gone], Saying("leveret-conductor", topology.HOSTS.name, commands))
    old = sum(json.loads(one.body)["host_epoch"] == min(epochs) for one in commands)
    await eventually(lambda: counted(house, "other_epoch") >= 3 * old, within_s=30, what="those of old are passed over")
    # One about a VM that was removed is late, or stale as long as its host still makes sure that it is gone.
    await eventually(lambda: counted(house, "stale") + counted(house, "late") >= 6, within_s=30, what="and late ones")
    after = await placements(house, [ids[0], *ids[2:]])
    assert {vm_id: place[:2] for vm_id, place in after.items()} == {vm_id: before[vm_id][:2] for vm_id in after}
    await clear(house, client)


async def test_reports_that_come_late_change_nothing(house: Installation, client: Leveret) -> None:
    """All that hosts said of VMs that came, went and live on, is said once more: thrice, and backwards."""
    async with hearing(house, topology.REPORTS.name, "report") as heard:
        ids = await made(client, 3)
        await client.stop(ids[0], grace_s=0)
        await become(client, State.STOPPED, ids[0])
        await client.delete(ids[1])
        await become(client, State.DELETED, ids[1])
        await house.settle()
        reports = await heard()
    assert len(reports) >= 6
    await unchanged(house, client, ids, Saying("leveret-compute", topology.REPORTS.name, reports))
    await clear(house, client)


@dataclass(frozen=True)
class Saying:
    """What was said, by whom and where to."""

    user: str
    exchange: str
    messages: Sequence[AbstractIncomingMessage]

    async def again(self, house: Installation) -> None:
        """Say it once more: thrice, and backwards."""
        connection = await aio_pika.connect(house.rabbit.url_of(self.user))
        async with connection:
            exchange = await (await connection.channel()).get_exchange(self.exchange, ensure=False)
            for one in (one for one in reversed(self.messages) for _ in range(3)):
                message = aio_pika.Message(one.body, type=one.type, content_type=one.content_type, user_id=one.user_id)
                await exchange.publish(message, one.routing_key or "")


async def unchanged(house: Installation, client: Leveret, ids: list[UUID], saying: Saying) -> None:
    """No row and no event is another one when all this was said once more, and read."""
    before, events = await placements(house, ids), await house.query("SELECT count(*) FROM events")
    await saying.again(house)
    # What is created afterwards goes the same way, behind what was said.
    last = await made(client, 2 * FAR)
    await house.settle()
    assert await placements(house, ids) == before
    [news] = await house.query("SELECT count(*) FROM events WHERE vm_id <> ALL($1)", last)
    assert [news] == events


def counted(house: Installation, outcome: str) -> int:
    """Commands of the far hosts with this outcome."""
    port = house.services["far-hosts"].env["LEVERET_METRICS_PORT"]
    text = httpx2.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    found = re.search(rf'^leveret_host_commands_total{{outcome="{outcome}"}} (\d+)', text, re.MULTILINE)
    return int(found[1]) if found else 0


@contextlib.asynccontextmanager
async def hearing(
    house: Installation, exchange: str, *keys: str
) -> AsyncIterator[Callable[[], Awaitable[list[AbstractIncomingMessage]]]]:
    """Hear all that is published there; what is given tells it, in its order."""
    connection = await aio_pika.connect(house.rabbit.url)
    async with connection:
        ear = await (await connection.channel()).declare_queue(exclusive=True)
        for key in keys:
            await ear.bind(exchange, key)

        async def heard() -> list[AbstractIncomingMessage]:
            messages: list[AbstractIncomingMessage] = []
            while (message := await ear.get(fail=False, no_ack=True)) is not None:
                messages.append(message)
            return messages

        yield heard


@pytest.mark.parametrize("who", ["rabbitmq", "postgres", "conductor-1", "an alarm"])
async def test_a_conductor_that_was_deaf_itself_suspects_nobody(house: Installation, client: Leveret, who: str) -> None:
    """Whatever hung between a host and the conductor's hearing, for longer than the lease: it was not the host."""
    [vm_id] = await made(client, 1)
    suspected = suspicions(house)
    with frozen(house, who):
        await asyncio.sleep(LEASE_S + 2)  # as long as it takes to miss a lease
    receipts = await asyncio.gather(*(client.create(tiny(placement=IN_FAR)) for _ in range(3)))
    await become(client, State.RUNNING, vm_id, *(receipt.vm_id for receipt in receipts))
    await eventually(lambda: all_up(client), within_s=60, what="every host up")
    assert suspicions(house) == suspected
    await clear(house, client)


@contextlib.contextmanager
def frozen(house: Installation, who: str) -> Iterator[None]:
    """A process and its children do not move; or the broker reads nothing from anybody, since it has no memory left."""
    if who == "an alarm":
        with without_memory(house):
            yield
        return
    pid = {"rabbitmq": house.rabbit.pid, "postgres": house.postgres.pid}.get(who) or house.runner.daemon(who).pid
    assert pid is not None
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        yield
    finally:
        for process in family:
            process.resume()


@contextlib.contextmanager
def without_memory(house: Installation) -> Iterator[None]:
    house.rabbit.ctl("eval", "vm_memory_monitor:set_vm_memory_high_watermark(0.0).")
    try:
        yield
    finally:
        house.rabbit.ctl("eval", "vm_memory_monitor:set_vm_memory_high_watermark(0.4).")


def suspicions(house: Installation) -> int:
    """How often conductors have said that a host is silent."""
    logs = Path(house.layout.services).glob("conductor-*.log")
    return sum('"host.silent"' in line for log in logs for line in log.read_text().splitlines())


@pytest.fixture
def pair() -> Iterator[Installation]:
    """Two conductors with the usual lease."""
    with installed(Options(conductors=2, fake_hosts=4, libvirt=False)) as installation:
        yield installation


@pytest.mark.slow
async def test_no_host_is_suspected_because_one_of_two_conductors_hangs(pair: Installation) -> None:
    """It has every second heartbeat in hand until the broker gives them to the other."""
    lease_s = ConductorSettings.model_fields["lease_s"].default
    await asyncio.sleep(lease_s)  # until then the other one would not dare
    with frozen(pair, "conductor-2"):
        await asyncio.sleep(2 * lease_s)
        assert suspicions(pair) == 0
    await pair.settle()
