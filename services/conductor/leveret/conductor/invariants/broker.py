"""Looking at the broker, with nothing but the permissions of a conductor: what is declared, how deep, who consumes."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

import aiormq
import structlog
from aio_pika.abc import AbstractConnection

from leveret.conductor.database import Pool, statement
from leveret.conductor.invariants.invariant import Broken, Findings
from leveret.shared import topology
from leveret.shared.bus import Paused
from leveret.shared.bus.link import BROKER_ERRORS

log = structlog.get_logger()

CONDUCTORS_QUEUES = tuple(queue.name for queue in topology.CORE_QUEUES if queue is not topology.DEAD_QUEUE)
RULES = ("broker_is_furnished", "queue_is_consumed", "queue_gets_shorter", "no_dead_letters")

#: Hosts whose last heartbeat is not older than this are heard of; the others are the sweeper's business.
HEARD_WITHIN_S = 15

_HEARD = f"""
SELECT id, heartbeat_at FROM hosts WHERE heartbeat_at > now() - interval '{HEARD_WITHIN_S} s'
"""  # noqa: S608 - our own number
_PROJECTS = "SELECT id FROM projects WHERE deleted_at IS NULL AND created_at < now() - interval '60 s'"


@dataclass(frozen=True, slots=True)
class Depth:
    """A queue as the broker counts it: messages that wait, and consumers."""

    messages: int
    consumers: int


#: A host's queue belongs to the connection that consumes it: nobody else may look into it, and it goes with it.
_OWNED = Depth(messages=0, consumers=1)
_UNCONSUMED = Depth(messages=0, consumers=0)


@dataclass(slots=True)
class Look:
    """One look at the broker."""

    missing: set[str] = field(default_factory=set)
    queues: dict[str, Depth] = field(default_factory=dict)
    heard: dict[str, datetime] = field(default_factory=dict)


class BrokerCheck:
    """A part of a link. What breaks a rule only for a moment, as while a process restarts, is looked at twice."""

    def __init__(self, pool: Pool, *, confirm_s: float, timeout_s: float = 8.0) -> None:
        self._pool = pool
        self._confirm_s = confirm_s
        self._timeout_s = timeout_s
        self._connection: AbstractConnection | None = None

    async def attach(self, connection: AbstractConnection) -> None:
        self._connection = connection

    def detach(self) -> None:
        self._connection = None

    async def check(self) -> Findings:
        """Look, and once more at what seems wrong; then declare again whatever may be missing."""
        try:
            first = await self._look()
            second = first
            if any(broken.count for rule, broken in judge(first, first).items() if rule != "no_dead_letters"):
                await asyncio.sleep(self._confirm_s)
                second = await self._look()
            looked_at = judge(first, second)
            await self._furnish()
        except (Paused, *BROKER_ERRORS) as error:
            return Findings(unchecked=[("broker", f"{type(error).__name__}: {error}")])
        return Findings(looked_at)

    async def _look(self) -> Look:
        async with statement(self._pool) as connection:
            heard = {row["id"]: row["heartbeat_at"] for row in await connection.fetch(_HEARD)}
            projects = [row["id"] for row in await connection.fetch(_PROJECTS)]
        look = Look(heard={topology.host_queue(host_id).name: at for host_id, at in heard.items()})
        async with asyncio.timeout(self._timeout_s):
            asking = _Asking(self._connection)
            try:
                await self._ask(asking, look, heard, projects)
            finally:
                await asking.close()
        return look

    async def _ask(self, asking: "_Asking", look: Look, hosts: Iterable[UUID], projects: Iterable[str]) -> None:
        exchanges = [exchange.name for exchange in topology.CORE_EXCHANGES]
        for name in (*exchanges, *(topology.events_exchange(project).name for project in projects)):
            if not await asking.has_exchange(name):
                look.missing.add(name)
        for queue in topology.CORE_QUEUES:
            depth = await asking.depth(queue.name)
            if depth is None:
                look.missing.add(queue.name)
            else:
                look.queues[queue.name] = depth
        for host_id in hosts:
            name = topology.host_queue(host_id).name
            look.queues[name] = await asking.depth(name) or _UNCONSUMED

    async def _furnish(self) -> None:
        """Declare everything, so that what was deleted comes back, bindings too; but hosts' queues are their own."""
        if self._connection is None:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                channel = await self._connection.channel()
                await topology.declare(channel)
                await channel.close()
        except BROKER_ERRORS as error:
            log.warning("broker.not_furnished", why=f"{type(error).__name__}: {error}")


class _Asking:
    """Passive declarations. One that finds nothing, or what is not ours, ends its channel; the next takes another."""

    def __init__(self, connection: AbstractConnection | None) -> None:
        if connection is None:
            raise ConnectionError("The link to the message broker is down.")
        self._connection = connection
        self._channel: aiormq.abc.AbstractChannel | None = None

    async def has_exchange(self, name: str) -> bool:
        try:
            await (await self._open()).exchange_declare(name, passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity:
            self._channel = None
            return False
        return True

    async def depth(self, queue: str) -> Depth | None:
        try:
            told = await (await self._open()).queue_declare(queue, passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity:
            self._channel = None
            return None
        except aiormq.exceptions.ChannelLockedResource:
            self._channel = None
            return _OWNED
        return Depth(told.message_count or 0, told.consumer_count or 0)

    async def _open(self) -> aiormq.abc.AbstractChannel:
        if self._channel is None:
            owner = await self._connection.channel(publisher_confirms=False)
            self._owner = owner  # a strong reference
            self._channel = await owner.get_underlay_channel()
        return self._channel

    async def close(self) -> None:
        if self._channel is not None:
            with suppress(*BROKER_ERRORS):
                await self._channel.close()


def judge(first: Look, second: Look) -> dict[str, Broken]:
    """What is broken in both looks, by rule."""
    found = {rule: Broken() for rule in RULES}
    for name in sorted(first.missing & second.missing):
        found["broker_is_furnished"].add(name=name)
    for name in CONDUCTORS_QUEUES:
        if _never_consumed(name, first) and _never_consumed(name, second):
            found["queue_is_consumed"].add(queue=name, consumers=0)
    for name in sorted(first.heard.keys() & second.heard.keys()):
        before, after = first.queues.get(name), second.queues.get(name)
        # A worker that was being restarted had not beaten since the first look.
        beaten = first is second or second.heard[name] > first.heard[name]
        if beaten and before is not None and after is not None and 1 not in {before.consumers, after.consumers}:
            found["queue_is_consumed"].add(queue=name, consumers=after.consumers)
    for name in sorted(first.queues.keys() & second.queues.keys() - {topology.DEAD_QUEUE.name}):
        before, after = first.queues[name], second.queues[name]
        if 0 < before.messages <= after.messages:
            found["queue_gets_shorter"].add(queue=name, messages=after.messages)
    dead = second.queues.get(topology.DEAD_QUEUE.name)
    if dead is not None and dead.messages:
        found["no_dead_letters"].count = dead.messages
        found["no_dead_letters"].examples = [{"queue": topology.DEAD_QUEUE.name, "messages": dead.messages}]
    return found


def _never_consumed(name: str, look: Look) -> bool:
    depth = look.queues.get(name)
    return depth is not None and depth.consumers == 0
