"""Row 12 of the fault table: messages that nobody can make anything of, in every queue that Leveret consumes.

Each is rejected once with a reason and kept in `leveret.dead`; everything else flows meanwhile, and no process and no
connection is lost. What is done with requests of strangers in particular is shown in tests/acceptance/test_fuzz.py and
tests/integration/test_front_door.py: who can be told by a direct reply is told, and then nothing is kept.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from installation import Installation, installed, latencies
from load import whole
from peers import eventually, tiny

from leveret.client import Leveret
from leveret.shared import topology
from leveret.shared.documents import MAX_REQUEST_BYTES
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State
from leveret.stack.layout import Options

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

JSON = "application/json"
#: The type that belongs into each queue, and one that belongs into another.
TYPES = {
    "requests": ("vm.create.v1", "host.report"),
    "reports": ("host.report", "host.heartbeat"),
    "heartbeats": ("host.heartbeat", "host.report"),
    "host": ("host.desired", "vm.create.v1"),
}
BIGINT = 2**63


@pytest.fixture(scope="module")
def house() -> Iterator[Installation]:
    with installed(Options(conductors=2, fake_hosts=2, libvirt=False)) as installation:
        slow = latencies(start=0.1, remove=0.1)
        installation.reconfigure("fake-hosts", LEVERET_HEARTBEAT_S="0.5", LEVERET_SIMULATE_LATENCY_S=slow)
        installation.wait_ready()
        yield installation


@pytest.fixture
async def client(house: Installation) -> AsyncIterator[Leveret]:
    async with house.client() as client:
        yield client


@dataclass(frozen=True)
class Poison:
    """A message, and the code with which it must be rejected."""

    queue: str
    code: str
    body: bytes
    type: str | None
    content_type: str | None = JSON


def unreadable(queue: str) -> list[Poison]:
    """Messages that are not what this queue carries, whatever the consumer makes of their contents."""
    own, others = TYPES[queue]
    return [
        Poison(queue, "invalid_request", b"{", own),
        Poison(queue, "invalid_request", b"", own),
        Poison(queue, "invalid_request", b"\xff\xfe\x00", own),
        Poison(queue, "invalid_request", b'{"vms": [{}], "host_id": 7, "total": [], "image": null}', own),
        Poison(queue, "invalid_request", b"[]", own),
        Poison(queue, "invalid_request", b"[" * 100_000 + b"]" * 100_000, own),
        Poison(queue, "invalid_request", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, own),
        Poison(queue, "body_too_large", b"{}" + b" " * MAX_REQUEST_BYTES, own),
        Poison(queue, "unknown_type", b"{}", "host.surprise.v9"),
        Poison(queue, "unknown_type", b"{}", others),
        Poison(queue, "unknown_type", b"{}", None),
        Poison(queue, "unsupported_content_type", b"{}", own, "application/x-surprise"),
        Poison(queue, "unsupported_content_type", b"{}", own, None),
    ]


def crashing(heartbeat: dict[str, Any], report: dict[str, Any]) -> list[Poison]:
    """Messages that can be read, and that no row can take: what their handler does with them fails every time."""
    return [
        *(
            Poison("heartbeats", "handler_crashed", json.dumps(heartbeat | wrong).encode(), "host.heartbeat")
            for wrong in (
                {"name": "a\0b"},
                {"epoch": BIGINT},
                {"labels": {"a\0": "b"}},
                {"placeable": {"vcpus": -1, "memory_mib": 1, "disk_gib": 1}},
                {"placeable": {"vcpus": 2**31, "memory_mib": 1, "disk_gib": 1}},
            )
        ),
        *(
            Poison("reports", "handler_crashed", json.dumps(report | wrong).encode(), "host.report")
            for wrong in ({"epoch": BIGINT}, {"vms": [report["vms"][0] | {"seq": BIGINT}]})
        ),
    ]


@dataclass
class Undertaker:
    """Reads `leveret.dead`: what lies there, by the message's own id."""

    letters: dict[str, dict[str, Any]]
    times: Counter[str]

    async def take(self, channel: AbstractChannel) -> None:
        queue = await channel.get_queue(topology.DEAD_QUEUE.name)
        while (letter := await queue.get(fail=False, no_ack=True)) is not None:
            name = str(letter.headers["dead_message_id"])
            self.letters[name] = dict(letter.headers)
            self.times[name] += 1


async def overheard(house: Installation, client: Leveret) -> tuple[dict[str, Any], dict[str, Any], UUID]:
    """A heartbeat, and the report of a running VM, as hosts send them; and the VM."""
    connection = await aio_pika.connect(house.rabbit.url)
    async with connection:
        ear = await (await connection.channel()).declare_queue(exclusive=True)
        await ear.bind(topology.HEARTBEATS.name, "heartbeat")
        await ear.bind(topology.REPORTS.name, "report")
        receipt = await client.create(tiny(), wait="running")
        heard: dict[str, dict[str, Any]] = {}

        async def both() -> bool:
            message = await ear.get(fail=False, no_ack=True)
            if message is not None:
                heard[message.type or ""] = json.loads(message.body)
            return heard.keys() == {"host.heartbeat", "host.report"} and bool(heard["host.report"]["vms"])

        await eventually(both, within_s=30, what="a heartbeat and a report")
    return heard["host.heartbeat"], heard["host.report"], receipt.vm_id


async def work(client: Leveret, done: asyncio.Event) -> int:
    """Honest work: VMs that come and go, one after the other. Returns how many did."""
    count = 0
    while not done.is_set() or count < 3:
        receipt = await client.create(tiny(), wait="running", timeout_s=60)
        assert receipt.wait == "reached", receipt
        assert (await client.delete(receipt.vm_id, wait=True, timeout_s=60)).wait == "reached"
        count += 1
    return count


async def poison_all(house: Installation, host_id: UUID, poisons: list[Poison]) -> dict[str, Poison]:
    """Send each of them once, as whoever may write there; by the id with which it was sent."""
    places = {
        "requests": (topology.REQUESTS.name, "vm.create.v1", "prankster"),
        "reports": (topology.REPORTS.name, "report", "leveret-compute"),
        "heartbeats": (topology.HEARTBEATS.name, "heartbeat", "leveret-compute"),
        "host": (topology.HOSTS.name, str(host_id), "leveret-conductor"),
    }
    sent: dict[str, Poison] = {}
    for exchange, key, user in places.values():
        connection = await aio_pika.connect(house.rabbit.url_of(user))
        async with connection:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            where = await channel.get_exchange(exchange, ensure=False)
            for poison in poisons:
                if places[poison.queue][0] != exchange:
                    continue
                message = aio_pika.Message(
                    poison.body,
                    type=poison.type,
                    content_type=poison.content_type,
                    user_id=user,
                    message_id=new_id().hex,
                    headers={"vm_id": str(new_id())},
                )
                sent[str(message.message_id)] = poison
                await where.publish(message, key)
    return sent


def links_lost(house: Installation) -> int:
    """How often any process lost a connection, by its log."""
    logs = Path(house.layout.services).glob("*.log")
    return sum('"link.down"' in line for log in logs for line in log.read_text().splitlines())


@pytest.mark.parametrize("times", [1, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
async def test_poison_in_any_queue_is_kept_with_its_reason_and_everything_else_flows(
    house: Installation, client: Leveret, times: int
) -> None:
    await asyncio.to_thread(house.rabbit.create_client, "prankster", "default")
    if "prankster" not in {user.name for user in await client.amqp_users("default")}:
        await client.add_amqp_user("default", "prankster")
    heartbeat, report, vm_id = await overheard(house, client)
    poisons = [poison for queue in TYPES for poison in unreadable(queue)] + crashing(heartbeat, report)
    pids = {name: house.runner.daemon(name).pid for name in house.services}
    lost = links_lost(house)
    before = await house.query("SELECT id, name, epoch, labels, vcpus FROM hosts ORDER BY id")
    done = asyncio.Event()
    working = [asyncio.create_task(work(client, done)) for _ in range(3)]
    undertaker = Undertaker({}, Counter())
    connection = await aio_pika.connect(house.rabbit.url)
    async with connection:
        channel = await connection.channel()
        sent = await poison_all(house, UUID(heartbeat["host_id"]), poisons * times)

        async def all_dead() -> bool:
            await undertaker.take(channel)
            return undertaker.letters.keys() >= sent.keys()

        await eventually(all_dead, within_s=120, what="every one of them is kept")
        done.set()
        counts = await asyncio.gather(*working)
        await undertaker.take(channel)
    assert undertaker.times == Counter(dict.fromkeys(sent, 1)), "each once, and nothing else"
    found = {name: letter["dead_code"] for name, letter in undertaker.letters.items()}
    assert found == {name: poison.code for name, poison in sent.items()}
    queues = {
        "requests": topology.REQUESTS_QUEUE.name,
        "reports": topology.REPORTS_QUEUE.name,
        "heartbeats": topology.HEARTBEATS_QUEUE.name,
        "host": topology.host_queue(UUID(heartbeat["host_id"])).name,
    }
    for name, letter in undertaker.letters.items():
        assert letter["dead_queue"] == queues[sent[name].queue]
        assert letter["dead_message"]
        assert letter["dead_length"] == len(sent[name].body)
    assert min(counts) >= 3, "honest work went on"
    assert {name: house.runner.daemon(name).pid for name in house.services} == pids, "no process ended"
    assert links_lost(house) == lost
    assert await house.query("SELECT id, name, epoch, labels, vcpus FROM hosts ORDER BY id") == before
    assert {host.state for host in await client.hosts()} == {"up"}
    assert (await client.get(vm_id)).state is State.RUNNING
    await client.delete(vm_id, wait=True)
    await whole(house)
