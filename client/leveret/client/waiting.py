"""Waiting for a VM: its events say when to look, what is seen decides."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import get_args

from leveret.client.errors import VmFailed, WaitTimedOut
from leveret.shared.documents import EventView, VmView
from leveret.shared.waiting import Outcome, Standing, Target, judge

#: The event with which each wait ends.
LAST_WORD: dict[Target, str] = {
    "running": "running",
    "ready": "guest_ready",
    "stopped": "stopped",
    "deleted": "deleted",
}

_QUEUED_PAUSE_S = 0.2
#: A row is there some milliseconds before the events that tell of it: how long to wait for the last of them.
_LAST_WORD_S = 1.0
#: How often a wait looks without having heard anything.
_LOOK_S = 25.0

Judged = Callable[[], Awaitable[int]]
Look = Callable[[], Awaitable[VmView | None]]
Hear = Callable[[], AsyncGenerator[EventView, None]]
OnEvent = Callable[[EventView], None]


def check_target(target: str) -> None:
    """Raises ValueError for what nobody can wait for."""
    if target not in get_args(Target):
        raise ValueError(f"one waits for {', '.join(get_args(Target))}, not for {target!r}")


class Wait:
    """One wait for one VM.

    `judged` returns when its request has its verdict, with the generation that this made; `look` gives the VM as it is,
    or None while there is none; `hear` gives its events. Raises ValueError for a target that is none.
    """

    def __init__(
        self, target: Target, *, judged: Judged, look: Look, hear: Hear, on_event: OnEvent | None = None
    ) -> None:
        check_target(target)
        self._target = target
        self._judged = judged
        self._generation = 0
        self._look = look
        self._hear = hear
        self._on_event = on_event
        self._seen: VmView | None = None
        self._heard: set[str] = set()
        self._news = asyncio.Event()

    async def outcome(self, timeout_s: float) -> VmView:
        """The VM once it is there. Raises VmFailed, WaitTimedOut, and what looking or hearing raises."""
        try:
            async with asyncio.timeout(timeout_s):
                self._generation = await self._judged()
                vm = await self._until_it_exists()
                if self._on_event is None and self._is_reached_by(vm):
                    return vm
                listener = asyncio.create_task(self._listen(), name="leveret-wait")
                try:
                    return await self._until_it_is_there(listener)
                finally:
                    listener.cancel()
                    await asyncio.gather(listener, return_exceptions=True)
        except TimeoutError:
            raise WaitTimedOut(self._seen, self._target, timeout_s) from None

    async def _until_it_exists(self) -> VmView:
        while True:
            self._seen = await self._look()
            if self._seen is not None:
                return self._seen
            await asyncio.sleep(_QUEUED_PAUSE_S)

    async def _until_it_is_there(self, listener: "asyncio.Task[None]") -> VmView:
        while True:
            # What happens after this look is news, so no look is too early.
            self._news.clear()
            vm = await self._until_it_exists()
            try:
                if self._is_reached_by(vm):
                    await self._hear_out(listener, LAST_WORD[self._target])
                    return vm
            except VmFailed:
                await self._hear_out(listener, vm.state)
                raise
            await next_news(self._news, listener, _LOOK_S)

    def _is_reached_by(self, vm: VmView) -> bool:
        """Raises VmFailed when it will never be, by itself."""
        outcome = judge(Standing.of(vm), self._target, self._generation)
        if outcome is Outcome.FAILED:
            raise VmFailed(vm, self._target)
        return outcome is Outcome.REACHED

    async def _listen(self) -> None:
        async with aclosing(self._hear()) as events:
            async for event in events:
                self._heard.add(event.type)
                if self._on_event is not None:
                    self._on_event(event)
                self._news.set()

    async def _hear_out(self, listener: "asyncio.Task[None]", last_word: str) -> None:
        """Let who listens hear the end of the story too."""
        if self._on_event is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                while last_word not in self._heard:
                    self._news.clear()
                    await next_news(self._news, listener, _LAST_WORD_S)


async def next_news(news: asyncio.Event, listener: "asyncio.Task[None]", within_s: float) -> bool:
    """Return with the next news, or after this time; whether there was any. Raises what ended the listening."""
    waiting = asyncio.ensure_future(news.wait())
    try:
        await asyncio.wait({waiting, listener}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if listener.done():
        listener.result()
    return news.is_set()
