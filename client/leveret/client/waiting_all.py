"""Waiting for several VMs: one stream of the project's events says at which of them to look."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from uuid import UUID

from leveret.client.errors import VmFailed, WaitTimedOut
from leveret.client.waiting import LAST_WORD, OnEvent, check_target, next_news
from leveret.shared.documents import EventView, VmView
from leveret.shared.waiting import Outcome, Standing, Target, judge

#: Looks under way at one time.
_AT_ONCE = 8
#: How often all that are not there are looked at without any news of them.
_LOOK_S = 10.0
#: A row is there some milliseconds before the events that tell of it: how long to wait for the last of them.
_LAST_WORD_S = 1.0

Look = Callable[[UUID], Awaitable[VmView | None]]
Hear = Callable[[], AsyncGenerator[EventView, None]]


class WaitAll:
    """One wait for several VMs.

    `look` gives a VM as it is, or None while it is not there; `hear` gives the project's events, of which those of
    other VMs are passed over. Raises ValueError for a target that is none.
    """

    def __init__(
        self, target: Target, vm_ids: Sequence[UUID], *, look: Look, hear: Hear, on_event: OnEvent | None = None
    ) -> None:
        check_target(target)
        self._target = target
        self._vm_ids = tuple(vm_ids)
        self._look = look
        self._hear = hear
        self._on_event = on_event
        self._seen: dict[UUID, VmView] = {}
        self._missing = set(vm_ids)
        self._with_news: set[UUID] = set(vm_ids)
        self._silent = set(vm_ids)
        self._news = asyncio.Event()

    async def outcome(self, timeout_s: float) -> tuple[VmView, ...]:
        """Them, in order, once all are there. Raises VmFailed for the first that will not be, and WaitTimedOut."""
        try:
            async with asyncio.timeout(timeout_s):
                listener = asyncio.create_task(self._listen(), name="leveret-wait-all")
                try:
                    await self._until_all_are_there(listener)
                    await self._hear_out(listener)
                finally:
                    listener.cancel()
                    await asyncio.gather(listener, return_exceptions=True)
        except TimeoutError:
            if self._missing:
                late = next((self._seen[one] for one in self._vm_ids if one in self._missing & self._seen.keys()), None)
                raise WaitTimedOut(late, self._target, timeout_s) from None
        return tuple(self._seen[vm_id] for vm_id in self._vm_ids)

    async def _until_all_are_there(self, listener: "asyncio.Task[None]") -> None:
        while True:
            # What happens after this is news, so no look is too early.
            self._news.clear()
            looked_at, self._with_news = self._with_news & self._missing, set()
            await self._look_at(looked_at)
            if not self._missing:
                return
            if not await next_news(self._news, listener, _LOOK_S):
                self._with_news = set(self._missing)

    async def _look_at(self, vm_ids: Iterable[UUID]) -> None:
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def one(vm_id: UUID) -> None:
            async with at_once:
                vm = await self._look(vm_id)
            if vm is not None:
                self._seen[vm_id] = vm

        looked_at = list(vm_ids)
        await asyncio.gather(*(one(vm_id) for vm_id in looked_at))
        for vm_id in sorted(looked_at, key=self._vm_ids.index):
            vm = self._seen.get(vm_id)
            if vm is None:
                self._with_news.add(vm_id)
                continue
            outcome = judge(Standing.of(vm), self._target)
            if outcome is Outcome.FAILED:
                raise VmFailed(vm, self._target)
            if outcome is Outcome.REACHED:
                self._missing.discard(vm_id)

    async def _listen(self) -> None:
        own = set(self._vm_ids)
        async with aclosing(self._hear()) as events:
            async for event in events:
                if event.vm_id not in own:
                    continue
                if event.type == LAST_WORD[self._target]:
                    self._silent.discard(event.vm_id)
                if self._on_event is not None:
                    self._on_event(event)
                self._with_news.add(event.vm_id)
                self._news.set()

    async def _hear_out(self, listener: "asyncio.Task[None]") -> None:
        """Let who listens hear the end of each story too."""
        if self._on_event is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                while self._silent:
                    self._news.clear()
                    await next_news(self._news, listener, _LAST_WORD_S)
