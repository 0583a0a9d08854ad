"""The one life of every background part: start, run a verb again and again, stop."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()

#: After a failure nobody waits for longer than this, however seldom the verb is due.
RETRY_S = 5.0


class Loop:
    """Runs `verb` every `every_s` seconds (with a tenth of jitter), or at once when woken.

    A verb that fails, or hangs for longer than `limit_s`, is logged and run again: the rim of a loop is where a broad
    `except` belongs. Tests call the verb itself and never wait for the loop.
    """

    def __init__(
        self,
        name: str,
        verb: Callable[[], Awaitable[object]],
        *,
        every_s: float,
        first_after_s: float = 0.0,
        limit_s: float | None = None,
    ) -> None:
        self.name = name
        self._verb = verb
        self._every_s = every_s
        self._first_after_s = first_after_s
        self._limit_s = limit_s
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop(), name=self.name)

    def wake(self) -> None:
        """Run the verb now, or once more after the run that is under way."""
        self._woken.set()

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    async def stop(self) -> None:
        """Cancel it, wherever it is: every verb is safe to kill (law 5)."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None

    async def _loop(self) -> None:
        await asyncio.sleep(self._first_after_s * random.uniform(0.5, 1.5))
        while True:
            self._woken.clear()
            every_s = self._every_s
            try:
                async with asyncio.timeout(self._limit_s):
                    await self._verb()
            except Exception:  # the rim
                log.exception("loop.failed", loop=self.name)
                every_s = min(every_s, RETRY_S)
            pause_s = every_s * random.uniform(0.9, 1.1)
            try:
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()
            except TimeoutError:
                continue
