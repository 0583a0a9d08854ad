"""What those are told who wait on a connection when it ends.

aiormq ends a connection of which it has heard nothing for too long by cancelling its own reader, and hands that very
CancelledError to everybody who waits for an answer. To asyncio it then looks as if they had been told to stop: a
request ends without an answer, a loop for good. So they get a ConnectionError, like everybody else whose connection
breaks.
"""

import asyncio
from typing import Any

from aiormq.base import FutureStore

_reject_all: Any = FutureStore.reject_all


def install() -> None:
    """Make every connection of this process end in this way."""
    FutureStore.reject_all = _reject  # type: ignore[method-assign]


async def _reject(self: FutureStore, exception: Any) -> None:
    if exception is asyncio.CancelledError or isinstance(exception, asyncio.CancelledError):
        exception = ConnectionError("the connection to the broker was given up")
    await _reject_all(self, exception)
