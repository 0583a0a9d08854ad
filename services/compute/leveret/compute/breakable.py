"""Waiting that can be broken off from outside, without cancelling the task that waits."""

import asyncio
import random
from collections.abc import Awaitable
from contextlib import suppress

PAUSE_MIN_S = 0.2
PAUSE_MAX_S = 15.0


class OutOfTime(Exception):
    """The time was up, or the waiting was broken off."""


class Breakable:
    """Awaits one thing at a time. What is broken off is cancelled, and has ended when OutOfTime is raised."""

    __slots__ = ("_pause_s", "_pausing", "_scope")

    def __init__(self) -> None:
        self._scope: asyncio.Timeout | None = None
        self._pausing = False
        self._pause_s = 0.0

    async def run(self, work: Awaitable[object], *, until: float | None = None) -> None:
        """Await it until it is done or `until` (on the loop's clock) has come. Raises OutOfTime."""
        scope = asyncio.timeout_at(until)
        try:
            async with scope:
                self._scope = scope
                await work
        except TimeoutError:
            if scope.expired():
                raise OutOfTime from None
            raise
        finally:
            self._scope = None

    def break_off(self) -> None:
        """Break off what is being awaited, if anything is."""
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def pause(self, *, before: float) -> None:
        """Wait before another try, longer each time until `calm`; if `before` is still to come, not beyond it."""
        loop = asyncio.get_running_loop()
        self._pause_s = min(max(self._pause_s * 2, PAUSE_MIN_S), PAUSE_MAX_S)
        until = loop.time() + self._pause_s * random.uniform(0.8, 1.2)
        if loop.time() < before:
            until = min(until, before)
        self._pausing = True
        try:
            with suppress(OutOfTime):
                await self.run(loop.create_future(), until=until)
        finally:
            self._pausing = False

    def calm(self) -> None:
        """The trouble is over: the next pause is a short one."""
        self._pause_s = 0.0

    def hurry(self) -> None:
        """Do not wait out a pause; anything else goes on."""
        if self._pausing:
            self.break_off()
