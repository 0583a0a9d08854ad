"""Row 16 of the fault table: the line between two processes is half open, parted, or comes and goes.

Each pair that speaks to each other does so through a proxy: API and broker, conductor and broker, worker and broker,
conductor and Postgres, API and Postgres. One of the two conductors, and half of the hosts, have lines that are never
touched.
"""

import asyncio
import json
import os
import random
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from installation import Installation, installed, latencies
from knocking import Knocking
from lives import Lives
from peers import eventually
from proxy import Proxy

from leveret.client import Leveret
from leveret.shared.lifecycle import State
from leveret.stack.layout import Options

# The proxies live in the loop of the module: the processes need them from one test to the next.
pytestmark = [pytest.mark.fault, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

Lines = dict[str, Proxy]
Recorder = Callable[[str, object], None]

#: Hosts whose line is broken, and others, which take the VMs that these cannot be given.
FAR, NEAR = 2, 2
#: In which a side notices that the other is gone without a word.
NOTICED_WITHIN_S = 35.0
#: For machines that do much else.
SLACK_S = 10.0

QUICK = {"LEVERET_SIMULATE_LATENCY_S": latencies(start=0.3, remove=0.2), "LEVERET_HEARTBEAT_S": "1"}
#: Each pair: whose setting leads through its proxy.
PAIRS = {
    "api-broker": ("api", "LEVERET_AMQP_URL"),
    "conductor-broker": ("conductor-1", "LEVERET_AMQP_URL"),
    "compute-broker": ("fake-hosts", "LEVERET_AMQP_URL"),
    "conductor-postgres": ("conductor-1", "LEVERET_DATABASE_URL"),
    "api-postgres": ("api", "LEVERET_DATABASE_URL"),
}
#: What the side that is not a server says in its log when it has noticed: an event, and of links which ones.
NOTICES: dict[str, tuple[str, set[str]]] = {
    "api-broker": ("link.down", {"leveret-api"}),
    "conductor-broker": (
        "link.down",
        {"conductor-publish", "conductor-consume", "conductor-answer", "conductor-check"},
    ),
    "compute-broker": ("link.down", {"compute-publish", "compute-consume"}),
    "conductor-postgres": ("paused", set()),
    "api-postgres": ("away", set()),
}


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    with installed(Options(conductors=2, fake_hosts=FAR, libvirt=False)) as installation:
        installation.add_fake_hosts("near-hosts", NEAR, **QUICK)
        yield installation


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lines(house: Installation) -> AsyncIterator[Lines]:
    lines: Lines = {}
    settings = {"fake-hosts": QUICK.copy()}
    for pair, (name, setting) in PAIRS.items():
        url = house.services[name].env[setting]
        lines[pair] = Proxy(urlsplit(url).port or 0)
        await lines[pair].open()
        settings.setdefault(name, {})[setting] = lines[pair].through(url)
    for name, env in settings.items():
        await asyncio.to_thread(house.reconfigure, name, **env)
    await asyncio.to_thread(house.wait_ready)
    yield lines
    for line in lines.values():
        await line.close()


@pytest_asyncio.fixture(loop_scope="module")
async def client(house: Installation, lines: Lines) -> AsyncIterator[Leveret]:
    async with house.client(retry_for_s=180) as client:

        async def all_up() -> bool:
            return [host.state for host in await client.hosts()] == ["up"] * (FAR + NEAR)

        await eventually(all_up, within_s=60, what="every host up")
        yield client


@pytest.fixture
def world(house: Installation, client: Leveret) -> Lives:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return Lives(house, client, seed)


class Notice:
    """When a pair's line was noticed to be dead, by what its process says in its log."""

    def __init__(self, house: Installation, pair: str) -> None:
        self._log = house.runner.daemon(PAIRS[pair][0]).log_file
        self._from = self._log.stat().st_size
        self._event, self._links = NOTICES[pair]
        self._since = time.time()

    def after_s(self) -> float | None:
        """How long it took until all of it was noticed; None as long as it was not."""
        with self._log.open() as log:
            log.seek(self._from)
            lines = [json.loads(line) for line in log if line.startswith("{") and line.endswith("}\n")]
        moments: dict[str, float] = {}
        for line in lines:
            if line["event"].rpartition(".")[2] == self._event.rpartition(".")[2]:
                link = str(line.get("link", "")).partition(":")[0]
                moments.setdefault(link, datetime.fromisoformat(line["timestamp"]).timestamp() - self._since)
        if not moments or not self._links <= moments.keys():
            return None
        return max(moments[link] for link in self._links) if self._links else min(moments.values())


async def noticed(notices: dict[str, Notice], record_property: Recorder) -> None:
    """Wait until every side that speaks has noticed."""
    await eventually(
        lambda: all(notice.after_s() is not None for notice in notices.values()),
        within_s=NOTICED_WITHIN_S + SLACK_S,
        what="everybody noticed",
    )
    for pair, notice in notices.items():
        record_property(f"noticed_s {pair}", notice.after_s())
        print(f"{pair}: noticed after {notice.after_s():.1f} s")


async def all_well(world: Lives, knocking: Knocking) -> None:
    knocking.told_honestly()
    await world.house.settle(within_s=120)
    assert await knocking.lost() == set()
    world.wished |= dict.fromkeys(await knocking.insist(world.client), State.RUNNING)
    await world.end_well()
    await world.remove_all()


async def test_half_open_connections_are_noticed_and_replaced(
    house: Installation, lines: Lines, world: Lives, record_property: Recorder
) -> None:
    """All five pairs at once: nobody hears anything on the connections of now; new ones get through."""
    knocking = Knocking(house)
    async with knocking.going_on(every_s=0.3):
        living = asyncio.create_task(world.live_many(15, within_s=20))
        await eventually(lambda: accepted(knocking) >= 5, within_s=60, what="VMs are accepted")
        notices = {pair: Notice(house, pair) for pair in lines}
        stranded = time.monotonic()
        for line in lines.values():
            line.strand()
        await noticed(notices, record_property)
        began = time.monotonic()
        await eventually(lambda: knocking.first_accepted_after(began), within_s=30, what="VMs are accepted again")
        await asyncio.sleep(3)  # of knocks that show that it stays so
        last_refusal_s = max((answer.at for answer in knocking.answers if answer.status == 503), default=0) - stranded
        await living
    record_property("recovery_s", last_refusal_s)
    print(f"the last refusal came {last_refusal_s:.1f} s later")
    assert last_refusal_s < NOTICED_WITHIN_S + SLACK_S
    await all_well(world, knocking)


async def test_lines_that_come_and_go_lose_nothing(house: Installation, lines: Lines, world: Lives) -> None:
    knocking = Knocking(house)
    chance = random.Random(world.chance.random())

    async def flap(line: Proxy, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(chance.uniform(0.2, 3.0))
            match chance.choice(("part", "part", "cut", "slow")):
                case "part":
                    line.swallow()
                    await asyncio.sleep(chance.uniform(0.1, 4.0))
                    line.swallow(swallowing=False)
                case "cut":
                    line.cut()
                case _:
                    line.delay_s = chance.choice((0.0, 0.05, 0.3))
        line.delay_s = 0.0

    async with knocking.going_on(every_s=0.3):
        living = asyncio.create_task(world.live_many(20, within_s=15))
        await asyncio.gather(*(flap(line, time.monotonic() + 15) for line in lines.values()))
        began = time.monotonic()
        await eventually(lambda: knocking.first_accepted_after(began), within_s=30, what="VMs are accepted again")
        await living
    await all_well(world, knocking)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
async def test_a_pair_that_is_parted_for_a_minute_finds_together_again(
    pair: str, house: Installation, lines: Lines, world: Lives, record_property: Recorder
) -> None:
    knocking = Knocking(house)
    async with knocking.going_on(every_s=0.5):
        living = asyncio.create_task(world.live_many(20, within_s=60))
        await eventually(lambda: accepted(knocking) >= 5, within_s=60, what="VMs are accepted")
        notice = {pair: Notice(house, pair)}
        lines[pair].swallow()
        try:
            await noticed(notice, record_property)
            await asyncio.sleep(60 - NOTICED_WITHIN_S)  # until the minute is over, or more
        finally:
            lines[pair].swallow(swallowing=False)
        healed = time.monotonic()
        await eventually(lambda: knocking.first_accepted_after(healed), within_s=30, what="VMs are accepted again")
        record_property("recovery_s", knocking.first_accepted_after(healed))
        print(f"{pair}: accepted {knocking.first_accepted_after(healed):.1f} s after they were together again")
        await living
    await all_well(world, knocking)


@contextmanager
def dropped(ports: Collection[int]) -> Iterator[None]:
    """The kernel drops every packet to and from these ports of loopback while this lasts; nobody is told."""
    rules = [
        ("INPUT", "-i", "lo", "-p", "tcp", f"--{side}port", str(port), "-j", "DROP")
        for port in ports
        for side in ("d", "s")
    ]
    try:
        for rule in rules:
            subprocess.run(["iptables", "-w", "-I", *rule], check=True)
        yield
    finally:
        for rule in rules:
            subprocess.run(["iptables", "-w", "-D", *rule], check=False)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may have packets dropped")
async def test_lines_whose_packets_are_dropped_are_noticed_and_come_back(
    house: Installation, lines: Lines, world: Lives, record_property: Recorder
) -> None:
    """All five pairs at once, by the kernel's packet filter: retransmissions, and not a byte."""
    knocking = Knocking(house)
    async with knocking.going_on(every_s=0.3):
        living = asyncio.create_task(world.live_many(15, within_s=20))
        await eventually(lambda: accepted(knocking) >= 5, within_s=60, what="VMs are accepted")
        notices = {pair: Notice(house, pair) for pair in lines}
        with dropped([line.port for line in lines.values()]):
            await noticed(notices, record_property)
        healed = time.monotonic()
        await eventually(lambda: knocking.first_accepted_after(healed), within_s=60, what="VMs are accepted again")
        record_property("recovery_s", knocking.first_accepted_after(healed))
        print(f"accepted {knocking.first_accepted_after(healed):.1f} s after the packets got through again")
        await living
    await all_well(world, knocking)


def accepted(knocking: Knocking) -> int:
    return sum(answer.is_accepted for answer in knocking.answers)
