"""Row 13 of the fault table: the broker is killed, restarted, short of memory or of disk, and its queue is full.

What it confirmed is never lost; the API says "later" within five seconds; everything goes on by itself.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from installation import Installation, installed, latencies
from knocking import Knocking
from lives import PATIENCE_S, Lives
from peers import eventually

from leveret.client import Leveret
from leveret.shared import topology
from leveret.shared.lifecycle import State
from leveret.stack.broker_user import VHOST
from leveret.stack.layout import Options

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

CONDUCTORS = ("conductor-1", "conductor-2")
#: From when the broker listens again, or takes messages again, to the first VM that is accepted.
RECOVERED_WITHIN_S = 10.0
#: For machines that do much else.
SLACK_S = 20.0

Recorder = Callable[[str, object], None]


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    with installed(Options(conductors=2, fake_hosts=4, libvirt=False)) as installation:
        installation.reconfigure("fake-hosts", LEVERET_SIMULATE_LATENCY_S=latencies(start=0.3, remove=0.2))
        installation.wait_ready()
        yield installation


@pytest.fixture
async def client(house: Installation) -> AsyncIterator[Leveret]:
    async with house.client(retry_for_s=180) as client:
        yield client


@pytest.fixture
def world(house: Installation, client: Leveret) -> Lives:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return Lives(house, client, seed)


async def recovered(knocking: Knocking, since: float, record_property: Recorder) -> None:
    """Wait for the first VM that is accepted, and keep how long that took."""
    await eventually(lambda: knocking.first_accepted_after(since), within_s=RECOVERED_WITHIN_S + SLACK_S)
    record_property("recovery_s", knocking.first_accepted_after(since))
    record_property("slowest_refusal_s", knocking.slowest_refusal_s())
    print(f"accepted again after {knocking.first_accepted_after(since):.1f} s", end="; ")
    print(f"the slowest refusal took {knocking.slowest_refusal_s():.1f} s")


async def all_done(world: Lives, knocking: Knocking) -> None:
    """Nothing that was confirmed is lost, everything can be had by asking again, and all is well."""
    knocking.told_honestly()
    await world.house.settle(within_s=120)
    assert await knocking.lost() == set()
    world.wished |= dict.fromkeys(await knocking.insist(world.client), State.RUNNING)
    await world.end_well()
    await world.remove_all()


@pytest.mark.parametrize("way", ["killed", "restarted"])
async def test_a_broker_that_comes_back_has_lost_nothing_that_it_confirmed(
    way: str, house: Installation, world: Lives, record_property: Recorder
) -> None:
    knocking = Knocking(house)
    async with knocking.going_on(every_s=0.2):
        living = asyncio.create_task(world.live_many(15, within_s=15))
        await eventually(lambda: len(knocking.answers) >= 10, within_s=30, what="some answers")
        await asyncio.to_thread(house.rabbit.kill if way == "killed" else house.rabbit.stop)
        house.rabbit.start()
        await asyncio.to_thread(house.rabbit.wait_ready)
        await recovered(knocking, time.monotonic(), record_property)
        await living
    await all_done(world, knocking)


@asynccontextmanager
async def short_of(house: Installation, what: str) -> AsyncIterator[None]:
    """The broker is short of memory or disk while this lasts."""
    alarm, end = {
        "memory": (
            ("eval", "vm_memory_monitor:set_vm_memory_high_watermark(0.0)."),
            ("eval", "vm_memory_monitor:set_vm_memory_high_watermark(0.4)."),
        ),
        "disk": (("set_disk_free_limit", "1000000GiB"), ("set_disk_free_limit", "50MB")),
    }[what]
    await asyncio.to_thread(house.rabbit.ctl, *alarm)
    try:
        yield
    finally:
        await asyncio.to_thread(house.rabbit.ctl, *end)


@pytest.mark.parametrize(
    ("what", "seconds", "every_s"),
    [
        ("memory", 15.0, 0.2),
        ("disk", 8.0, 0.2),
        pytest.param(
            "memory", 1800.0, 5.0, marks=[pytest.mark.slow, pytest.mark.timeout(3000)], id="memory-30-minutes"
        ),
    ],
)
async def test_a_broker_in_need_is_left_alone_until_it_takes_messages_again(
    what: str, seconds: float, every_s: float, house: Installation, record_property: Recorder
) -> None:
    patience_s = seconds + PATIENCE_S
    async with house.client(retry_for_s=patience_s) as client:
        seed = random.SystemRandom().randrange(2**32)
        print(f"seed {seed}")
        world = Lives(house, client, seed, patience_s=patience_s)
        await outlast(what, seconds, every_s, world, record_property)


async def outlast(what: str, seconds: float, every_s: float, world: Lives, record_property: Recorder) -> None:
    """An alarm of so many seconds, with a knock at the API every so often."""
    house, knocking = world.house, Knocking(world.house)
    async with knocking.going_on(every_s=every_s):
        await eventually(lambda: len(knocking.answers) >= 3, within_s=60, what="some answers")
        async with short_of(house, what):
            began = time.monotonic()
            living = asyncio.create_task(world.live_many(15, within_s=5))
            await asyncio.sleep(seconds)  # the length of the alarm
            during = [answer for answer in knocking.answers if answer.at > began and answer.at < began + seconds - 6]
        await recovered(knocking, time.monotonic(), record_property)
        await living
    assert during
    assert not [answer for answer in during if answer.is_accepted], "the alarm was none"
    assert {answer.status for answer in during[-5:]} == {503}
    await all_done(world, knocking)
    await eventually(lambda: drained(house), within_s=60, what="the queues are empty")


async def drained(house: Installation) -> bool:
    """Whether nothing lies in the conductors' queues, delivered or not."""
    table = await asyncio.to_thread(house.rabbit.ctl, "list_queues", "-p", VHOST, "name", "messages")
    depths = dict(line.split("\t") for line in table.splitlines() if "\t" in line)
    return {depths[queue.name] for queue in topology.CORE_QUEUES} == {"0"}


async def test_what_a_full_queue_refuses_is_told_and_what_it_took_is_done(
    house: Installation, world: Lives, record_property: Recorder
) -> None:
    ctl = house.rabbit.ctl
    policy = ("-p", VHOST, "--apply-to", "queues", "small", f"^{topology.REQUESTS_QUEUE.name}$", '{"max-length":20}')
    await asyncio.to_thread(ctl, "set_policy", *policy)
    try:
        for name in CONDUCTORS:
            await asyncio.to_thread(house.kill, name)
        knocking = Knocking(house)
        async with knocking.going_on(every_s=0.1):
            await eventually(lambda: refusals(knocking) >= 10, within_s=60, what="the queue is full")
            for name in CONDUCTORS:
                house.restart(name)
            await asyncio.to_thread(house.wait_ready)
            await recovered(knocking, time.monotonic(), record_property)
    finally:
        await asyncio.to_thread(ctl, "clear_policy", "-p", VHOST, "small")
    assert sum(answer.status == 202 and not answer.is_accepted for answer in knocking.answers) >= 20
    await all_done(world, knocking)


def refusals(knocking: Knocking) -> int:
    return sum(answer.status == 503 and "full" in answer.document["detail"] for answer in knocking.answers)
