"""Consuming: micro-batches in, outcomes out, and only this file acknowledges (law 2)."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiormq
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection
from pydantic import BaseModel

from leveret.shared import topology
from leveret.shared.bus.link import BROKER_ERRORS, Link
from leveret.shared.bus.publishing import Envelope, Publisher
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.messages import CONTENT_TYPE, Registry, decode

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it came, not yet trusted."""

    queue: str
    body: bytes
    type: str | None
    content_type: str | None
    headers: Mapping[str, Any]
    message_id: str | None
    user_id: str | None
    reply_to: str | None
    correlation_id: str | None

    def decoded(self, *, among: Registry | None = None) -> BaseModel:
        """The message inside. Raises LeveretError with the reason when there is none."""
        if self.content_type != CONTENT_TYPE:
            raise fail(Code.UNSUPPORTED_CONTENT_TYPE, f"The content type is {str(self.content_type)[:64]!r}.")
        return decode(self.type, self.body, among=among)

    def header(self, name: str) -> str | None:
        value = self.headers.get(name)
        return value if isinstance(value, str) else None


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


@dataclass(slots=True)
class _Held:
    delivery: Delivery
    tag: int
    channel: aiormq.abc.AbstractChannel
    crashes: int = 0


class Consumer:
    """Hands a queue's messages to a handler in micro-batches, and acknowledges what it says is done.

    While a batch is worked on the next one gathers, so batches grow with the load and are one message long when
    idle. On `Paused` the consumer waits and tries the same batch again; it never gives messages back in a loop.
    A handler that crashes gets its messages one by one; one that crashes it three times is rejected.
    """

    CRASHES_ALLOWED = 3

    def __init__(
        self, link: Link, queue: topology.Queue, handle: Handler, morgue: Publisher, *, batch_max: int = 200
    ) -> None:
        self.queue = queue.name
        self._link = link
        self._handle = handle
        self._morgue = morgue
        self._batch_max = batch_max
        self._inbox: deque[_Held] = deque()
        self._unacked: dict[int, None] = {}  # tags of this channel, oldest first
        self._arrived = asyncio.Event()
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
        answer = await channel.basic_consume(self.queue, self._on_message)
        self._tag = answer.consumer_tag
        self.is_consuming = True
        self._attentive_since = time.monotonic()

    def detach(self) -> None:
        self.is_consuming = False
        self._channel = None
        self._inbox.clear()
        self._unacked.clear()

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
        properties = message.header.properties
        delivery = Delivery(
            queue=self.queue,
            body=bytes(message.body),
            type=properties.message_type,
            content_type=properties.content_type,
            headers=properties.headers or {},
            message_id=properties.message_id,
            user_id=properties.user_id,
            reply_to=properties.reply_to,
            correlation_id=properties.correlation_id,
        )
        held = _Held(delivery, message.delivery_tag or 0, message.channel)
        if held.channel is self._channel:
            self._unacked[held.tag] = None
        self._put(held)

    def _put(self, held: _Held) -> None:
        if held.channel is self._channel and not self._stopping:
            self._inbox.append(held)
            self._arrived.set()

    async def _loop(self) -> None:
        while True:
            await self._arrived.wait()
            batch = [self._inbox.popleft() for _ in range(min(len(self._inbox), self._batch_max))]
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

    async def _work(self, batch: list[_Held]) -> None:
        outcomes = await self._judge(batch)
        done: list[_Held] = []
        for held, outcome in zip(batch, outcomes, strict=True):
            match outcome:
                case Done():
                    done.append(held)
                case Retry(after_s):
                    asyncio.get_running_loop().call_later(after_s, self._put, held)
                case Reject(problem):
                    if await self._bury(held.delivery, problem):
                        done.append(held)
                    else:
                        asyncio.get_running_loop().call_later(1.0, self._put, held)
        self.handled += len(done)
        await self._acknowledge(done)

    async def _judge(self, batch: list[_Held]) -> Sequence[Outcome]:
        """The handler's outcomes, whatever it takes to get them."""
        pause_s = 0.1
        while True:
            try:
                return await self._handle([held.delivery for held in batch])
            except Paused as paused:
                log.warning("consumer.paused", queue=self.queue, reason=str(paused), pause_s=round(pause_s, 1))
                await asyncio.sleep(pause_s)
                self._attentive_since = time.monotonic()
                pause_s = min(pause_s * 2, 5.0)
                if batch[0].channel is not self._channel:
                    return [Retry()] * len(batch)  # the broker has them again; put() drops ours
            except Exception:  # the rim
                log.exception("consumer.handler_crashed", queue=self.queue, messages=len(batch))
                if len(batch) > 1:
                    return [(await self._judge([held]))[0] for held in batch]
                batch[0].crashes += 1
                if batch[0].crashes >= self.CRASHES_ALLOWED:
                    return [Reject(Problem.of(Code.HANDLER_CRASHED, "This message crashes its handler."))]
                await asyncio.sleep(0.1)

    async def _bury(self, delivery: Delivery, problem: Problem) -> bool:
        """Whether the message is safe in `leveret.dead` with its reason."""
        log.warning("message.rejected", queue=self.queue, type=delivery.type, code=problem.code, why=problem.message)
        headers = {
            **{name: value for name, value in delivery.headers.items() if isinstance(value, str | int)},
            "dead_queue": delivery.queue,
            "dead_code": str(problem.code),
            "dead_message": problem.message,
            "dead_user": delivery.user_id or "",
            "dead_message_id": delivery.message_id or "",
        }
        envelope = Envelope(headers=headers, correlation_id=delivery.correlation_id)
        try:
            await self._morgue.publish_raw(topology.DEAD.name, delivery.body, delivery.type, envelope)
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
        oldest_open = next(iter(self._unacked), tags[-1] + 1)
        together = [tag for tag in tags if tag < oldest_open]
        with suppress(*BROKER_ERRORS):
            if together:
                await channel.basic_ack(together[-1], multiple=True, wait=False)
            for tag in tags[len(together) :]:
                await channel.basic_ack(tag, wait=False)
