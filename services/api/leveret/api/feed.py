"""The event feed: Postgres says that a project has news, and who waits for it looks again.

One per process, on a connection of its own. A notification is a hint (law 1): who is woken reads the rows, the feed
reads again by itself every two seconds, and everybody looks again when the connection comes back. Only those
whom the new events concern are woken: in a burst of a thousand waits, a batch of events costs one small query.
"""

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog

from leveret.api import queries
from leveret.api.database import AWAY, CONNECT_TIMEOUT_S, Database
from leveret.shared.errors import LeveretError
from leveret.shared.lifecycle import State
from leveret.shared.loop import Loop

log = structlog.get_logger()

CHANNEL = "leveret_events"
REREAD_S = 2.0
PROBE_S = 10.0
#: So many look at their rows sooner than we could find out whom an event concerns.
FEW = 4
_BATCH = 1000
_ON_THE_WAY = frozenset({State.PENDING, State.BUILDING})


class Watch:
    """Somebody who waits. `vm_id` None means any VM; `settled_only` skips what is only progress."""

    def __init__(self, vm_id: object, *, settled_only: bool) -> None:
        self.vm_id = vm_id
        self.settled_only = settled_only
        self._news = asyncio.Event()

    def wake(self) -> None:
        self._news.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether there was news since the last return; returns at once when there is, or after this time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        woken = self._news.is_set()
        self._news.clear()
        return woken


class EventFeed:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._watches: dict[str, set[Watch]] = {}
        self._seen: dict[str, int] = {}  # the newest event that was looked at, of projects with watches
        self._dirty: set[str] = set()
        self._reread_at = 0.0
        self._pump = Loop("feed", self.deliver, every_s=REREAD_S)
        self._listener: asyncio.Task[None] | None = None
        self.is_listening = False
        self.is_closed = False
        #: How often anybody was woken: who reads after it was counted reads what he was woken for.
        self.wakes = 0

    def start(self) -> None:
        self._pump.start()
        self._listener = asyncio.create_task(self._listen(), name="feed.listen")

    def close(self) -> None:
        """End every wait, now and from now on: the process is about to stop."""
        self.is_closed = True
        self._wake_all()

    async def stop(self) -> None:
        self.close()
        await self._pump.stop()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)

    @property
    def watching(self) -> int:
        return sum(len(watches) for watches in self._watches.values())

    @contextmanager
    def watch(self, project: str, vm_id: object = None, *, settled_only: bool = False) -> Iterator[Watch]:
        """Be told of what happens from now on. Read the rows only after this: then nothing falls between."""
        watch = Watch(vm_id, settled_only=settled_only)
        self._watches.setdefault(project, set()).add(watch)
        try:
            yield watch
        finally:
            watches = self._watches[project]
            watches.discard(watch)
            if not watches:
                del self._watches[project]
                self._seen.pop(project, None)

    async def deliver(self) -> None:
        """Look at the new events of every project that has some, and wake whom they concern."""
        projects, self._dirty = self._dirty, set()
        if time.monotonic() >= self._reread_at:
            self._reread_at = time.monotonic() + REREAD_S
            projects = set(self._watches)
        try:
            for project in projects & self._watches.keys():
                await self._deliver_to(project)
        except LeveretError:
            self._dirty |= projects  # Postgres is away: they are looked at again in two seconds

    async def _deliver_to(self, project: str) -> None:
        if len(self._watches[project]) <= FEW:
            self._seen.pop(project, None)
            self._wake(project)
            return
        seen = self._seen.get(project)
        if seen is None:
            newest = await self._database.row(project, queries.LAST_SEQ, project)
            if project in self._watches:
                self._seen[project] = newest["last_seq"] if newest is not None else 0
                self._wake(project)
            return
        while True:
            news = await self._database.rows(project, queries.NEWS, project, seen, _BATCH)
            if not news or project not in self._watches:
                return
            seen = self._seen[project] = news[-1]["seq"]
            touched = {row["vm_id"] for row in news}
            settled = {row["vm_id"] for row in news if row["state"] not in _ON_THE_WAY}
            self.wakes += 1
            for watch in self._watches[project]:
                if watch.vm_id is None or watch.vm_id in (settled if watch.settled_only else touched):
                    watch.wake()
            if len(news) < _BATCH:
                return

    def _wake(self, project: str) -> None:
        self.wakes += 1
        for watch in self._watches.get(project, ()):
            watch.wake()

    def _wake_all(self) -> None:
        for project in self._watches:
            self._wake(project)

    def _on_notify(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        if payload in self._watches:
            self._dirty.add(str(payload))
            self._pump.wake()

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except AWAY as error:
                log.warning("feed.away", error=type(error).__name__)
            except Exception:  # the rim
                log.exception("feed.failed")
            await asyncio.sleep(random.uniform(0.2, 1.0))

    async def _listen_once(self) -> None:
        connection = await self._database.connect()
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _connection: ended.set())
        try:
            await connection.add_listener(CHANNEL, self._on_notify)
            self.is_listening = True
            log.info("feed.listening")
            # What happened while nobody listened is unknown: everybody looks again.
            self._seen.clear()
            self._wake_all()
            while not ended.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(PROBE_S):
                        await ended.wait()
                if not ended.is_set():
                    await connection.execute("SELECT 1", timeout=CONNECT_TIMEOUT_S)
        finally:
            self.is_listening = False
            connection.terminate()
