"""A man in the middle of AMQP: what is published through it is doubled, held back, overtaken and lost.

It sits on the wire between one process and the broker, so that users, exchanges and confirms stay the broker's own. It
understands just enough of AMQP 0-9-1 to take whole messages out of the stream of frames, and to keep the books of
publisher confirms: the broker numbers what it gets, a client what it sent, and these are not the same any more.
"""

import asyncio
import random
import struct
from collections import Counter
from dataclasses import dataclass, field

from pamqp.header import ContentHeader
from proxy import Line, Proxy

PROTOCOL_HEADER_BYTES = 8
_FRAME = struct.Struct(">BHI")
_METHOD_ID = struct.Struct(">HH")
_METHOD, _HEADER, _BODY, _END = 1, 2, 3, b"\xce"
_PUBLISH, _ACK, _NACK = (60, 40), (60, 80), (60, 120)
_OPEN, _SELECT = (20, 10), (85, 10)
#: An acknowledgement: class, method, delivery tag, and bits of which the lowest is `multiple`.
_TAGGED = struct.Struct(">HHQB")


@dataclass(frozen=True)
class Odds:
    """What happens to messages: how likely each is lost, held back, or sent up to `copies` times within `horizon_s`.

    Of those that arrive, the confirm is `unconfirmed` that often. What is lost is never confirmed.
    """

    lost: float = 0.1
    held: float = 0.4
    doubled: float = 0.2
    copies: int = 10
    horizon_s: float = 8.0
    unconfirmed: float = 0.05


@dataclass
class Frame:
    kind: int
    channel: int
    payload: bytes

    @property
    def method(self) -> tuple[int, int] | None:
        return _METHOD_ID.unpack_from(self.payload) if self.kind == _METHOD else None

    def bytes(self) -> bytes:
        return _FRAME.pack(self.kind, self.channel, len(self.payload)) + self.payload + _END


@dataclass
class Channel:
    """The books of one channel that is in confirm mode."""

    published: int = 0  # by the client
    delivered: int = 0  # to the broker
    open: dict[int, int | None] = field(default_factory=dict)  # broker's number -> client's; None for a copy


@dataclass
class Message:
    """A message that is not whole yet."""

    frames: list[Frame]
    kind: str = "?"
    left: int = 0


class Shuffler(Proxy):
    """A proxy to a broker that shuffles what is published through it, once it is told to begin."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.shuffling = False
        self.on_the_way = 0
        self.shuffle(Odds(), 0)
        self.shuffling = False

    def shuffle(self, odds: Odds, seed: int) -> None:
        """Begin, and count anew."""
        self.odds = odds
        self.shuffling = True
        self.lost: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.doubled: Counter[str] = Counter()
        self._chance = random.Random(seed)

    def report(self) -> str:
        kinds = sorted(self.lost.keys() | self.held.keys() | self.doubled.keys())
        return ", ".join(f"{kind} {self.lost[kind]}/{self.held[kind]}/{self.doubled[kind]}" for kind in kinds)

    async def converse(self, line: Line, far_reader: asyncio.StreamReader, far_writer: asyncio.StreamWriter) -> None:
        talk = Talk(self, line, far_reader, far_writer)
        directions = {asyncio.create_task(talk.outward()), asyncio.create_task(talk.homeward())}
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)

    def fate(self, kind: str) -> list[float]:
        """After how many seconds each copy of a message is passed on; empty when it is lost."""
        odds, chance = self.odds, self._chance
        if not self.shuffling:
            return [0.0]
        if chance.random() < odds.lost:
            self.lost[kind] += 1
            return []
        fate = [0.0]
        if chance.random() < odds.held:
            self.held[kind] += 1
            fate = [odds.horizon_s * chance.random() ** 2]
        if chance.random() < odds.doubled:
            self.doubled[kind] += 1
            fate += [odds.horizon_s * chance.random() for _ in range(chance.randrange(1, odds.copies))]
        return fate

    def is_unconfirmed(self) -> bool:
        return self.shuffling and self._chance.random() < self.odds.unconfirmed


class Talk:
    """One connection of a client."""

    def __init__(
        self, shuffler: Shuffler, line: Line, far_reader: asyncio.StreamReader, far_writer: asyncio.StreamWriter
    ) -> None:
        self._shuffler = shuffler
        self._line = line
        self._far_reader, self._far_writer = far_reader, far_writer
        self._channels: dict[int, Channel] = {}
        self._messages: dict[int, Message] = {}

    async def outward(self) -> None:
        """From the client to the broker."""
        self._far_writer.write(await self._line.near_reader.readexactly(PROTOCOL_HEADER_BYTES))
        while True:
            self._take(await _next(self._line.near_reader))
            await self._line.flowing.wait()
            await self._far_writer.drain()

    async def homeward(self) -> None:
        """From the broker to the client."""
        while True:
            frame = await _next(self._far_reader)
            await self._line.flowing.wait()
            for answer in self._confirms(frame):
                self._line.near_writer.write(answer.bytes())
            await self._line.near_writer.drain()

    def _take(self, frame: Frame) -> None:
        number = frame.channel
        match frame.method:
            case m if m == _PUBLISH:
                self._messages[number] = Message([frame])
                return
            case m if m == _SELECT:
                self._channels[number] = Channel()
            case m if m == _OPEN:
                self._channels.pop(number, None)
        message = self._messages.get(number)
        if message is None or frame.kind not in {_HEADER, _BODY}:
            self._far_writer.write(frame.bytes())
            return
        message.frames.append(frame)
        if frame.kind == _HEADER:
            header = ContentHeader()
            header.unmarshal(frame.payload)
            message.left, message.kind = header.body_size, header.properties.message_type or "?"
        else:
            message.left -= len(frame.payload)
        if message.left == 0:
            self._publish(number, self._messages.pop(number))

    def _publish(self, number: int, message: Message) -> None:
        channel = self._channels.get(number)
        tag = None
        if channel is not None:
            channel.published += 1
            tag = channel.published
        for copy, after_s in enumerate(self._shuffler.fate(message.kind)):
            own = tag if copy == 0 else None
            if after_s:
                self._shuffler.on_the_way += 1
                asyncio.get_running_loop().call_later(after_s, self._arrive, number, channel, message, own)
            else:
                self._send(channel, message, own)

    def _arrive(self, number: int, channel: Channel | None, message: Message, tag: int | None) -> None:
        """What was held back is passed on, unless its connection or its channel is gone: then it is lost as well."""
        self._shuffler.on_the_way -= 1
        if not self._far_writer.is_closing() and self._channels.get(number) is channel:
            self._send(channel, message, tag)

    def _send(self, channel: Channel | None, message: Message, tag: int | None) -> None:
        if channel is not None:
            channel.delivered += 1
            channel.open[channel.delivered] = tag
        for frame in message.frames:
            self._far_writer.write(frame.bytes())

    def _confirms(self, frame: Frame) -> list[Frame]:
        """What the client is told in place of this frame: of a confirm, which of its own messages are meant."""
        channel = self._channels.get(frame.channel)
        if channel is None or frame.method not in {_ACK, _NACK}:
            return [frame]
        class_id, method_id, delivered, bits = _TAGGED.unpack_from(frame.payload)
        meant = [delivered] if not bits & 1 else [tag for tag in channel.open if tag <= delivered]
        own = [channel.open.pop(tag, None) for tag in meant]
        return [
            Frame(frame.kind, frame.channel, _TAGGED.pack(class_id, method_id, tag, 0))
            for tag in own
            if tag is not None and not self._shuffler.is_unconfirmed()
        ]


async def _next(reader: asyncio.StreamReader) -> Frame:
    """The next frame. Raises IncompleteReadError at the end."""
    kind, channel, size = _FRAME.unpack(await reader.readexactly(_FRAME.size))
    payload = await reader.readexactly(size + 1)
    return Frame(kind, channel, payload[:-1])
