"""Answering strangers: direct replies to clients, over a connection that nothing else depends on.

RabbitMQ 3.10 ends the connection that publishes to a direct reply address which it cannot decode, and a client may
make one up: the broker only checks `reply_to` when it is the bare `amq.rabbitmq.reply-to`. No check of ours can tell
all of them, since what decodes depends on the cluster and its Erlang.
"""

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import structlog
from aio_pika.abc import AbstractConnection
from pydantic import BaseModel

from leveret.shared.bus.consuming import Delivery
from leveret.shared.bus.link import Link
from leveret.shared.bus.publishing import DIRECT_REPLY, Envelope, Publisher
from leveret.shared.errors import LeveretError

log = structlog.get_logger()

#: Answers to one user that wait to be sent; who has more coming than that loses the rest.
WAITING_MAX = 20_000
LINK_TIMEOUT_S = 10.0
MUTE_FIRST_S = 1.0
MUTE_MAX_S = 600.0
USERS_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class _Answer:
    user: str
    reply_to: str
    correlation_id: str | None
    message: BaseModel


@dataclass(slots=True)
class _Blame:
    strikes: int
    until: float


class Answerer:
    """Sends one answer after the other, each confirmed, so that it is known whose address ended the connection.

    That client gets no answers for a while, which doubles each time: a reply is a convenience (law 8). The others
    wait for the connection to come back. Give it a link of its own.
    """

    def __init__(self, link: Link, user: str) -> None:
        self._link = link
        self._publisher = Publisher(user)
        self._waiting: dict[str, deque[_Answer]] = {}  # users in turn, so that a flood delays nobody else
        self._arrived = asyncio.Event()
        self._blamed: dict[str, _Blame] = {}
        self._attached = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        link.add(self)

    async def attach(self, connection: AbstractConnection) -> None:
        await self._publisher.attach(connection)
        self._attached.set()

    def detach(self) -> None:
        self._attached.clear()
        self._publisher.detach()

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop(), name="answerer")

    async def stop(self) -> None:
        """Answers that were not sent yet are dropped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def answer(self, delivery: Delivery, message: BaseModel) -> None:
        """Have this sent to whoever asked, if it asked by direct reply-to; never waits."""
        reply_to = delivery.reply_to or ""
        user = delivery.user_id or ""
        if not reply_to.startswith(f"{DIRECT_REPLY}.") or self.is_muted(user):
            return
        waiting = self._waiting.setdefault(user, deque())
        if len(waiting) < WAITING_MAX:
            waiting.append(_Answer(user, reply_to, delivery.correlation_id, message))
            self._arrived.set()

    def is_muted(self, user: str) -> bool:
        """Whether this broker user lately gave addresses that broke the connection."""
        blame = self._blamed.get(user)
        return blame is not None and time.monotonic() < blame.until

    async def _loop(self) -> None:
        while True:
            answer = await self._next()
            if self.is_muted(answer.user) or not await self._is_attached():
                continue
            try:
                await self._send(answer)
            except Exception:  # the rim
                log.exception("answerer.failed", user=answer.user)

    async def _next(self) -> _Answer:
        """The oldest answer of the user whose turn it is."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        user = next(iter(self._waiting))
        waiting = self._waiting.pop(user)
        answer = waiting.popleft()
        if waiting:
            self._waiting[user] = waiting  # behind all the others
        return answer

    async def _is_attached(self) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINK_TIMEOUT_S):
                await self._attached.wait()
        return self._attached.is_set()

    async def _send(self, answer: _Answer) -> None:
        envelope = Envelope(correlation_id=answer.correlation_id)
        try:
            await self._publisher.publish("", answer.reply_to, answer.message, envelope=envelope, mandatory=False)
        except LeveretError as error:
            # Only a broken connection speaks against the address: a broker under an alarm is merely slow.
            if not isinstance(error.__cause__, TimeoutError | None):
                self._mute(answer.user)
                # The next answer must not be put on what is left of this connection, and its asker blamed as well.
                self._attached.clear()
                self._link.renew()
        else:
            self._blamed.pop(answer.user, None)

    def _mute(self, user: str) -> None:
        blame = self._blamed.pop(user, None)
        strikes = blame.strikes + 1 if blame else 1
        mute_s = min(MUTE_FIRST_S * 2 ** (strikes - 1), MUTE_MAX_S)
        self._blamed[user] = _Blame(strikes, time.monotonic() + mute_s)
        if len(self._blamed) > USERS_REMEMBERED:
            del self._blamed[next(iter(self._blamed))]
        log.warning("answerer.muted", user=user, mute_s=mute_s)
