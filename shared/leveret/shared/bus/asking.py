"""Asking: publish, then wait a little for a direct reply. The answer is a convenience (law 8)."""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

import aiormq
from aio_pika.abc import AbstractConnection
from pydantic import BaseModel

from leveret.shared.bus.publishing import DIRECT_REPLY, PUBLISH_TIMEOUT_S, Envelope, Publisher
from leveret.shared.errors import LeveretError
from leveret.shared.fault_points import take
from leveret.shared.messages import decode


class Caller:
    """A publisher whose messages may be answered. Attach it to a link as one would a publisher."""

    def __init__(self, user: str) -> None:
        self.publisher = Publisher(user, on_reply=self._on_reply)
        self._waiting: dict[str, asyncio.Future[BaseModel]] = {}

    async def attach(self, connection: AbstractConnection) -> None:
        await self.publisher.attach(connection)

    def detach(self) -> None:
        self.publisher.detach()

    async def ask(
        self,
        exchange: str,
        key: str,
        message: BaseModel,
        *,
        headers: Mapping[str, Any] | None = None,
        wait_s: float,
        publish_timeout_s: float = PUBLISH_TIMEOUT_S,
    ) -> BaseModel | None:
        """Publish durably, then return the answer, or None when none came within `wait_s`.

        Raises what `Publisher.publish` raises: then the message may not have been queued.
        """
        correlation_id = uuid.uuid4().hex
        answer: asyncio.Future[BaseModel] = asyncio.get_running_loop().create_future()
        self._waiting[correlation_id] = answer
        envelope = Envelope(headers=headers, correlation_id=correlation_id, reply_to=DIRECT_REPLY)
        try:
            publish = self.publisher.publish
            await take(
                "asking.publish", publish, exchange, key, message, envelope=envelope, timeout_s=publish_timeout_s
            )
            async with asyncio.timeout(wait_s):
                return await answer
        except TimeoutError:
            return None
        finally:
            del self._waiting[correlation_id]

    async def _on_reply(self, message: aiormq.abc.DeliveredMessage) -> None:
        properties = message.header.properties
        waiting = self._waiting.get(properties.correlation_id or "")
        if waiting is None or waiting.done():
            return
        try:
            waiting.set_result(decode(properties.message_type, bytes(message.body)))
        except LeveretError as error:
            waiting.set_exception(error)
