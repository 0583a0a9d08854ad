"""The primary: of the Postgres servers that a URL names, the one that may be written."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import asyncpg

CONNECT_TIMEOUT_S = 5.0
#: For the others to answer, once one has.
GRACE_S = 0.5

#: Its timeline: a number that grows with every promotion; null of a standby.
_TIMELINE = """
SELECT CASE WHEN NOT pg_is_in_recovery()
       THEN ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::bigint END
"""

# Text, because the class is generic for the type checker only.
Session: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Primary:
    """Connects to the primary behind a URL that may name several: `postgresql://user:password@one:5432,two:5432/name`.

    The driver would ask one after the other within one time limit, and never come to the second while the first is
    silent, as a machine without power is. Here all are asked at once. Of two that say they are the primary, the one
    that was promoted last is: the other is an old one that somebody let run again. The newest timeline is remembered,
    so that nobody goes back to the old one while the new one is away (law 9).

    A URL that names one server is left to the driver.
    """

    def __init__(self, url: str) -> None:
        self._urls = one_by_one(url)
        self._timeline = 0
        #: Called when another server has become the primary: sessions with the old one are of no use any more.
        self.on_move: Callable[[], Awaitable[None]] | None = None

    async def connect(self, *_url: Any, timeout: float = CONNECT_TIMEOUT_S, **more: Any) -> Session:
        """A session with the primary, within this many seconds. Takes what asyncpg.connect takes, but for the URL.

        Raises what asyncpg raises, and ConnectionError when none of the servers is the primary.
        """
        if len(self._urls) == 1:
            return await asyncpg.connect(self._urls[0], timeout=timeout, **more)
        asking = [asyncio.create_task(_ask(url, timeout, more)) for url in self._urls]
        try:
            await _hear(asking)
            return await self._choose([task for task in asking if task.done()])
        finally:
            for task in asking:
                task.add_done_callback(_dismiss)
                task.cancel()

    async def _choose(self, answered: "list[asyncio.Task[tuple[Session, int]]]") -> Session:
        primaries = [task for task in answered if task.exception() is None and task.result()[1]]
        if not primaries:
            raise next((task.exception() for task in answered if task.exception()), None) or ConnectionError(
                "none of these servers is the primary"
            )
        newest = max(primaries, key=lambda task: task.result()[1])
        session, timeline = newest.result()
        if timeline < self._timeline:
            raise ConnectionError(f"only a former primary answers (timeline {timeline}; {self._timeline} was there)")
        if timeline > self._timeline:
            has_moved, self._timeline = self._timeline > 0, timeline
            if has_moved and self.on_move is not None:
                await self.on_move()
        newest.set_name(_CHOSEN)
        return session


_CHOSEN = "chosen"


async def _ask(url: str, timeout_s: float, more: dict[str, Any]) -> tuple[Session, int]:
    """A session with this server, and its timeline; 0 of a standby."""
    async with asyncio.timeout(timeout_s):
        session = await asyncpg.connect(url, timeout=timeout_s, **more)
        try:
            return session, await session.fetchval(_TIMELINE) or 0
        except BaseException:
            session.terminate()
            raise


async def _hear(asking: "list[asyncio.Task[tuple[Session, int]]]") -> None:
    """Return when all have answered, or a little after one of them turned out to be a primary."""
    waiting = set(asking)
    while waiting:
        found = any(task.done() and task.exception() is None and task.result()[1] for task in asking)
        done, waiting = await asyncio.wait(
            waiting, timeout=GRACE_S if found else None, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            return


def _dismiss(task: "asyncio.Task[tuple[Session, int]]") -> None:
    """End the session that was not chosen."""
    if task.get_name() != _CHOSEN and not task.cancelled() and task.exception() is None:
        task.result()[0].terminate()


def one_by_one(url: str) -> list[str]:
    """The same URL for each of the servers that it names."""
    there = urlsplit(url)
    user, at, servers = there.netloc.rpartition("@")
    return [there._replace(netloc=f"{user}{at}{server}").geturl() for server in servers.split(",")]
