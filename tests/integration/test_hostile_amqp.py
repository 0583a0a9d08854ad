"""What a client with a valid password can do to a consumer: be refused, and nothing else."""

import base64
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any

import aio_pika
import aiormq
import pytest
from hostile import (
    STOPPED_BY_THE_BROKER,
    Hostile,
    hostile_messages,
    long,
    nested,
    post,
    properties,
    short,
    table,
)
from peers import eventually

from leveret.shared import topology
from leveret.shared.bus import DONE, Answerer, Consumer, Delivery, Furniture, Link, Outcome, Publisher, Reject
from leveret.shared.bus.reading import MAX_HEADER_BYTES, UNREADABLE
from leveret.shared.documents import MAX_REQUEST_BYTES
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.messages import REQUESTS, Verdict
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration

CLIENT = "ada"
#: What is said about a message before anybody looks into the database.
SAID_BY_THE_BUS = {"invalid_request", "unknown_type", "unsupported_content_type", "body_too_large"}


class Desk:
    """Takes requests as a conductor does, notes them, and rejects what cannot be read."""

    def __init__(self, rabbit: Rabbit) -> None:
        self.seen: list[Delivery] = []
        self.said: list[str] = []
        self.problems: list[Problem | None] = []
        self._judged: dict[int, Outcome] = {}
        self.ups = 0
        self.publisher = Publisher("leveret-conductor")
        self.publishing = Link(rabbit.url_of("leveret-conductor"), "test-desk-publish")
        self.publishing.add(Furniture())
        self.publishing.add(self.publisher)
        self.consuming = Link(rabbit.url_of("leveret-conductor"), "test-desk-consume")
        self.consuming.add(self)
        self.consumer = Consumer(self.consuming, topology.REQUESTS_QUEUE, self._judge, self.publisher)

    async def attach(self, _: object) -> None:
        self.ups += 1

    def detach(self) -> None:
        """Only the count of connections matters here."""

    async def _judge(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        return [self._judge_one(delivery) for delivery in batch]

    def _judge_one(self, delivery: Delivery) -> Outcome:
        """One that could not be buried in time comes again: it is the same one, and counts once."""
        if id(delivery) not in self._judged:
            self.seen.append(delivery)  # which keeps its id its own
            self._judged[id(delivery)] = self._say(delivery)
        return self._judged[id(delivery)]

    def _say(self, delivery: Delivery) -> Outcome:
        try:
            delivery.decoded(among=REQUESTS)
        except LeveretError as error:
            self.said.append(str(error.problem.code))
            self.problems.append(error.problem)
            return Reject(error.problem)
        self.said.append("fine")
        self.problems.append(None)
        return DONE

    async def takes(self, count: int, within_s: float = 20.0) -> None:
        await eventually(lambda: len(self.seen) >= count, within_s=within_s, what=f"{count} messages arrive")
        assert self.ups == 1, "the consumer's connection was lost"


async def vacate(broker: Rabbit) -> None:
    """Wait until nobody consumes requests any more: what such a one had in hand comes back into the queue, and goes."""
    connection = await aio_pika.connect(broker.url)
    async with connection:
        channel = await connection.channel()

        async def is_left() -> bool:
            queue = await channel.declare_queue(topology.REQUESTS_QUEUE.name, passive=True)
            return queue.declaration_result.consumer_count == 0

        await eventually(is_left, within_s=20, what="nobody consumes requests")
        await (await channel.get_queue(topology.REQUESTS_QUEUE.name)).purge()


@pytest.fixture
async def desk(broker: Rabbit) -> AsyncIterator[Desk]:
    await vacate(broker)
    desk = Desk(broker)
    desk.publishing.start()
    desk.consuming.start()
    desk.consumer.start()
    assert await desk.publishing.wait_up(20)
    assert await desk.consuming.wait_up(20)
    yield desk
    await desk.consumer.stop(2)
    await desk.consuming.stop()
    await desk.publishing.stop()


@asynccontextmanager
async def client(rabbit: Rabbit, user: str = CLIENT) -> AsyncIterator[aiormq.abc.AbstractChannel]:
    connection = await aiormq.connect(rabbit.url_of(user))
    try:
        channel = await connection.channel(publisher_confirms=False)
        yield channel
        await channel.basic_qos(prefetch_count=1)  # answered when the broker has seen everything before it
    finally:
        await connection.close()


def asking(*fields: tuple[str | bytes, bytes], **more: Any) -> bytes:
    """The content header of an honest request, and what is added to it."""
    honest = {"content_type": "application/json", "type": "vm.start.v1", "user_id": CLIENT}
    return properties(headers=table(*fields), **(honest | more))


DEEP = 10_000
TOO_MUCH = "the headers have"
ODD = {
    "timestamp of 2^63-1": (asking(timestamp=struct.pack(">Q", 2**63 - 1)), None),
    "timestamp of 2^64-1": (asking(timestamp=struct.pack(">Q", 2**64 - 1)), None),
    "timestamp header": (asking(("t", b"T" + struct.pack(">Q", 2**64 - 1))), None),
    "decimal header": (asking(("d", b"D" + struct.pack(">BI", 255, 2**32 - 1))), None),
    "nested a little": (asking(("n", nested(6))), None),
    "nested tables": (asking(("n", nested(DEEP))), TOO_MUCH),
    "nested arrays": (asking(("n", nested(DEEP, b"A"))), TOO_MUCH),
    "nested within the limit": (asking(("n", nested(2000, b"A"))), None),
    "bytes": (asking(("x", b"x" + struct.pack(">I", 3) + b"\xff\0\1")), None),
    "text that is no text": (asking(("x", long(b"\xff"))), None),
    "text with NUL": (asking(("x", long(b"\0"))), None),
    "name that is no text": (asking((b"\xff\xfe", b"V")), "the name of a header is not plain UTF-8 text"),
    "the same name twice": (asking(("a", long("1")), ("a", long("2"))), "a header stands there twice"),
    "thousands of headers": (asking(*((f"h{n}", b"V") for n in range(3000))), TOO_MUCH),
    "hundreds of headers": (asking(*((f"h{n}", b"V") for n in range(300))), "there are more than 128 headers"),
    "a long array": (asking(("a", b"A" + struct.pack(">I", 9000) + b"V" * 9000)), "there are more than 128 headers"),
    "128 KiB of headers": (asking(("h", long(b"x" * (131_072 - 300)))), TOO_MUCH),
    "type": (asking(type=short(b"\xff\xfe")), "the property type is not plain UTF-8 text"),
    "message_id": (asking(message_id=short(b"\xff" * 255)), "the property message_id is not plain UTF-8 text"),
    "correlation_id": (asking(correlation_id=short(b"a\0")), "the property correlation_id is not plain UTF-8 text"),
    "content_type": (asking(content_type=short(b"\xff")), "the property content_type is not plain UTF-8 text"),
    "reply_to": (asking(reply_to=short(b"\xff")), "the property reply_to is not plain UTF-8 text"),
    "app_id": (asking(app_id=short(b"\xff" * 255)), None),
    "cluster_id": (asking(cluster_id=short(b"\xff")), None),
    "priority": (asking(priority=b"\xff"), None),
    "reserved flag": (struct.pack(">H", 0xA032) + asking()[2:], None),
}


@pytest.mark.parametrize("name", ODD)
async def test_an_odd_message_reaches_the_handler_and_hurts_nobody(broker: Rabbit, desk: Desk, name: str) -> None:
    head, fault = ODD[name]
    async with client(broker) as channel:
        await post(channel, topology.REQUESTS.name, b"x", head, b"{}")
        await post(channel, topology.REQUESTS.name, b"x", asking(), b"{}")
        await desk.takes(2)
    odd, honest = desk.seen
    assert desk.said == ["invalid_request" if fault else "fine", "fine"]
    if fault:
        assert odd.faults[0].startswith(fault)
        problem = desk.problems[0]
        assert problem is not None
        assert problem.details["errors"][0] == {"field": "(properties)", "message": odd.faults[0]}
    assert not honest.faults
    assert len(repr(odd)) < 2 * MAX_HEADER_BYTES
    _assert_plain(dict(odd.headers))


def _assert_plain(value: Any, depth: int = 0) -> None:
    assert depth <= 4
    match value:
        case dict():
            for name, inner in value.items():
                assert isinstance(name, str)
                _assert_plain(inner, depth + 1)
        case list():
            for inner in value:
                _assert_plain(inner, depth + 1)
        case str():
            value.encode()
            assert "\0" not in value
        case int():
            assert -(2**63) <= value < 2**63
        case _:
            assert value is None or isinstance(value, float)


async def test_a_value_that_cannot_be_read_passes_for_nothing_else(broker: Rabbit, desk: Desk) -> None:
    """A precondition or a dry run that was silently forgotten would be carried out for good."""
    async with client(broker) as channel:
        fields = [
            ("if_match", long(b"\xff")),
            ("dry_run", b"t\1"),
            ("vm_id", nested(9)),
            ("n", b"l" + struct.pack(">q", 7)),
        ]
        await post(channel, topology.REQUESTS.name, b"x", asking(*fields), b"{}")
        await desk.takes(1)
    (delivery,) = desk.seen
    assert [delivery.header(name) for name in ("if_match", "dry_run", "vm_id", "n", "absent")] == [
        UNREADABLE,
        "true",
        UNREADABLE,
        "7",
        None,
    ]


async def test_a_routing_key_of_any_bytes_hurts_nobody(broker: Rabbit, desk: Desk) -> None:
    async with client(broker) as channel:
        for key in (b"\xff" * 255, b"\0", b"", b"." * 255):
            await post(channel, topology.REQUESTS.name, key, asking(), b"{}")
        await desk.takes(4)
    assert desk.seen[0].routing_key == "?" * 255


@pytest.mark.parametrize("name", STOPPED_BY_THE_BROKER)
async def test_what_the_broker_stops_reaches_nobody(broker: Rabbit, desk: Desk, name: str) -> None:
    connection = await aiormq.connect(broker.url_of(CLIENT))
    channel = await connection.channel()
    await post(channel, topology.REQUESTS.name, b"x", STOPPED_BY_THE_BROKER[name], b"{}")
    await eventually(lambda: channel.is_closed, what="the broker ends the channel")
    await connection.close()
    async with client(broker) as again:
        await post(again, topology.REQUESTS.name, b"x", asking(), b"{}")
        await desk.takes(1)
    assert desk.said == ["fine"]


async def test_a_body_that_is_too_large_is_cut_as_it_arrives_and_kept_short(broker: Rabbit, desk: Desk) -> None:
    async with client(broker) as channel:
        await post(channel, topology.REQUESTS.name, b"x", asking(), b"{}" + b" " * (MAX_REQUEST_BYTES - 2))
        await post(channel, topology.REQUESTS.name, b"x", asking(), b"{}" + b" " * (MAX_REQUEST_BYTES - 1))
        await desk.takes(2)
    assert desk.said == ["fine", "body_too_large"]
    assert desk.seen[1].length == MAX_REQUEST_BYTES + 1
    assert len(desk.seen[1].body) == 16 * 1024
    body, headers = await the_dead(broker)
    assert len(body) == 16 * 1024
    assert headers["dead_length"] == MAX_REQUEST_BYTES + 1


async def the_dead(broker: Rabbit) -> tuple[bytes, dict[str, Any]]:
    """The oldest message in `leveret.dead`, once there is one."""
    connection = await aiormq.connect(broker.url)
    channel = await connection.channel()

    async def found() -> aiormq.abc.DeliveredMessage | None:
        message = await channel.basic_get(topology.DEAD_QUEUE.name, no_ack=True)
        return message if message.body or message.header.properties.headers else None

    message = await eventually(found)
    await connection.close()
    return bytes(message.body), dict(message.header.properties.headers or {})


async def test_what_is_buried_takes_along_only_what_is_small_and_harmless(broker: Rabbit, desk: Desk) -> None:
    fields = [
        *((f"h{n}", long("x" * 300)) for n in range(40)),
        ("CC", b"A" + struct.pack(">I", 8) + long("abc")),
        ("dead_code", long("fine")),
        ("table", nested(3)),
        ("x-match", long("all")),
    ]
    async with client(broker) as channel:
        head = asking(*fields, type=short(b"\xff" * 255), correlation_id=short(b"\xff" * 255))
        await post(channel, topology.REQUESTS.name, b"x", head, b"{" * 100_000)
        await desk.takes(1)
    body, headers = await the_dead(broker)
    assert body == b"{" * 16 * 1024
    assert headers.pop("dead_code") == "invalid_request"
    assert {name: headers.pop(name) for name in list(headers) if name.startswith(("dead_", "x-"))} == {
        "dead_queue": topology.REQUESTS_QUEUE.name,
        "dead_message": "The message's properties are not valid.",
        "dead_user": CLIENT,
        "dead_message_id": "",
        "dead_length": 100_000,
        "x-delivery-count": 0,
    }
    assert headers == {f"h{n}": "x" * 256 for n in range(32)}


async def test_a_message_that_was_handed_out_too_often_is_buried_unread(
    broker: Rabbit, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "REDELIVERIES_MAX", 3)
    await desk.consumer.stop(2)
    await desk.consuming.stop()
    async with client(broker) as channel:
        await post(channel, topology.REQUESTS.name, b"x", asking(), b"{}")
    async with client(broker, "leveret-conductor") as channel:
        for _ in range(3):
            message = await eventually(lambda: _taken(channel))
            await channel.basic_nack(message.delivery_tag, requeue=True)
    other = Desk(broker)
    other.publishing.start()
    other.consuming.start()
    other.consumer.start()
    _, headers = await the_dead(broker)
    assert headers["dead_code"] == Code.HANDLER_CRASHED
    assert not other.seen
    await other.consumer.stop(2)
    await other.consuming.stop()
    await other.publishing.stop()


async def _taken(channel: aiormq.abc.AbstractChannel) -> aiormq.abc.DeliveredMessage | None:
    message = await channel.basic_get(topology.REQUESTS_QUEUE.name)
    return message if message.delivery_tag else None


async def test_an_expired_message_of_any_kind_stops_nothing(broker: Rabbit) -> None:
    """The broker's own dead-lettering would stop for good at the third of these."""
    deaths = [b"V", long("x"), b"A" + struct.pack(">I", 1) + b"V"]
    async with client(broker) as channel:
        for death in deaths:
            await post(channel, topology.REQUESTS.name, b"x", asking(("x-death", death), expiration="1"), b"{}")
        await post(channel, topology.REQUESTS.name, b"x", asking(), b"{}")
    async with client(broker, "leveret-conductor") as channel:

        async def only_the_last() -> bool:
            return (await channel.queue_declare(topology.REQUESTS_QUEUE.name, passive=True)).message_count == 1

        await eventually(only_the_last)


Trick = Callable[[aiormq.abc.AbstractChannel], Any]


async def by_dead_lettering(channel: aiormq.abc.AbstractChannel) -> None:
    """An event of the conductor's is led into the requests by a queue whose messages expire at once."""
    arguments: dict[str, Any] = {
        "x-message-ttl": 0,
        "x-dead-letter-exchange": topology.REQUESTS.name,
        "x-expires": 20_000,
    }
    await channel.queue_declare("client.ada.trick", arguments=arguments)
    await channel.queue_bind("client.ada.trick", topology.events_exchange("default").name, "#")


async def by_binding(channel: aiormq.abc.AbstractChannel) -> None:
    """The same by a binding between exchanges, which leaves no trace in the headers."""
    source = topology.events_exchange("default").name
    await channel.exchange_bind(destination=topology.REQUESTS.name, source=source, routing_key="#")


async def by_alternate(channel: aiormq.abc.AbstractChannel) -> None:
    """Its own message, by way of an exchange of its own."""
    arguments: dict[str, Any] = {"alternate-exchange": topology.REQUESTS.name}
    await channel.exchange_declare("client.ada.trick", exchange_type="fanout", auto_delete=True, arguments=arguments)
    await post(channel, "client.ada.trick", b"x", asking(), b"{}")


@pytest.mark.parametrize("trick", [by_dead_lettering, by_binding, by_alternate])
async def test_what_comes_by_another_way_is_not_taken_for_its_senders_request(
    broker: Rabbit, desk: Desk, trick: Trick
) -> None:
    events = topology.events_exchange("default").name
    async with client(broker, "leveret-conductor") as conductor, client(broker) as channel:
        await conductor.exchange_declare(events, exchange_type="topic", durable=True)
        await trick(channel)
        if trick is not by_alternate:
            head = asking(user_id="leveret-conductor")
            await post(conductor, events, b"vm.x.running", head, b"{}")
        await desk.takes(1)
        await conductor.exchange_delete(events)
        with_the_trick_gone = await aiormq.connect(broker.url)
        cleaner = await with_the_trick_gone.channel()
        await cleaner.queue_delete("client.ada.trick")
        await cleaner.exchange_delete("client.ada.trick")
        await with_the_trick_gone.close()
    (delivery,) = desk.seen
    assert delivery.strayed
    assert desk.said == ["invalid_request"]
    # The broker does not check again who is said to have sent it.
    assert delivery.user_id == (CLIENT if trick is by_alternate else "leveret-conductor")


async def test_thousands_of_hostile_messages_are_each_told_what_is_wrong_with_them(broker: Rabbit, desk: Desk) -> None:
    count = 2500
    sent: list[Hostile] = list(islice(hostile_messages(20261122, CLIENT), count))
    async with client(broker) as channel:
        for message in sent:
            await message.send(channel)
        await desk.takes(count, within_s=60)
    told: Counter[str] = Counter()
    for message, said in zip(sent, desk.said, strict=True):
        expected = {code if code in SAID_BY_THE_BUS else "fine" for code in message.codes}
        # Who may ask for what, and where to, is for the handler to say.
        if message.label in {"copies", "foreign_reply_to", "bad_vm_id"}:
            expected = {"fine"}
        assert said in expected, (message.label, said, message.head[:300], message.body[:100])
        told[said] += 1
    assert set(told) == {*SAID_BY_THE_BUS, "fine"}
    assert desk.ups == 1


FORGED = [
    f"amq.rabbitmq.reply-to.{address}"
    for address in (
        "a.b",
        base64.b64encode(b"\x83Xv\0\7reply@1" + bytes(12)).decode() + ".key",
        base64.b64encode(b"\x83Xv\0\7reply@1" + b"\xff" * 12).decode() + ".key",
    )
]


@pytest.mark.parametrize("forged", FORGED)
async def test_a_made_up_reply_address_costs_nobody_else_an_answer(broker: Rabbit, desk: Desk, forged: str) -> None:
    link = Link(broker.url_of("leveret-conductor"), "test-answers")
    answerer = Answerer(link, "leveret-conductor")
    link.start()
    answerer.start()
    heard: list[str | None] = []

    async def hear(message: aiormq.abc.DeliveredMessage) -> None:
        heard.append(message.header.properties.correlation_id)

    try:
        async with client(broker, "otto") as honest, client(broker) as channel:
            await honest.basic_consume("amq.rabbitmq.reply-to", hear, no_ack=True)
            await post(channel, topology.REQUESTS.name, b"x", asking(reply_to=forged), b"{}")
            await desk.takes(1)
            head = asking(user_id="otto", reply_to="amq.rabbitmq.reply-to", correlation_id="7")
            await post(honest, topology.REQUESTS.name, b"x", head, b"{}")
            await desk.takes(2)
            for delivery in desk.seen:
                answerer.answer(delivery, Verdict(request_id="r", vm_id=None, accepted=False))
            await eventually(lambda: heard == ["7"], what="the other client gets its answer")
            assert answerer.is_muted(CLIENT)
            assert not answerer.is_muted("otto")
    finally:
        await answerer.stop()
        await link.stop()
