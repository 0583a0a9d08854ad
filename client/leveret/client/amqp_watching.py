"""Watching a project's events from a queue of one's own: each once and in order, with a word on what is lost."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import structlog
from pydantic import ValidationError

from leveret.client.broker import denial, shown, user_of
from leveret.client.errors import ApiError, EventGap, Unreachable
from leveret.client.own_queue import OwnQueue
from leveret.client.watching import WATCH_RETRY_S, OnGap
from leveret.shared.bus import DONE, Consumer, Delivery, Link, Outcome, Publisher
from leveret.shared.documents import EventView
from leveret.shared.errors import LeveretError
from leveret.shared.messages import ANSWERS, CloudEvent

log = structlog.get_logger()

#: Events that are handed on before the first of them is acknowledged.
_BATCH = 50
_LOOK_S = 0.5


class AmqpWatch:
    """One watcher of one queue. An event is acknowledged when the next one is asked for.

    `after` is the number of the last event that was given away; None: the queue decides with what it begins. With
    `key` `#` the queue gets every event of the project, so that a number that is left out is a gap.
    """

    def __init__(
        self,
        url: str,
        project: str,
        name: str,
        *,
        key: str = "#",
        arguments: dict[str, Any],
        after: int | None = None,
        give_up_s: float = WATCH_RETRY_S,
        on_gap: OnGap | None = None,
    ) -> None:
        user = user_of(url)
        self._url = url
        self._after = after
        self._is_whole = key == "#"
        self._give_up_s = give_up_s
        self._on_gap = on_gap
        self._inbox: asyncio.Queue[Delivery | ApiError] = asyncio.Queue()
        queue = OwnQueue(user, name, project, key, arguments, on_refusal=self._inbox.put_nowait)
        self.link = Link(url, f"watch:{queue.queue.name}")
        self.link.add(queue)
        # Nothing is ever buried: a client may not write there.
        self._consumer = Consumer(self.link, queue.queue, self._take, Publisher(user), batch_max=_BATCH)

    async def events(self) -> AsyncGenerator[EventView, None]:
        """Events for ever. Raises Unreachable after `give_up_s` without a broker, and a refusal at once."""
        self.link.start()
        self._consumer.start()
        try:
            while True:
                delivery = await self._next()
                event = self._news_in(delivery)
                if event is not None:
                    yield event
                self._inbox.task_done()
        finally:
            await self._consumer.stop(0)
            await self.link.stop()

    async def _take(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        for delivery in batch:
            self._inbox.put_nowait(delivery)
        await self._inbox.join()
        return [DONE] * len(batch)

    async def _next(self) -> Delivery:
        getting = asyncio.ensure_future(self._inbox.get())
        seen_up_at = time.monotonic()
        try:
            while not (await asyncio.wait({getting}, timeout=_LOOK_S))[0]:
                now = time.monotonic()
                seen_up_at = now if self.link.is_up else seen_up_at
                if not self.link.is_up and (denied := denial(self.link)):
                    raise denied
                if now - seen_up_at > self._give_up_s:
                    raise Unreachable(shown(self._url), "the broker is away, or has no events of this project")
        finally:
            getting.cancel()
        item = getting.result()
        if isinstance(item, ApiError):
            raise item
        return item

    def _news_in(self, delivery: Delivery) -> EventView | None:
        """The event in a message, unless it was given away before. Raises EventGap."""
        event = event_in(delivery)
        if event is None or (self._after is not None and event.seq <= self._after):
            return None
        if self._is_whole and self._after is not None and event.seq > self._after + 1:
            gap = EventGap(self._after, event.seq - 1)
            if self._on_gap is None:
                raise gap
            self._on_gap(gap)
        self._after = event.seq
        return event


def event_in(delivery: Delivery) -> EventView | None:
    """The same event as REST has it; None for what is none. What cannot be read shows as a gap in the numbers."""
    try:
        cloud = delivery.decoded(among=ANSWERS)
        if isinstance(cloud, CloudEvent):
            return _view(cloud)
    except (LeveretError, ValidationError, ValueError) as error:
        log.warning("event.unreadable", queue=delivery.queue, why=str(error))
    return None


def _view(cloud: CloudEvent) -> EventView:
    """`leveret.vm.TYPE.v1` is about a VM, `leveret.TYPE.v1` about the project."""
    data = dict(cloud.data)
    kind = cloud.type.removeprefix("leveret.").rpartition(".v")[0]
    vm_id = data.pop("vm_id", None) if kind.startswith("vm.") else None
    name, state = (data.pop("name", None), data.pop("state", None)) if vm_id else (None, None)
    return EventView(
        seq=int(cloud.sequence),
        vm_id=UUID(vm_id) if vm_id else None,
        vm_name=name,
        type=kind.removeprefix("vm."),
        state=state,
        at=datetime.fromisoformat(cloud.time),
        data=data,
    )
