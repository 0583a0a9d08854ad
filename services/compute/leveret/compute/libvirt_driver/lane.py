"""A lane: blocking calls, a bounded number at a time, each with a time limit, and never in the way of the loop.

A thread that hangs in the kernel or in libvirt cannot be killed. `concurrent.futures` would lose that thread's place
for ever and wait for it when the process ends; here it is given up: its place is free again at once, up to
`max_hung` of them, and as a daemon thread it does not keep the process alive. What it was about to do it may do yet.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

from leveret.shared.errors import Code, LeveretError, Problem, fail

T = TypeVar("T")


class NoAnswer(LeveretError):
    """A call that was made did not end in its time; it may still go on."""


class Lane:
    """Runs blocking calls for one kind of work. Belongs to the event loop that first uses it."""

    def __init__(self, name: str, *, width: int, max_hung: int, timeout_code: Code) -> None:
        self.name = name
        self._places = asyncio.Semaphore(width)
        self._max_hung = max_hung
        self._timeout_code = timeout_code
        self._hung: Counter[Hashable] = Counter()

    @property
    def hung(self) -> int:
        """Calls that were given up and have not ended yet."""
        return self._hung.total()

    def hangs(self, of: Hashable) -> bool:
        """Whether a call for this one was given up and has not ended yet: it may still take effect."""
        return self._hung[of] > 0

    async def run(self, call: Callable[..., T], *args: Any, timeout_s: float, doing: str, of: Hashable = None) -> T:
        """The result of `call(*args)`, made for `of`, such as a VM.

        A cancelled caller waits until the call has ended, or its time is up: what was begun is then over, and
        the next call cannot be overtaken by it. Raises NoAnswer with the lane's code after `timeout_s`, and another
        LeveretError with it at once when too many calls hang already. `doing` completes the sentence "... while ...".
        """
        if self.hung >= self._max_hung:
            raise fail(self._timeout_code, f"{self.hung} calls hang already; not tried: {doing}.")
        await self._places.acquire()
        try:
            ended = in_thread(self.name, call, *args)
        except BaseException:
            self._places.release()
            raise
        try:
            done = await _wait_through_cancellation(ended, timeout_s)
        finally:
            self._places.release()
            if not ended.done():
                self._give_up(ended, of)
        if not done:
            raise NoAnswer(Problem.of(self._timeout_code, f"No answer within {timeout_s:g} s while {doing}."))
        return ended.result()

    def _give_up(self, ended: "asyncio.Future[Any]", of: Hashable) -> None:
        self._hung[of] += 1

        def came_back(future: "asyncio.Future[Any]") -> None:
            self._hung[of] -= 1
            if not self._hung[of]:
                del self._hung[of]
            if not future.cancelled():
                future.exception()  # nobody waits for it any more

        ended.add_done_callback(came_back)


def in_thread(name: str, call: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
    """The result of `call(*args)`, made in a daemon thread of its own. Nobody has to wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[], None]) -> None:
        if not future.done():
            set_it()

    def body() -> None:
        try:
            set_it = partial(future.set_result, call(*args))
        except Exception as error:  # noqa: BLE001  (raised again where the result is awaited)
            set_it = partial(future.set_exception, error)
        try:
            loop.call_soon_threadsafe(settle, set_it)
        except RuntimeError:
            return  # the event loop was closed meanwhile: nobody is left to tell
        finally:
            del set_it  # an error holds on to this frame, which must not hold on to the error

    threading.Thread(target=body, name=name, daemon=True).start()
    return future


async def _wait_through_cancellation(future: "asyncio.Future[T]", timeout_s: float) -> bool:
    """Whether the future was done in time. A cancellation is raised only after that."""
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await asyncio.wait((future,), timeout=max(0.0, until - loop.time()))
            break
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if future.done() and not future.cancelled():
            future.exception()
        raise cancelled
    return future.done()
