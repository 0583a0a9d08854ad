"""Rows 10 and 11 of the fault table: messages that are doubled, held back, overtaken and lost; queues that are deleted.

Every process of the installation speaks to the broker through a man in the middle.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from functools import partial
from operator import methodcaller
from typing import Any
from uuid import UUID

import aio_pika
import aiormq
import pytest
import pytest_asyncio
from installation import Installation, installed, latencies
from lives import Lives, judged
from peers import eventually, tiny
from shuffler import Odds, Shuffler

from leveret.client import ApiError, Leveret
from leveret.client.amqp import LeveretAmqp
from leveret.client.errors import EventGap
from leveret.shared import topology
from leveret.shared.documents import CreateVm
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State
from leveret.shared.messages import TYPE_OF, CloudEvent, DesiredVm, Heartbeat, HostReport, Verdict
from leveret.stack.broker_user import VHOST
from leveret.stack.errors import StackError
from leveret.stack.layout import Options

# The proxy lives in the loop of the module: the processes need it from one test to the next.
pytestmark = [pytest.mark.fault, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

CONDUCTORS = ("conductor-1", "conductor-2")
HOSTS = 4
#: A misdeed every so many seconds.
EVERY_S = 0.5


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    with installed(Options(conductors=2, fake_hosts=HOSTS, libvirt=False)) as installation:
        yield installation


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shuffler(house: Installation) -> AsyncIterator[Shuffler]:
    """The broker, as every process reaches it."""
    shuffler = Shuffler(house.rabbit.port)
    await shuffler.open()
    quick = {
        "fake-hosts": {"LEVERET_HEARTBEAT_S": "1", "LEVERET_SIMULATE_LATENCY_S": latencies(start=0.3, remove=0.2)},
        **{name: {"LEVERET_RESEND_S": "2"} for name in CONDUCTORS},
    }
    for name, service in list(house.services.items()):
        url = shuffler.through(service.env["LEVERET_AMQP_URL"])
        await asyncio.to_thread(house.reconfigure, name, LEVERET_AMQP_URL=url, **quick.get(name, {}))
    await asyncio.to_thread(house.wait_ready)
    yield shuffler
    await shuffler.close()


@pytest_asyncio.fixture(loop_scope="module")
async def client(house: Installation, shuffler: Shuffler) -> AsyncIterator[Leveret]:
    async with house.client(retry_for_s=180) as client:
        await eventually(lambda: all_up(client), within_s=60, what="every host up")
        yield client


async def all_up(client: Leveret) -> bool:
    return [host.state for host in await client.hosts()] == ["up"] * HOSTS


class Watcher:
    """An AMQP client that keeps the numbers of the events it was given, and of those it was told it missed."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.missed: set[int] = set()

    async def watch(self, url: str) -> None:
        async with (
            LeveretAmqp(url, "default", waits=False) as leveret,
            aclosing(leveret.watch(on_gap=self._on_gap)) as events,
        ):
            async for event in events:
                self.seen.append(event.seq)

    def heard_of(self, last: int) -> bool:
        first = min([*self.seen, *self.missed], default=last)
        return set(range(first, last + 1)) <= {*self.seen, *self.missed}

    def _on_gap(self, gap: EventGap) -> None:
        self.missed |= set(range(gap.after + 1, gap.until + 1))


@pytest.mark.parametrize(
    ("lives", "horizon_s"), [(16, 5.0), pytest.param(150, 120.0, marks=pytest.mark.slow)], ids=["5s", "120s"]
)
async def test_whatever_becomes_of_messages_the_end_is_the_same(
    lives: int, horizon_s: float, house: Installation, client: Leveret, shuffler: Shuffler
) -> None:
    """Row 10: requests, verdicts, commands, reports, heartbeats and events, doubled, held back, overtaken, lost."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    shuffler.shuffle(Odds(horizon_s=horizon_s), seed)
    world = Lives(house, client, seed)
    watcher = Watcher()
    url = await asyncio.to_thread(house.rabbit.create_client, "ada", "default")
    watching = asyncio.create_task(watcher.watch(url))
    try:
        await asyncio.gather(
            world.live_many(lives, within_s=horizon_s), *(delete_and_create(world) for _ in range(lives // 4))
        )
    finally:
        shuffler.shuffling = False
    await eventually(lambda: not shuffler.on_the_way, within_s=horizon_s + 60, what="everything has arrived")
    print(f"lost/held/doubled: {shuffler.report()}")
    await world.end_well()
    events = await house.query("SELECT max(seq) AS last FROM events WHERE project_id = 'default'")
    await eventually(lambda: watcher.heard_of(events[0]["last"]), within_s=60, what="the watcher heard of everything")
    watching.cancel()
    assert watcher.seen == sorted(set(watcher.seen)), "each once, and in order"
    assert watcher.missed.isdisjoint(watcher.seen)
    for message in (CreateVm, Verdict, DesiredVm, HostReport, Heartbeat, CloudEvent):
        kind = TYPE_OF[message]
        assert shuffler.lost[kind] + shuffler.doubled[kind], f"no {kind} was touched"
    await world.remove_all()


async def delete_and_create(world: Lives) -> None:
    """Ask for both at once: whichever is heard first, the VM does not live."""
    vm_id = new_id()

    async def ask(asking: Any, refusal: str) -> None:
        await asyncio.sleep(world.chance.random())
        try:
            await judged(asking)
        except ApiError as error:
            assert error.code == refusal  # noqa: PT017

    await asyncio.gather(
        ask(world.client.create(tiny(), vm_id=vm_id), Code.VM_DELETED),
        ask(world.client.delete(vm_id), Code.VM_NOT_FOUND),
    )
    world.unwished.add(vm_id)


Deed = Callable[[aiormq.abc.AbstractChannel], Awaitable[Any]]


def misdeeds(house: Installation, hosts: list[UUID]) -> dict[str, Deed]:
    """What somebody with an administrator's password may do to what is Leveret's."""
    deeds: dict[str, Deed] = {}
    for queue in topology.CORE_QUEUES:
        [(exchange, key)] = queue.bindings
        deeds[f"purge {queue.name}"] = methodcaller("queue_purge", queue.name)
        deeds[f"delete {queue.name}"] = methodcaller("queue_delete", queue.name)
        deeds[f"unbind {queue.name}"] = methodcaller("queue_unbind", queue.name, exchange.name, key)
    for exchange in (*topology.CORE_EXCHANGES, topology.events_exchange("default")):
        deeds[f"delete exchange {exchange.name}"] = methodcaller("exchange_delete", exchange.name)
    for host_id in hosts:
        name = topology.host_queue(host_id).name
        deeds[f"delete {name}"] = partial(_delete_owned, house, name)
    return deeds


async def _delete_owned(house: Installation, name: str, _channel: object) -> None:
    with suppress(StackError):  # it is not back yet
        await asyncio.to_thread(house.rabbit.delete_queue, name)


async def commit(house: Installation, deed: Deed) -> None:
    async with await aio_pika.connect(house.rabbit.url) as connection:
        owner = await connection.channel()
        with suppress(aiormq.exceptions.ChannelNotFoundEntity):  # it is not back yet
            await deed(await owner.get_underlay_channel())


def expected_bindings(hosts: list[UUID]) -> set[tuple[str, str, str]]:
    queues = (*topology.CORE_QUEUES, *map(topology.host_queue, hosts))
    return {(exchange.name, queue.name, key) for queue in queues for exchange, key in queue.bindings}


async def is_furnished(house: Installation, hosts: list[UUID]) -> bool:
    """Whether every exchange, queue and binding is there."""
    ctl = house.rabbit.ctl
    columns = ("source_name", "destination_name", "routing_key")
    bindings = (await asyncio.to_thread(ctl, "list_bindings", "-p", VHOST, *columns)).splitlines()
    exchanges = (await asyncio.to_thread(ctl, "list_exchanges", "-p", VHOST, "name")).split()
    wanted = {exchange.name for exchange in (*topology.CORE_EXCHANGES, topology.events_exchange("default"))}
    return expected_bindings(hosts) <= {tuple(line.split("\t")) for line in bindings} and wanted <= set(exchanges)


async def test_queues_exchanges_and_bindings_that_are_deleted_come_back(
    house: Installation, client: Leveret, record_property: Callable[[str, object], None]
) -> None:
    """Row 11: every internal queue purged or deleted while VMs come and go; whole again within 60 s, nothing lost."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    world = Lives(house, client, seed)
    hosts = [host.id for host in await client.hosts()]
    deeds = misdeeds(house, hosts[:2])
    living = asyncio.create_task(world.live_many(25, within_s=len(deeds) * EVERY_S))
    for what in world.chance.sample(sorted(deeds), k=len(deeds)):
        print(what)
        await commit(house, deeds[what])
        await asyncio.sleep(EVERY_S)  # the pace of the vandal
    began = time.monotonic()
    await eventually(lambda: is_furnished(house, hosts), within_s=60, what="everything declared again")
    recovery_s = time.monotonic() - began
    record_property("recovery_s", recovery_s)
    print(f"declared again after {recovery_s:.1f} s")
    await living
    await world.end_well()
    await world.remove_all()


async def test_a_request_that_went_with_its_queue_is_carried_out_when_it_is_asked_again(
    house: Installation, client: Leveret
) -> None:
    """Row 11: what was queued in a deleted queue is all that is gone, and its asker learns of it by asking again."""
    for name in CONDUCTORS:
        await asyncio.to_thread(house.kill, name)
    receipt = await client.create(tiny())
    assert receipt.verdict == "queued"
    await asyncio.to_thread(house.rabbit.delete_queue, topology.REQUESTS_QUEUE.name)
    for name in CONDUCTORS:
        house.restart(name)
    await asyncio.to_thread(house.wait_ready)
    with pytest.raises(ApiError) as caught:
        await client.get(receipt.vm_id)
    assert caught.value.status == 404
    async with asyncio.timeout(60):
        assert (await receipt.judged()).verdict == "accepted"
    world = Lives(house, client, 0)
    world.wished[receipt.vm_id] = State.RUNNING
    await world.end_well()
    await world.remove_all()
