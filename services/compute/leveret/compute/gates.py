"""How much a host does at once."""

import asyncio
from collections import Counter


class FetchGate:
    """Bounds how many different images are fetched at once.

    Builds from one image pass together (the driver fetches it once), and an image that was fetched before is never
    waited for: a server that trickles delays nobody but those who want its image.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._fetched: set[str] = set()
        self._under_way: Counter[str] = Counter()
        self._freed = asyncio.Event()

    async def enter(self, sha256: str) -> None:
        """Wait for a place. May be cancelled; whoever has entered must leave."""
        while not (sha256 in self._fetched or sha256 in self._under_way or len(self._under_way) < self._at_once):
            await self._freed.wait()
        self._under_way[sha256] += 1

    def leave(self, sha256: str, *, fetched: bool) -> None:
        if fetched:
            self._fetched.add(sha256)
        self._under_way[sha256] -= 1
        if not self._under_way[sha256]:
            del self._under_way[sha256]
            self._freed.set()
            self._freed = asyncio.Event()
