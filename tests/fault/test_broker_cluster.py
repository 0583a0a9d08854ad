"""Row 14 of the fault table: one node of a three-node broker stops, is cut off, and comes back.

What was confirmed stays on the two others, and whoever knows all nodes moves on to one of them.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from broker_cluster import BrokerCluster, clustered
from installation import Installation, installed, latencies
from knocking import Knocking
from lives import Lives
from peers import eventually

from leveret.client import Leveret
from leveret.shared import topology
from leveret.shared.lifecycle import State
from leveret.stack.layout import Options
from leveret.stack.up import BROKER_USERS

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

CONDUCTORS = ("conductor-1", "conductor-2")
HOSTS = 4
#: Without an accepted VM: when a node ends, and when it only falls silent.
OUTAGE_S, SILENT_OUTAGE_S = 5.0, 35.0
#: For machines that do much else.
SLACK_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[BrokerCluster]:
    with tempfile.TemporaryDirectory(prefix="leveret-test-") as directory:
        root = Path(directory)
        root.chmod(0o755)
        with clustered(root / "cluster") as cluster:
            for user, permissions in BROKER_USERS.items():
                cluster.create_user(user, *permissions)
            cluster.start()
            yield cluster


@pytest.fixture(scope="module")
def house(cluster: BrokerCluster) -> Iterator[Installation]:
    """An installation that knows every node of the cluster, and has no other broker."""
    quick = {"LEVERET_SIMULATE_LATENCY_S": latencies(start=0.3, remove=0.2), "LEVERET_HEARTBEAT_S": "1"}
    with installed(Options(conductors=2, fake_hosts=HOSTS, libvirt=False)) as installation:
        for name, user in {
            **dict.fromkeys(CONDUCTORS, "leveret-conductor"),
            "api": "leveret-api",
            "fake-hosts": "leveret-compute",
        }.items():
            more = quick if name == "fake-hosts" else {}
            installation.reconfigure(name, LEVERET_AMQP_URL=cluster.urls_of(user), **more)
        installation.rabbit.stop()
        for service in installation.services.values():
            installation.runner.wait_ready(service, 60)
        yield installation


@pytest.fixture
async def client(house: Installation) -> AsyncIterator[Leveret]:
    async with house.client(retry_for_s=180) as client:

        async def all_up() -> bool:
            return [host.state for host in await client.hosts()] == ["up"] * HOSTS

        await eventually(all_up, within_s=60, what="every host up")
        yield client


@pytest.mark.parametrize("way", ["stopped", "cut off", pytest.param("killed", marks=pytest.mark.slow)])
async def test_a_node_that_goes_and_comes_back_costs_seconds_and_no_message(
    way: str,
    house: Installation,
    cluster: BrokerCluster,
    client: Leveret,
    record_property: Callable[[str, object], None],
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    world, knocking = Lives(house, client, seed), Knocking(house)
    leader = await asyncio.to_thread(cluster.leader_of, topology.REQUESTS_QUEUE.name)
    node = cluster.nodes[leader]
    print(f"seed {seed}, {leader} is {way}")
    limit_s = SILENT_OUTAGE_S if way == "cut off" else OUTAGE_S
    async with knocking.going_on(every_s=0.2):
        living = asyncio.create_task(world.live_many(15, within_s=8))
        await eventually(lambda: accepted(knocking) >= 10, within_s=60, what="VMs are accepted")
        went = time.monotonic()
        match way:
            case "stopped":
                await asyncio.to_thread(node.stop)
            case "killed":
                await asyncio.to_thread(node.kill)
            case _:
                cluster.freeze(leader)
        so_far = accepted(knocking)
        try:
            # Every process has found its way: there are many more than one of them would have.
            await eventually(
                lambda: accepted(knocking) >= so_far + 20, within_s=limit_s + SLACK_S, what="VMs are accepted again"
            )
        finally:
            if way == "cut off":
                cluster.thaw(leader)
            else:
                node.start()
        await asyncio.to_thread(node.wait_ready, 180)
        await eventually(cluster.is_whole, within_s=180, what="the cluster is whole again")
        await living
    outage_s = longest_outage_s(knocking, went)
    record_property("outage_s", outage_s)
    print(f"nothing was accepted for {outage_s:.1f} s; the slowest refusal took {knocking.slowest_refusal_s():.1f} s")
    assert outage_s < limit_s + SLACK_S
    knocking.told_honestly()
    await house.settle(within_s=120)
    assert await knocking.lost() == set()
    world.wished |= dict.fromkeys(await knocking.insist(client), State.RUNNING)
    await world.end_well()
    await world.remove_all()


def accepted(knocking: Knocking) -> int:
    return sum(answer.is_accepted for answer in knocking.answers)


def longest_outage_s(knocking: Knocking, since: float) -> float:
    """The longest time in which no knock was accepted."""
    moments = sorted(answer.at + answer.took_s for answer in knocking.answers if answer.is_accepted)
    return max(later - max(earlier, since) for earlier, later in pairwise(moments) if later > since)
