"""How much a host does at once."""

import asyncio
from dataclasses import dataclass


@dataclass(slots=True)
class _Fetch:
    """An image that is being fetched: for which project first, and how many builds wait for it."""

    project: str
    waiting: int = 0


class FetchGate:
    """Bounds how many different images are fetched at once, and how many of them for one project: half.

    Builds from one image pass together (the driver fetches it once), and an image that was fetched before is never
    waited for. A server that hangs or trickles holds a place and nothing else; so there are many of them, and those of
    one project never take the last.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._share = max(1, at_once // 2)
        self._fetched: set[str] = set()
        self._under_way: dict[str, _Fetch] = {}
        self._freed = asyncio.Event()

    async def enter(self, sha256: str, project: str) -> None:
        """Wait for a place. May be cancelled; whoever has entered must leave."""
        while not self._may_enter(sha256, project):
            await self._freed.wait()
        self._under_way.setdefault(sha256, _Fetch(project)).waiting += 1

    def _may_enter(self, sha256: str, project: str) -> bool:
        if sha256 in self._fetched or sha256 in self._under_way:
            return True
        own = sum(fetch.project == project for fetch in self._under_way.values())
        return len(self._under_way) < self._at_once and own < self._share

    def leave(self, sha256: str, *, fetched: bool) -> None:
        if fetched:
            self._fetched.add(sha256)
        self._under_way[sha256].waiting -= 1
        if not self._under_way[sha256].waiting:
            del self._under_way[sha256]
            self._freed.set()
            self._freed = asyncio.Event()
