"""Hearing: whether this conductor gets what hosts say. Who was deaf cannot tell that they were silent."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from leveret.shared.bus import Consumer


class Hearing:
    """Since when everything that was said has been heard, and handled, without a longer gap than `gap_s` seconds.

    The consumers' own word is not enough: a broker that hangs, a Postgres that hangs or a conductor that was frozen all
    leave a connection that looks as sound as one on which nobody has anything to say. So the broker is asked
    something again and again, on the very channels on which it delivers, and the answer counts when all that came
    before it is handled. And while the broker takes nothing from anybody (`knock` raises then), there is nothing to
    be heard.
    """

    def __init__(self, consumers: Sequence[Consumer], gap_s: float, *, knock: Callable[[], Awaitable[None]]) -> None:
        self._consumers = consumers
        self._knock = knock
        self._gap_s = gap_s
        self._since = self._heard_at = time.monotonic()

    async def listen_once(self) -> None:
        """Hear everything that there is to be heard now. May take for ever: then nothing is heard."""
        asked = await asyncio.gather(
            self._knock(), *(one.catch_up() for one in self._consumers), return_exceptions=True
        )
        if any(isinstance(error, Exception) for error in asked):
            return  # an alarm, or a channel broke: its link builds another
        now = time.monotonic()
        if now - self._heard_at > self._gap_s:
            self._since = now
        self._heard_at = now

    @property
    def attentive_s(self) -> float:
        """For how long it has heard everything; 0 when it does not."""
        now = time.monotonic()
        if now - self._heard_at > self._gap_s:
            return 0.0
        return min(now - self._since, *(consumer.attentive_s for consumer in self._consumers))
