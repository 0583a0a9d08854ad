"""Publishing that tells the truth: confirmed, refused, unroutable, or unknown.

A publish is known to have arrived only when the broker confirmed it on a channel that raises on return; one that timed
out may still arrive.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiormq
from aio_pika.abc import AbstractChannel, AbstractConnection
from pamqp.commands import Basic
from pydantic import BaseModel

from leveret.shared import topology
from leveret.shared.bus.link import BROKER_ERRORS
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.messages import CONTENT_TYPE, TYPE_OF, encode

PUBLISH_TIMEOUT_S = 5.0
#: How long an exchange is believed to be there that was.
DECLARED_FOR_S = 30.0


class Unroutable(LeveretError):
    """The broker has no queue for this message."""


class Refused(LeveretError):
    """A queue would not take this message: it is full."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What stands in the properties of a message, beside its body."""

    headers: Mapping[str, Any] | None = None
    correlation_id: str | None = None
    reply_to: str | None = None


NO_ENVELOPE = Envelope()


#: Where answers to this connection are sent; the broker knows whom it means.
DIRECT_REPLY = "amq.rabbitmq.reply-to"
ReplyCallback = Callable[[aiormq.abc.DeliveredMessage], Coroutine[Any, Any, None]]


class Publisher:
    """Publishes with confirms, `mandatory` and a bounded number in flight; or posts without waiting.

    `on_reply` gets the direct replies to what this publisher sends: they come back on the publishing channel.
    """

    def __init__(self, user: str, *, on_reply: ReplyCallback | None = None, max_in_flight: int = 500) -> None:
        self._user = user
        self._on_reply = on_reply
        self._declared: dict[str, float] = {}  # when, by the monotonic clock
        self._slots = asyncio.Semaphore(max_in_flight)
        self._confirmed: aiormq.abc.AbstractChannel | None = None
        self._posted: aiormq.abc.AbstractChannel | None = None
        self._channels: tuple[AbstractChannel, ...] = ()
        self._closing: asyncio.Task[None] | None = None

    async def attach(self, connection: AbstractConnection) -> None:
        confirmed = await connection.channel(publisher_confirms=True, on_return_raises=True)
        posted = await connection.channel(publisher_confirms=False)
        self._channels = (confirmed, posted)  # strong references: aio-pika itself keeps weak ones
        channel = await confirmed.get_underlay_channel()
        for either in (channel, await posted.get_underlay_channel()):
            either.closing.add_done_callback(lambda closing: self._channel_closed(closing, connection))
        if self._on_reply is not None:
            await channel.basic_consume(DIRECT_REPLY, self._on_reply, no_ack=True)
        self._confirmed, self._posted = channel, await posted.get_underlay_channel()

    def detach(self) -> None:
        self._confirmed = self._posted = None
        self._declared.clear()

    def _channel_closed(self, closing: "asyncio.Future[object]", connection: AbstractConnection) -> None:
        """The broker ends a channel that broke a rule. End the connection too: its link builds both anew."""
        if not closing.cancelled():
            closing.exception()
        if self._confirmed is not None and not connection.is_closed:
            self._closing = asyncio.create_task(_end(connection))

    async def declare_exchange(self, exchange: topology.Exchange) -> None:
        """Make sure that an exchange exists; asked every half minute. Raises LeveretError `unavailable`."""
        if time.monotonic() - self._declared.get(exchange.name, -math.inf) < DECLARED_FOR_S:
            return
        if self._confirmed is None:
            raise fail(Code.UNAVAILABLE, "The message broker cannot be reached.")
        try:
            await self._confirmed.exchange_declare(exchange.name, exchange_type=exchange.kind.value, durable=True)
        except BROKER_ERRORS as error:
            raise fail(Code.UNAVAILABLE, "The message broker did not declare an exchange.") from error
        self._declared[exchange.name] = time.monotonic()

    async def publish(
        self,
        exchange: str,
        key: str,
        message: BaseModel,
        *,
        envelope: Envelope = NO_ENVELOPE,
        mandatory: bool = True,
        timeout_s: float = PUBLISH_TIMEOUT_S,
    ) -> None:
        """Return when the broker has the message safe on disk.

        Raises Unroutable when no queue takes it, and LeveretError `unavailable` when it was refused, or when
        it is *unknown* whether it arrived: publish again with the same request id.
        """
        await self._publish_body(exchange, key, TYPE_OF[type(message)], encode(message), envelope, mandatory, timeout_s)

    async def knock(self) -> None:
        """Return when the broker takes messages now, without leaving one. Raises LeveretError `unavailable`.

        An alarm of the broker keeps everybody from publishing, and nobody from consuming.
        """
        with suppress(Unroutable):
            await self.publish_raw("", b"", None, NO_ENVELOPE)

    async def publish_raw(self, exchange: str, body: bytes, message_type: str | None, envelope: Envelope) -> None:
        """Publish bytes as they are: what is dead is kept as it came."""
        await self._publish_body(exchange, "", message_type, body, envelope, True, PUBLISH_TIMEOUT_S)

    async def _publish_body(
        self,
        exchange: str,
        key: str,
        message_type: str | None,
        body: bytes,
        envelope: Envelope,
        mandatory: bool,
        timeout_s: float,
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s), self._slots:
                channel = self._confirmed
                if channel is None:
                    raise fail(Code.UNAVAILABLE, "The message broker cannot be reached.")
                if _is_blocked(channel):
                    raise fail(Code.UNAVAILABLE, "The message broker takes nothing now: it is short of memory or disk.")
                answer = await channel.basic_publish(
                    body,
                    exchange=exchange,
                    routing_key=key,
                    properties=self._properties(message_type, envelope, persistent=True),
                    mandatory=mandatory,
                )
        except LeveretError:
            raise
        except aiormq.exceptions.PublishError as error:
            raise Unroutable(
                Problem.of(Code.UNAVAILABLE, f"No queue takes messages of {exchange} with key {key!r}.")
            ) from error
        except aiormq.exceptions.DeliveryError as error:
            raise Refused(
                Problem.of(Code.UNAVAILABLE, "The message broker refused the message: a queue is full.")
            ) from error
        except BROKER_ERRORS as error:
            raise fail(
                Code.UNAVAILABLE,
                "The message broker did not confirm the message; whether it arrived is unknown.",
            ) from error
        if not isinstance(answer, Basic.Ack):
            raise Unroutable(Problem.of(Code.UNAVAILABLE, f"No queue takes messages of {exchange} with key {key!r}."))

    async def post(self, exchange: str, key: str, message: BaseModel, *, envelope: Envelope = NO_ENVELOPE) -> None:
        """Send and forget a transient message: for what will be said again if it is lost (law 1)."""
        channel = self._posted
        if channel is None or _is_blocked(channel):
            return
        body, properties = encode(message), self._properties(TYPE_OF[type(message)], envelope, persistent=False)
        with suppress(*BROKER_ERRORS):
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                await channel.basic_publish(body, exchange=exchange, routing_key=key, properties=properties)

    def _properties(self, message_type: str | None, envelope: Envelope, *, persistent: bool) -> Basic.Properties:
        return Basic.Properties(
            content_type=CONTENT_TYPE,
            delivery_mode=2 if persistent else 1,
            # Fresh for every attempt: two in flight with one id can be confirmed for each other.
            message_id=uuid.uuid4().hex,
            message_type=message_type,
            user_id=self._user,
            reply_to=envelope.reply_to,
            correlation_id=envelope.correlation_id,
            headers=dict(envelope.headers or {}),
        )


def _is_blocked(channel: aiormq.abc.AbstractChannel) -> bool:
    """Whether the broker has said that it reads nothing from this connection (an alarm of memory or disk).

    What is written all the same arrives when the alarm is over, however stale: nothing is. aiormq tells of it only
    by `ready()`, which waits for the end of it: it is asked how far it comes without waiting.
    """
    waiting = channel.connection.ready()
    try:
        waiting.send(None)
    except StopIteration:
        return False
    waiting.close()
    return True


async def _end(connection: AbstractConnection) -> None:
    with suppress(*BROKER_ERRORS):
        await connection.close()
