"""Hostile AMQP clients: raw frames with whatever bytes they like in properties and headers."""

import base64
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any
from uuid import UUID

import aiormq
from aiormq.abc import ChannelFrame

from leveret.shared.documents import MAX_REQUEST_BYTES

#: Bits and order of the properties in a content header (AMQP 0-9-1, section 2.3.5.1 and class basic).
FLAGS = {
    "content_type": 15,
    "content_encoding": 14,
    "headers": 13,
    "delivery_mode": 12,
    "priority": 11,
    "correlation_id": 10,
    "reply_to": 9,
    "expiration": 8,
    "message_id": 7,
    "timestamp": 6,
    "type": 5,
    "user_id": 4,
    "app_id": 3,
    "cluster_id": 2,
}


def short(text: str | bytes) -> bytes:
    """A short string: one byte of length, then anything."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">B", len(raw)) + raw


def long(text: str | bytes) -> bytes:
    """A field value: a long string, which may hold anything."""
    raw = text.encode() if isinstance(text, str) else text
    return b"S" + struct.pack(">I", len(raw)) + raw


def table(*fields: tuple[str | bytes, bytes]) -> bytes:
    """A table of names and encoded field values; a name may stand there twice."""
    inner = b"".join(short(name) + value for name, value in fields)
    return struct.pack(">I", len(inner)) + inner


def nested(depth: int, kind: bytes = b"F") -> bytes:
    """A field value of this many tables (`F`) or arrays (`A`) in each other."""
    value = b"V"
    parts = []
    size = 1
    name = short("n") if kind == b"F" else b""
    for _ in range(depth):
        size += len(name)
        parts.append(name)
        parts.append(kind + struct.pack(">I", size))
        size += 5
    return b"".join(reversed(parts)) + value


def properties(**given: Any) -> bytes:
    """Flags and values; text is encoded as a short string, bytes are put in as they are."""
    flags, values = 0, b""
    for name, bit in FLAGS.items():
        if (value := given.pop(name, None)) is not None:
            flags |= 1 << bit
            values += short(value) if isinstance(value, str) else value
    assert not given, given
    return struct.pack(">H", flags) + values


def frames(number: int, frame_max: int, exchange: str, key: bytes, head: bytes, body: bytes) -> bytes:
    """Basic.Publish, content header and body frames, as they go over the wire."""
    publish = struct.pack(">HHH", 60, 40, 0) + short(exchange) + short(key) + b"\0"
    header = struct.pack(">HHQ", 60, 0, len(body)) + head
    size = frame_max - 8
    pieces = [(1, publish), (2, header), *((3, body[at : at + size]) for at in range(0, len(body), size))]
    return b"".join(struct.pack(">BHI", kind, number, len(data)) + data + b"\xce" for kind, data in pieces)


async def post(channel: aiormq.abc.AbstractChannel, exchange: str, key: bytes, head: bytes, body: bytes) -> None:
    """Put one message on the wire, without asking what becomes of it."""
    assert isinstance(channel, aiormq.channel.Channel)
    payload = frames(channel.number, channel.connection.connection_tune.frame_max, exchange, key, head, body)
    await channel.write_queue.put(ChannelFrame(payload, False))


# What a client may send that the broker lets through, and what must be said about it.

#: The request is read without complaint: what is said depends on the VM it names, which does not exist.
FINE = frozenset({"vm_not_found"})
INVALID = frozenset({"invalid_request"})
CREATE = b'{"vcpus":1,"memory_mib":128,"disk_gib":1,"image":{"name":"tiny"}}'


@dataclass(frozen=True, slots=True)
class Hostile:
    """A message with one thing wrong with it. `codes` are the reasons of which one must be given for it."""

    label: str
    key: bytes
    head: bytes
    body: bytes
    codes: frozenset[str]

    async def send(self, channel: aiormq.abc.AbstractChannel, exchange: str = "leveret.requests") -> None:
        await post(channel, exchange, self.key, self.head, self.body)


class _Draft:
    """An honest request about a VM that is not there, until something is done to it."""

    def __init__(self, random: Random, user: str) -> None:
        self.random = random
        self.key = b"vm.start.v1"
        self.body = b"{}"
        self.codes = FINE
        self.properties: dict[str, str | bytes | None] = {
            "content_type": "application/json",
            "type": "vm.start.v1",
            "message_id": f"{random.getrandbits(128):032x}",
            "user_id": user,
        }
        self.headers: list[tuple[str | bytes, bytes]] = [("vm_id", long(str(UUID(int=random.getrandbits(128)))))]

    def finish(self, label: str) -> Hostile:
        head = properties(headers=table(*self.headers), **self.properties)
        return Hostile(label, self.key, head, self.body, self.codes)

    def create(self, body: bytes) -> None:
        self.properties["type"], self.body, self.codes = "vm.create.v1", body, INVALID

    def noise(self, most: int) -> bytes:
        """Some bytes of which at least the first is no UTF-8."""
        return b"\xff" + self.random.randbytes(self.random.randint(0, most - 1))


def _bad_json(draft: _Draft) -> None:
    whole = [b"", b"{", b"nul", b"[1,2", b"{}{}", b"{'a':1}", b"{}\0", b"\xef\xbb\xbf{}", '{"a":1}'.encode("utf-16")]
    cut = CREATE[: draft.random.randrange(1, len(CREATE) - 1)]
    draft.create(draft.random.choice([*whole, cut, draft.noise(200)]))


def _not_utf8(draft: _Draft) -> None:
    draft.create(CREATE.replace(b"tiny", draft.noise(20).replace(b'"', b"").replace(b"\\", b"")))


def _wrong_schema(draft: _Draft) -> None:
    values = [b"{}", b"[]", b"null", b"1", b'"x"', b"-1", b"0", b"1.5", b"true", b"1e400", b"9" * 400]
    field = draft.random.choice([b'"vcpus":', b'"memory_mib":', b'"disk_gib":', b'"image":'])
    start = CREATE.index(field) + len(field)
    # Whole numbers that are allowed would make it a good one.
    wrong = draft.random.choice([value for value in values if value != b"1"])
    end = CREATE.index(b"}" if field == b'"image":' else b",", start) + (field == b'"image":')
    draft.create(
        draft.random.choice(
            [
                CREATE[:start] + wrong + CREATE[end:],
                CREATE[:-1] + b',"surprise":1}',
                CREATE[:-1] + b',"vcpus":1}',
                b"{}",
                b"[" + CREATE + b"]",
            ]
        )
    )


def _too_deep(draft: _Draft) -> None:
    depth = draft.random.randint(300, 50_000)
    draft.create(
        draft.random.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth])
    )


def _too_big(draft: _Draft) -> None:
    draft.create(b" " * draft.random.randint(MAX_REQUEST_BYTES, MAX_REQUEST_BYTES + 4096) + CREATE)
    draft.codes = frozenset({"body_too_large"})


def _unknown_type(draft: _Draft) -> None:
    internal = ["host.report", "host.desired", "host.heartbeat", "project.create.v1", "token.create.v1", "vm.event.v1"]
    other = ["vm.start.v9", "vm.start", "vm.explode.v1", "x" * 255, "vm.start.v1 ", "VM.START.V1", None]
    draft.properties["type"] = draft.random.choice([*internal, *other])
    draft.codes = frozenset({"unknown_type"})


def _wrong_content_type(draft: _Draft) -> None:
    wrong = ["text/plain", None, "application/json; charset=latin-1", "application/jsonp", "application/json; v=2", ";"]
    draft.properties["content_type"] = draft.random.choice(wrong)
    draft.codes = frozenset({"unsupported_content_type"})


def _wrong_encoding(draft: _Draft) -> None:
    draft.properties["content_encoding"] = draft.random.choice(["gzip", "latin-1", "utf-8, gzip", "x" * 255])
    draft.codes = frozenset({"unsupported_content_type"})


def _unreadable_property(draft: _Draft) -> None:
    name = draft.random.choice(["type", "message_id", "correlation_id", "content_type", "content_encoding"])
    draft.properties[name] = short(draft.random.choice([draft.noise(250), b"a\0b", b"\x1b[31m", b"\r\n"]))
    draft.codes = INVALID


def _odd_property(draft: _Draft) -> None:
    """What nobody here looks at may say anything."""
    number = struct.pack(">Q", draft.random.choice([2**63 - 1, 2**64 - 1, 10**17, 0]))
    odd: list[tuple[str, str | bytes]] = [
        ("timestamp", number),
        ("priority", bytes([draft.random.randrange(256)])),
        ("app_id", short(draft.noise(250))),
        ("cluster_id", short(draft.noise(250))),
        ("delivery_mode", draft.random.choice([b"\1", b"\2"])),
        ("content_encoding", draft.random.choice(["utf-8", "UTF-8", "identity"])),
        ("content_type", draft.random.choice(["application/json; charset=utf-8", "Application/JSON;charset=UTF-8"])),
    ]
    for name, value in draft.random.sample(odd, draft.random.randint(1, 3)):
        draft.properties[name] = value


def _odd_header(draft: _Draft) -> None:
    """A header that nobody knows may hold anything."""
    values = [
        b"T" + struct.pack(">Q", 2**64 - 1),
        b"D" + struct.pack(">BI", 255, 2**32 - 1),
        b"x" + struct.pack(">I", 3) + b"\xff\0\1",
        b"l" + struct.pack(">q", -(2**63)),
        b"f" + struct.pack(">f", 1e38),
        b"V",
        long(draft.noise(500)),
        long(b"\0"),
        nested(draft.random.randint(1, 200)),
        nested(draft.random.randint(1, 200), b"A"),
    ]
    draft.headers += [(f"odd-{n}", value) for n, value in enumerate(draft.random.sample(values, 3))]


def _bad_headers(draft: _Draft) -> None:
    bad: list[list[tuple[str | bytes, bytes]]] = [
        [(f"h{n}", b"V") for n in range(draft.random.randint(200, 2000))],
        [("big", long(b"x" * draft.random.randint(20_000, 100_000)))],
        [(draft.noise(50), b"V")],
        [("vm_id", long(str(UUID(int=1))))],
        [("array", b"A" + struct.pack(">I", 5000) + b"V" * 5000)],
    ]
    draft.headers += draft.random.choice(bad)
    draft.codes = INVALID


def _bad_vm_id(draft: _Draft) -> None:
    wrong = [
        long(""),
        long("x"),
        long("0" * 500),
        long(b"\xff"),
        b"V",
        b"t\1",
        nested(3),
        long("\0"),
        long("../../etc"),
    ]
    draft.headers = [("vm_id", draft.random.choice(wrong))] if draft.random.random() < 0.9 else []
    draft.codes = INVALID


def _foreign_reply_to(draft: _Draft) -> None:
    draft.properties["reply_to"] = draft.random.choice(["leveret.conductor.requests", "leveret.dead", "client.other.q"])
    draft.codes = INVALID


def _forged_reply_to(draft: _Draft) -> None:
    """Answers to these would end the connection that sends them: RabbitMQ cannot decode the address."""
    pid = base64.b64encode(b"\x83Xv\0\7reply@1" + draft.random.randbytes(12)).decode()
    forged = ["garbage", "a.b", "", f"{pid}.key", "A" * 200, "g2gCYQFhAg==.x"]
    draft.properties["reply_to"] = f"amq.rabbitmq.reply-to.{draft.random.choice(forged)}"
    draft.codes = INVALID | FINE


def _copies(draft: _Draft) -> None:
    copy = long("leveret.hosts")
    draft.headers += [("CC", b"A" + struct.pack(">I", len(copy)) + copy)]
    draft.codes = INVALID


def _blind_copies(draft: _Draft) -> None:
    """The broker removes them, and they lead nowhere else: one queue takes all requests."""
    copy = long("leveret.hosts")
    draft.headers += [("BCC", b"A" + struct.pack(">I", len(copy)) + copy)]


def _nobody(draft: _Draft) -> None:
    draft.properties["user_id"] = None
    draft.codes = frozenset({"unauthenticated"})


def _other_project(draft: _Draft) -> None:
    draft.headers += [("project", long("other"))]
    draft.codes = frozenset({"forbidden"})


def _dead_lettered(draft: _Draft) -> None:
    death = table(("queue", long("leveret.conductor.requests")), ("count", b"l" + struct.pack(">q", 1)))
    draft.headers += draft.random.choice(
        [
            [("x-death", b"A" + struct.pack(">I", len(death) + 1) + b"F" + death)],
            [("x-death", b"A" + struct.pack(">I", 1) + b"V")],
            [("x-first-death-queue", long("x"))],
        ]
    )
    draft.codes = INVALID


def _odd_key(draft: _Draft) -> None:
    """Routing keys are for nobody: the type says what a request is."""
    draft.key = draft.random.choice([b"", b"#", draft.noise(255), b"a" * 255, b"." * 255, b"\0"])


#: What is done, and how often, in proportion: bodies beyond the limit are heavy.
KINDS: dict[Callable[[_Draft], None], float] = {
    _bad_json: 10,
    _not_utf8: 5,
    _wrong_schema: 10,
    _too_deep: 2,
    _too_big: 0.2,
    _unknown_type: 5,
    _wrong_content_type: 4,
    _wrong_encoding: 3,
    _unreadable_property: 8,
    _odd_property: 8,
    _odd_header: 8,
    _bad_headers: 4,
    _bad_vm_id: 5,
    _foreign_reply_to: 3,
    _forged_reply_to: 3,
    _copies: 2,
    _blind_copies: 2,
    _nobody: 3,
    _other_project: 3,
    _dead_lettered: 3,
    _odd_key: 4,
}


def hostile_messages(seed: int, user: str) -> Iterator[Hostile]:
    """An endless row of hostile messages that the broker lets through, the same for a seed; from this broker user."""
    random = Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        (kind,) = random.choices(kinds, weights)
        draft = _Draft(random, user)
        kind(draft)
        yield draft.finish(kind.__name__.strip("_"))


#: Content headers for which the broker itself ends the channel or the connection: they never reach a consumer.
STOPPED_BY_THE_BROKER = {
    "unknown kind of value": properties(headers=table(("z", b"Z1234"))),
    "not a number": properties(headers=table(("d", b"d\x7f\xf8" + bytes(6)))),
    "truncated table": properties(headers=struct.pack(">I", 50) + b"\1a"),
    "endless table": properties(headers=struct.pack(">I", 2**31)),
    "value beyond its table": properties(headers=table(("a", b"S" + struct.pack(">I", 1000) + b"x"))),
    "values missing": struct.pack(">H", 0xFFFC),
    "trailing bytes": properties(type="x") + b"garbage",
    "more flags": struct.pack(">HH", 1, 0x8000),
    "expiration": properties(expiration="soon"),
    "delivery mode": properties(delivery_mode=b"\xff"),
    "CC is no list": properties(headers=table(("CC", long("x")))),
    "direct reply without a consumer": properties(reply_to="amq.rabbitmq.reply-to"),
    "forged user": properties(user_id="leveret-api"),
}
