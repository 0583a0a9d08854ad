"""A question to the driver that is asked now and then, and must not hold up who asks it."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from leveret.shared.errors import LeveretError, Problem

T = TypeVar("T")


class Question(Generic[T]):
    """`known` is the last answer, `problem` why there was none the last time.

    It is asked no oftener than every `every_s`. One that hangs is left hanging, and not asked a second time: cancelling
    it might hang as well.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], known: T, *, every_s: float = 0.0) -> None:
        self.known = known
        self.problem: Problem | None = None
        self._ask = ask
        self._every_s = every_s
        self._asked_at = -math.inf
        self._answer: asyncio.Future[T] | None = None

    @property
    def hangs(self) -> bool:
        """Whether the answer is still to come."""
        return self._answer is not None

    def begin(self) -> "asyncio.Future[T] | None":
        """Ask, if it is time to; then the answer that is to come."""
        now = asyncio.get_running_loop().time()
        if self._answer is not None or now < self._asked_at + self._every_s:
            return None
        self._asked_at = now
        self._answer = asyncio.ensure_future(self._ask())
        return self._answer

    def hear(self) -> None:
        """Take in the answer, if it has come."""
        if self._answer is None or not self._answer.done():
            return
        answer, self._answer = self._answer, None
        try:
            self.known, self.problem = answer.result(), None
        except LeveretError as error:
            self.problem = error.problem

    def drop(self) -> None:
        """Nobody wants the answer any more."""
        if self._answer is not None:
            self._answer.cancel()
