"""Consuming: micro-batches in, outcomes out, and only this file acknowledges (law 2)."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import aiormq
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection
from pydantic import BaseModel

from leveret.shared import topology
from leveret.shared.bus.link import BROKER_ERRORS, Link
from leveret.shared.bus.publishing import Envelope, Publisher
from leveret.shared.bus.reading import UNREADABLE, faults_of
from leveret.shared.documents import MAX_REQUEST_BYTES
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.fault_points import take
from leveret.shared.messages import CONTENT_TYPE, Registry, decode, invalid

log = structlog.get_logger()


#: What the broker writes into a message that it dead-letters (RabbitMQ's documentation, "Dead-lettered messages").
_DEAD_LETTERED = {
    f"x-{when}death{what}"
    for when, what in (("", ""), *product(("first-", "last-"), ("-queue", "-reason", "-exchange")))
}

#: What is kept of a body that is too large to be worked on, and of one that is buried.
KEPT_BYTES = 16 * 1024
#: Headers that go with a message into `leveret.dead`, and the characters kept of each.
BURIED_HEADERS_MAX = 32
BURIED_TEXT_MAX = 256


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it came, not yet trusted. Everything in it is bounded plain data.

    `cut_bytes` were dropped from the end of a body that is too large. `faults` are parts that could not be read:
    what stands in the other fields is then not all that was said. `strayed` means that the message did not come
    straight from its sender through the queue's own exchange: the broker checked `user_id` for another place, and
    it may be somebody else's message that was led here by a binding or by dead-lettering. `waited` means that it lay in
    the queue while nobody could work on it: how many come at once is then not its sender's doing.
    """

    queue: str
    body: bytes
    type: str | None
    content_type: str | None
    headers: Mapping[str, Any]
    message_id: str | None
    user_id: str | None
    reply_to: str | None
    correlation_id: str | None
    content_encoding: str | None = None
    exchange: str = ""
    routing_key: str = ""
    cut_bytes: int = 0
    faults: tuple[str, ...] = ()
    strayed: bool = False
    waited: bool = False

    @property
    def length(self) -> int:
        """Bytes of the body as it was sent."""
        return len(self.body) + self.cut_bytes

    def decoded(self, *, among: Registry | None = None) -> BaseModel:
        """The message inside. Raises LeveretError with the reason when there is none."""
        if self.strayed:
            raise invalid("a message must be published to its exchange by its sender", field="(path)")
        if self.faults:
            errors = [{"field": "(properties)", "message": fault} for fault in self.faults]
            raise fail(Code.INVALID_REQUEST, "The message's properties are not valid.", errors=errors)
        if not _is_json(self.content_type):
            raise fail(Code.UNSUPPORTED_CONTENT_TYPE, f"The content type is {str(self.content_type)[:64]!r}.")
        if (self.content_encoding or "").lower() not in {"", "identity", "utf-8"}:
            raise fail(
                Code.UNSUPPORTED_CONTENT_TYPE,
                f"The content encoding is {str(self.content_encoding)[:64]!r}, not utf-8.",
            )
        if self.cut_bytes:
            raise fail(Code.BODY_TOO_LARGE, f"The body has {self.length} bytes; {MAX_REQUEST_BYTES} may be sent.")
        return decode(self.type, self.body, among=among)

    def header(self, name: str) -> str | None:
        """A header as text; None when it is not there. True is "true", 5 is "5", a table or a list "(unreadable)"."""
        match self.headers.get(name):
            case None:
                return None
            case str() as text:
                return text
            case bool() as flag:
                return str(flag).lower()
            case int() | float() as number:
                return str(number)
            case _:
                return UNREADABLE


def _is_json(content_type: str | None) -> bool:
    """Whether this is `application/json`, in any case; its only parameter may be `charset=utf-8`."""
    kind, *parameters = (part.strip() for part in (content_type or "").lower().split(";"))
    return kind == CONTENT_TYPE and all(
        parameter.replace('"', "") in {"", "charset=utf-8", "charset=utf8"} for parameter in parameters
    )


@dataclass(frozen=True, slots=True)
class Done:
    """The effect is durable."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Not now: hand it over again after a while. It stays unacknowledged, so nothing is lost meanwhile."""

    after_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Reject:
    """Never: keep it in `leveret.dead` with this reason."""

    problem: Problem


Outcome = Done | Retry | Reject
DONE = Done()
Handler = Callable[[Sequence[Delivery]], Awaitable[Sequence[Outcome]]]


class Paused(Exception):
    """An infrastructure error: this batch must wait, unchanged and unacknowledged, until its store is back."""


_WORN_OUT = Reject(Problem.of(Code.HANDLER_CRASHED, "This message was handed out again and again, and never finished."))


@dataclass(slots=True)
class _Held:
    delivery: Delivery
    tag: int
    channel: aiormq.abc.AbstractChannel
    redelivered: bool = False
    crashes: int = 0

    @property
    def is_worn_out(self) -> bool:
        """Whether it was handed out so often, by the broker's count, that it must be what ends its consumers."""
        count = self.delivery.headers.get("x-delivery-count") if self.redelivered else None
        return isinstance(count, int) and count >= topology.REDELIVERIES_MAX


class Consumer:
    """Hands a queue's messages to a handler in micro-batches, and acknowledges what it says is done.

    While a batch is worked on the next one gathers, so batches grow with the load and are one message long when
    idle. On `Paused` the consumer waits and tries the same batch again; it never gives messages back in a loop.
    A handler that crashes gets its messages one by one; one that crashes it three times is rejected, and `lament` is
    told of it, which the handler itself could not be. One that takes longer than `limit_s` is broken off, and has its
    batch again.

    The bytes it holds are bounded by the prefetch, two batches, times the largest request: a body beyond that is cut
    as it arrives.
    """

    CRASHES_ALLOWED = 3

    def __init__(
        self,
        link: Link,
        queue: topology.Queue,
        handle: Handler,
        morgue: Publisher,
        *,
        batch_max: int = 200,
        lament: Callable[[Delivery, Problem], Awaitable[None]] | None = None,
        limit_s: float = 60.0,
    ) -> None:
        self.queue = queue.name
        self._carries = queue.carries
        self._exchanges = {exchange.name for exchange, _ in queue.bindings}
        self._link = link
        self._handle = handle
        self._morgue = morgue
        self._lament = lament
        self._batch_max = batch_max
        self._limit_s = limit_s
        self._inbox: deque[_Held] = deque()
        self._unacked: dict[int, None] = {}  # tags of this channel, oldest first
        self._arrived = asyncio.Event()
        self._progress = asyncio.Event()  # set, and replaced, whenever something is acknowledged
        self._channel: aiormq.abc.AbstractChannel | None = None
        self._owner: AbstractChannel | None = None
        self._tag: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self.is_consuming = False
        self.handled = 0  # messages that came to an end here
        self._attentive_since = math.inf
        self._backlog = 0  # messages still to come that lay in the queue while nobody worked
        self._is_paused = False
        link.add(self)

    async def attach(self, connection: AbstractConnection) -> None:
        self._inbox.clear()
        if self._stopping:
            return
        self._owner = await connection.channel(publisher_confirms=False)
        channel = await self._owner.get_underlay_channel()
        await channel.basic_qos(prefetch_count=2 * self._batch_max)
        channel.on_consumer_cancel_callbacks.add(self._cancelled_by_broker)
        self._channel = channel
        channel.closing.add_done_callback(lambda closing: self._channel_closed(channel, closing))
        self._backlog = await self._depth()
        answer = await channel.basic_consume(self.queue, self._on_message)
        self._tag = answer.consumer_tag
        self.is_consuming = True
        self._attentive_since = time.monotonic()

    def detach(self) -> None:
        self.is_consuming = False
        self._channel = None
        self._inbox.clear()
        self._unacked.clear()
        self._proceed()

    async def catch_up(self) -> None:
        """Return when all is acknowledged that the broker had delivered by now, or has it back.

        The broker answers on the channel on which it delivers, after what it delivered before. Raises what a broken
        channel raises.
        """
        await self._depth()
        channel, newest = self._channel, next(reversed(self._unacked), 0)
        while self._channel is channel and next(iter(self._unacked), newest + 1) <= newest:
            await self._progress.wait()

    def _proceed(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    async def _depth(self) -> int:
        """How many messages lie in the queue now."""
        if self._channel is None:
            return 0
        declared = await self._channel.queue_declare(self.queue, passive=True)
        return declared.message_count or 0

    @property
    def attentive_s(self) -> float:
        """For how long it has been taking what comes, without a break; 0 while it does not."""
        return max(0.0, time.monotonic() - self._attentive_since) if self.is_consuming else 0.0

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop(), name=f"consumer:{self.queue}")

    async def stop(self, drain_s: float = 5.0) -> None:
        """Take no more, finish the batch in hand within `drain_s`, and leave the rest to the broker."""
        self._stopping = True
        with suppress(Exception):
            async with asyncio.timeout(drain_s):
                if self._channel is not None and self._tag is not None:
                    await self._channel.basic_cancel(self._tag)
                self._inbox.clear()
                await self._idle.wait()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _cancelled_by_broker(self, _frame: object) -> None:
        log.warning("consumer.cancelled", queue=self.queue)
        self._link.renew()

    def _channel_closed(self, channel: aiormq.abc.AbstractChannel, closing: "asyncio.Future[object]") -> None:
        if not closing.cancelled():
            closing.exception()
        if self._channel is channel:
            self._link.renew()

    async def _on_message(self, message: aiormq.abc.DeliveredMessage) -> None:
        delivery = self._delivery_of(message)
        self._backlog = max(0, self._backlog - 1)
        held = _Held(delivery, message.delivery_tag or 0, message.channel, redelivered=bool(message.redelivered))
        if held.channel is self._channel:
            self._unacked[held.tag] = None
        self._put(held)

    def _delivery_of(self, message: aiormq.abc.DeliveredMessage) -> Delivery:
        properties = message.header.properties
        headers = properties.headers or {}
        body = bytes(message.body)
        kept = body if len(body) <= MAX_REQUEST_BYTES else body[:KEPT_BYTES]
        exchange = message.exchange or ""
        return Delivery(
            queue=self.queue,
            body=kept,
            type=properties.message_type,
            content_type=properties.content_type,
            headers=headers,
            message_id=properties.message_id,
            user_id=properties.user_id,
            reply_to=properties.reply_to,
            correlation_id=properties.correlation_id,
            content_encoding=properties.content_encoding,
            exchange=exchange,
            routing_key=message.routing_key or "",
            cut_bytes=len(body) - len(kept),
            faults=faults_of(message.header),
            strayed=exchange not in self._exchanges or not _DEAD_LETTERED.isdisjoint(headers),
            waited=self._is_paused or self._backlog > 0,
        )

    def _put(self, held: _Held) -> None:
        if held.channel is self._channel and not self._stopping:
            self._inbox.append(held)
            self._arrived.set()

    async def _loop(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not self._inbox:
                self._arrived.clear()
            if batch:
                self._idle.clear()
                try:
                    await self._work(batch)
                except Exception:  # the rim
                    log.exception("consumer.failed", queue=self.queue)
                    self._link.renew()
                self._idle.set()

    def _next_batch(self) -> list[_Held]:
        """What gathered, in its order; a message that crashed its handler comes alone, to hurt no other."""
        batch: list[_Held] = []
        while self._inbox and len(batch) < self._batch_max:
            if self._inbox[0].crashes and batch:
                break
            batch.append(self._inbox.popleft())
            if batch[0].crashes:
                break
        return batch

    async def _work(self, batch: list[_Held]) -> None:
        live = [held for held in batch if not held.is_worn_out]
        judged = iter(await self._judge(live) if live else ())
        outcomes = [_WORN_OUT if held.is_worn_out else next(judged) for held in batch]
        async with asyncio.timeout(self._limit_s):
            await self._finish(batch, outcomes)

    async def _finish(self, batch: list[_Held], outcomes: Sequence[Outcome]) -> None:
        """Bury what is rejected, have what must wait come again, and acknowledge the rest."""
        later = asyncio.get_running_loop().call_later
        done: list[_Held] = []
        burying: list[_Held] = []
        for held, outcome in zip(batch, outcomes, strict=True):
            match outcome:
                case Done():
                    done.append(held)
                case Retry(after_s):
                    later(after_s, self._put, held)
                case Reject():
                    burying.append(held)
        problems = [outcome.problem for outcome in outcomes if isinstance(outcome, Reject)]
        # All at once: a flood of faulty messages must not hold up the honest ones behind it.
        buried = await asyncio.gather(*(self._bury(h.delivery, p) for h, p in zip(burying, problems, strict=True)))
        for held, is_safe in zip(burying, buried, strict=True):
            if is_safe:
                done.append(held)
            else:
                later(1.0, self._put, held)
        self.handled += len(done)
        if done:
            await take(f"{self._carries}.acknowledge", self._acknowledge, done)

    async def _judge(self, batch: list[_Held]) -> Sequence[Outcome]:
        """The handler's outcomes, whatever it takes to get them."""
        pause_s = 0.1
        while True:
            try:
                outcomes = await self._within_limit(batch)
                await self._resume()
                return outcomes
            except Paused as paused:
                log.warning("consumer.paused", queue=self.queue, reason=str(paused), pause_s=round(pause_s, 1))
                self._pause(batch)
                await asyncio.sleep(pause_s)
                self._attentive_since = time.monotonic()
                pause_s = min(pause_s * 2, 2.0)
                if batch[0].channel is not self._channel:
                    return [Retry()] * len(batch)  # the broker has them again; put() drops ours
            except Exception:  # the rim
                log.exception("consumer.handler_crashed", queue=self.queue, messages=len(batch))
                if len(batch) > 1:
                    return [(await self._judge([held]))[0] for held in batch]
                batch[0].crashes += 1
                if batch[0].crashes >= self.CRASHES_ALLOWED:
                    return [Reject(Problem.of(Code.HANDLER_CRASHED, "This message crashes its handler."))]
                return [Retry(0.1)]

    async def _within_limit(self, batch: list[_Held]) -> Sequence[Outcome]:
        """The handler's outcomes. Raises Paused when it hangs: then something that it waits for does."""
        limit = asyncio.timeout(self._limit_s)
        try:
            async with limit:
                return await self._handle([held.delivery for held in batch])
        except TimeoutError:
            if limit.expired():
                raise Paused(f"not done within {self._limit_s:g} s") from None
            raise

    def _pause(self, batch: Sequence[_Held]) -> None:
        self._is_paused = True
        for held in (*batch, *self._inbox):
            held.delivery = replace(held.delivery, waited=True)

    async def _resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            with suppress(*BROKER_ERRORS):
                self._backlog = await self._depth()

    async def _bury(self, delivery: Delivery, problem: Problem) -> bool:
        """Whether the message is safe in `leveret.dead` with its reason."""
        log.warning("message.rejected", queue=self.queue, type=delivery.type, code=problem.code, why=problem.message)
        envelope = Envelope(headers=_epitaph(delivery, problem), correlation_id=delivery.correlation_id)
        if self._lament is not None and problem.code is Code.HANDLER_CRASHED:
            try:
                await self._lament(delivery, problem)
            except Exception:  # the rim
                log.exception("message.not_lamented", queue=self.queue)
        try:
            bury, body = self._morgue.publish_raw, delivery.body[:KEPT_BYTES]
            await take(f"{self._carries}.bury", bury, topology.DEAD.name, body, delivery.type, envelope)
        except LeveretError as error:
            log.warning("message.not_buried", queue=self.queue, why=str(error))
            return False
        return True

    async def _acknowledge(self, done: list[_Held]) -> None:
        """One multiple-ack for all that is older than anything still open, single ones for the rest."""
        channel = self._channel
        tags = sorted(held.tag for held in done if held.channel is channel)
        if channel is None or not tags:
            return
        for tag in tags:
            self._unacked.pop(tag, None)
        self._proceed()
        oldest_open = next(iter(self._unacked), tags[-1] + 1)
        together = [tag for tag in tags if tag < oldest_open]
        with suppress(*BROKER_ERRORS):
            if together:
                await channel.basic_ack(together[-1], multiple=True, wait=False)
            for tag in tags[len(together) :]:
                await channel.basic_ack(tag, wait=False)


def _epitaph(delivery: Delivery, problem: Problem) -> dict[str, str | int]:
    """The headers of a message in `leveret.dead`: its own, as far as they are small and harmless, and why it is there.

    CC and BCC would have the broker route it, and names that begin with `x-` are the broker's own.
    """
    own = {
        name: value[:BURIED_TEXT_MAX] if isinstance(value, str) else value
        for name, value in delivery.headers.items()
        if isinstance(value, str | int) and name not in {"CC", "BCC"} and not name.startswith(("x-", "dead_"))
    }
    return {
        **dict(list(own.items())[:BURIED_HEADERS_MAX]),
        "dead_queue": delivery.queue,
        "dead_code": str(problem.code),
        "dead_message": problem.message[: 4 * BURIED_TEXT_MAX],
        "dead_user": delivery.user_id or "",
        "dead_message_id": delivery.message_id or "",
        "dead_length": delivery.length,
    }
