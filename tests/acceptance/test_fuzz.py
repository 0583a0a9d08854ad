"""Strangers send whatever they like, as fast as they can, and nobody else notices.

Nine of ten bodies are honest requests that something was done to; the tenth is hostile by design (see `hostile`).
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import aio_pika
import aiormq
import psutil
import pytest
from hostile import Hostile, hostile_messages, long, post, properties, table
from installation import Installation
from peers import eventually, tiny

from leveret.client import Leveret
from leveret.shared import topology
from leveret.shared.documents import CreateToken, UpdateQuota
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.messages import Verdict, decode

pytestmark = pytest.mark.acceptance

MANY = 100_000
SOME = 5_000
STRANGER = "stranger"
#: Whose answers end the connection that sends them gets none for a while: that is another broker user's trouble.
VILLAIN = "villain"
#: Asked and not yet answered: there are always some in the queue, and no more than that.
IN_FLIGHT = 4_000

HONEST: dict[str, Any] = {
    "vm.create.v1": {
        "vcpus": 1,
        "memory_mib": 128,
        "disk_gib": 1,
        "image": {"name": "tiny"},
        "labels": {"a": "b"},
        "ssh_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGZha2U= me"],
        "placement": {"zones": [], "strategy": "pack"},
        "user_data": "#cloud-config\n",
    },
    "vm.update.v1": {"name": "other", "labels": {"a": None, "c": "d"}},
    "vm.stop.v1": {"grace_s": 5},
    "vm.delete.v1": {},
    "vm.start.v1": {},
    "vm.reboot.v1": {},
    "vm.retry.v1": {},
}
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    2**200,
    1.5,
    1e308,
    "",
    "x" * 5000,
    "\u202e",
    "\ud83d\ude00",
    "\x00",
    [],
    [[]],
    {},
    {"": {}},
]


def fuzzed(random: Random) -> tuple[str, bytes]:
    """A type and a body to which something was done; some are left as they are."""
    kind = random.choices(list(HONEST), [6, 2, 2, 1, 1, 1, 1])[0]
    document = json.loads(json.dumps(HONEST[kind]))
    for _ in range(random.randrange(3)):
        target = document
        while isinstance(target, dict) and target and random.random() < 0.4:
            inner = random.choice(list(target.values()))
            if not isinstance(inner, dict):
                break
            target = inner
        key = random.choice([*target, "surprise", "\ud83d\ude00", ""])
        target[key] = deepcopy(random.choice(ODD))
    body = bytearray(json.dumps(document, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass"))
    for _ in range(random.choice([0, 0, 1, 3, 20])):
        if body:
            at = random.randrange(len(body))
            match random.randrange(4):
                case 0:
                    body[at] = random.randrange(256)
                case 1:
                    del body[at : at + random.randrange(1, 30)]
                case 2:
                    body[at:at] = random.randbytes(random.randrange(1, 8))
                case 3:
                    body[at:at] = body[at : at + 40]
    return kind, bytes(body)


@dataclass
class Account:
    """What was sent, and what was said about it."""

    answered: set[str] = field(default_factory=set)
    codes: Counter[str] = field(default_factory=Counter)
    dead: Counter[str] = field(default_factory=Counter)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def on_answer(self, message: aiormq.abc.DeliveredMessage) -> None:
        answer = message.header.properties
        verdict = decode(answer.message_type, bytes(message.body))
        assert isinstance(verdict, Verdict)
        self.answered.add(answer.correlation_id or "")
        self.codes[str(verdict.problem.code) if verdict.problem else "accepted"] += 1
        self.news.set()

    async def on_dead(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        await message.ack()
        assert message.headers["dead_message"], "everything that is kept says why"
        self.dead[str(message.headers["dead_message_id"])] += 1
        self.codes[f"dead: {message.headers['dead_code']!s}"] += 1
        self.news.set()


async def send_everything(
    channel: aiormq.abc.AbstractChannel, villains: aiormq.abc.AbstractChannel, count: int, account: Account
) -> tuple[set[str], list[Hostile]]:
    """Send at full rate, with a bounded number unaccounted for. The ids of what asks for an answer, and the hostile."""
    random, hostile = Random(20261122), hostile_messages(7, VILLAIN)
    asking: set[str] = set()
    designed: list[Hostile] = []
    for n in range(count):
        if n % 10 == 9:
            message = next(hostile)
            designed.append(message)
            await message.send(villains)
            continue
        kind, body = fuzzed(random)
        name = f"fuzz-{n}"
        asking.add(name)
        head = properties(
            content_type="application/json",
            headers=table(("vm_id", long(str(UUID(int=random.getrandbits(128)))))),
            correlation_id=name,
            reply_to="amq.rabbitmq.reply-to",
            message_id=name,
            type=kind,
            user_id=STRANGER,
        )
        await post(channel, topology.REQUESTS.name, kind.encode(), head, body)
        while len(asking) - len(account.answered) > IN_FLIGHT:
            account.news.clear()
            await account.news.wait()
    return asking, designed


async def neighbour(house: Installation, token: str, stop: asyncio.Event) -> list[float]:
    """Honest work beside all that: VMs that come and go, one after the other. The seconds until each ran."""
    took: list[float] = []
    loop = asyncio.get_running_loop()
    async with Leveret(house.url, token, retry_for_s=0) as leveret:
        while not stop.is_set() or len(took) < 10:
            vm_id, began = new_id(), loop.time()
            receipt = await leveret.create(tiny(), vm_id=vm_id, wait="running", timeout_s=60)
            assert receipt.wait == "reached", receipt
            took.append(loop.time() - began)
            assert (await leveret.delete(vm_id, wait=True, timeout_s=60)).wait == "reached"
    return took


def processes(house: Installation) -> dict[str, int]:
    return {name: house.runner.daemon(name).pid or 0 for name in house.services}


def links_made(house: Installation) -> Counter[str]:
    """How often each link of the conductors came up, by their logs."""
    made: Counter[str] = Counter()
    for log in sorted(Path(house.layout.services).glob("conductor-*.log")):
        for line in log.read_text().splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == "link.up" and entry["link"] != "conductor-answer":
                    made[f"{log.stem} {entry['link']}"] += 1
    return made


@pytest.fixture
def urls(house: Installation) -> Iterator[dict[str, str]]:
    yield {user: house.rabbit.create_client(user, "fuzz") for user in (STRANGER, VILLAIN)}
    for user in (STRANGER, VILLAIN):
        house.rabbit.delete_client(user)


@pytest.mark.parametrize("count", [SOME, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
async def test_every_message_is_answered_or_kept_with_a_reason_and_nobody_else_notices(
    house: Installation, urls: dict[str, str], count: int
) -> None:
    async with house.client() as admin:
        limits = UpdateQuota(vms=20, requests_per_s=1_000_000, request_burst=1_000_000)
        await admin.create_project("fuzz", limits)
        for user in urls:
            await admin.add_amqp_user("fuzz", user)
        await admin.create_project("honest")
        tokens = [token.name for token in await admin.tokens("honest") if token.revoked_at is None]
        token = await admin.create_token("honest", CreateToken(name=f"worker-{len(tokens)}"))
    before, links = processes(house), links_made(house)
    account, stop = Account(), asyncio.Event()
    began = asyncio.get_running_loop().time()
    undertaker = await aio_pika.connect(house.rabbit.url)
    client, villain = await aiormq.connect(urls[STRANGER]), await aiormq.connect(urls[VILLAIN])
    honest = asyncio.create_task(neighbour(house, token.token, stop))
    try:
        graves = await undertaker.channel()
        await graves.set_qos(prefetch_count=500)
        await (await graves.get_queue(topology.DEAD_QUEUE.name)).consume(account.on_dead)
        channel = await client.channel(publisher_confirms=False)
        await channel.basic_consume("amq.rabbitmq.reply-to", account.on_answer, no_ack=True)
        asking, designed = await send_everything(
            channel, await villain.channel(publisher_confirms=False), count, account
        )
        await eventually(
            lambda: asking <= account.answered | set(account.dead), within_s=120, what="every fuzzed message judged"
        )
        fuzzing_s = asyncio.get_running_loop().time() - began
        unheard = [message for message in designed if message.label != "forged_reply_to"]

        async def hostile_accounted() -> int:
            [row] = await house.query(
                """SELECT count(*) FROM events WHERE project_id = 'fuzz' AND type = 'rejected'
                   AND data->'problem'->>'code' = $1 AND NOT starts_with(data->>'request_id', 'fuzz-')""",
                Code.VM_NOT_FOUND,
            )
            kept = sum(number for name, number in account.dead.items() if not name.startswith("fuzz-"))
            return int(row["count"]) + kept

        async def all_accounted() -> bool:
            return await hostile_accounted() >= len(unheard)

        await eventually(all_accounted, within_s=60, what="every hostile message kept or logged")
        assert await hostile_accounted() == len(unheard)
    finally:
        stop.set()
        for connection in (client, villain):
            await connection.close()
        await undertaker.close()
    took = sorted(await honest)
    assert processes(house) == before, "no process died"
    assert all(psutil.pid_exists(pid) for pid in before.values())
    assert links_made(house) == links, "no conductor lost its links"
    assert account.codes["accepted"] > 0
    assert account.codes[Code.INVALID_REQUEST] > 0
    print(
        f"{count} messages in {fuzzing_s:.1f} s ({count / fuzzing_s:.0f}/s); {len(took)} VMs beside them,"
        f" running after p50 {took[len(took) // 2]:.3f} s, worst {took[-1]:.3f} s; {dict(account.codes)}"
    )
    async with house.client() as admin:
        cleaner = await admin.create_token("fuzz", CreateToken(name=f"cleaner-{count}"))
        async with Leveret(house.url, cleaner.token) as owner:
            for vm in [vm async for vm in owner.list()]:
                await owner.delete(vm.id, wait=True)
        await admin.revoke_token("fuzz", cleaner.id)
    await house.settle()
