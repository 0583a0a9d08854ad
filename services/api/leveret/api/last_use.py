"""When tokens were last used. The API may not write, so it tells the conductor now and then; only ever shown."""

import time
from uuid import UUID

from leveret.shared import topology
from leveret.shared.bus import Link, Publisher
from leveret.shared.loop import Loop
from leveret.shared.messages import TYPE_OF, TokensUsed

TELL_EVERY_S = 30.0
#: How often one token is told of, in seconds.
ACCURACY_S = 60.0
#: Tokens in one message, and remembered; what is too much is not told.
_MOST = 10_000


class LastUse:
    """Best effort: what is lost is told again when the token is used again."""

    def __init__(self, publisher: Publisher, link: Link) -> None:
        self._publisher = publisher
        self._link = link
        self._fresh: dict[UUID, float] = {}
        self._told: dict[UUID, float] = {}
        self._loop = Loop("tokens.used", self.tell_once, every_s=TELL_EVERY_S)

    def start(self) -> None:
        self._loop.start()

    async def stop(self) -> None:
        await self._loop.stop()
        await self.tell_once()

    def note(self, token_id: UUID) -> None:
        """This token is used now."""
        now = time.time()
        if now - self._told.get(token_id, 0.0) >= ACCURACY_S and len(self._fresh) < _MOST:
            self._fresh[token_id] = now

    async def tell_once(self) -> None:
        """Tell what was noted; while the broker is away it is kept."""
        now = time.time()
        self._told = {token_id: at for token_id, at in self._told.items() if 0 <= now - at < ACCURACY_S}
        if not self._fresh or not self._link.is_up:
            return
        fresh, self._fresh = self._fresh, {}
        self._told |= fresh
        await self._publisher.post(topology.REQUESTS.name, TYPE_OF[TokensUsed], TokensUsed(last_used=fresh))
