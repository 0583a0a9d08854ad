"""Streams of events: each watcher has a place in the log, and whatever happens to it goes on from there."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from leveret.api import sse
from leveret.api.auth import Asker
from leveret.api.eventlog import EventLog, Page
from leveret.api.feed import EventFeed
from leveret.api.waits import news
from leveret.shared.errors import Code, LeveretError, fail

#: Events in hand for one watcher. The next are read when these were taken.
PAGE = 200
_LOOK_S = 10.0
_AWAY_PAUSE_S = 0.5
_RETRY_AFTER_S = 10


@dataclass(frozen=True, slots=True)
class Sheet:
    """A page of the log, and its events as they are sent."""

    page: Page
    wire: bytes


class Streams:
    """Who follows events as they come.

    Watchers who stand at the same place read it together: a thousand of them cost one query an event.
    """

    def __init__(self, log: EventLog, feed: EventFeed, *, heartbeat_s: float, most: int) -> None:
        self._log = log
        self._feed = feed
        self._heartbeat_s = heartbeat_s
        self._most = most
        self._open: Counter[str] = Counter()
        self._reading: dict[tuple[str, int, UUID | None, int], asyncio.Task[Sheet]] = {}

    @property
    def count(self) -> int:
        return self._open.total()

    async def follow(
        self, asker: Asker, project: str, after: int | Literal["latest"], vm_id: UUID | None
    ) -> AsyncGenerator[bytes, None]:
        """Pieces of a stream: the events of a project, or of one of its VMs, after this number and from now on.

        Ends when the process stops, and when the token has ended. While Postgres is away there are only heartbeats.
        Raises LeveretError `rate_limited` or `unavailable`, both before the first piece.
        """
        with self._seat(asker.identity.project), self._feed.watch(project, vm_id) as watch:
            place = after if after != "latest" else await self._log.newest(project)
            sheet = await self._read(project, place, vm_id)
            # Who begins at the beginning has no place that could have been passed by.
            told = sheet.page.forgotten_seq if place == 0 else 0
            yield sse.RETRY + _told(sheet, place, told)
            beat_at = time.monotonic() + self._heartbeat_s
            while not self._feed.is_closed:
                place, told = _next_place(sheet.page, place), max(told, sheet.page.forgotten_seq)
                try:
                    if not sheet.page.is_full:
                        await news(watch, asker, min(_LOOK_S, beat_at - time.monotonic()))
                    await asker.confirm()
                    sheet = await self._read(project, place, vm_id)
                except LeveretError as error:
                    if error.problem.code is Code.UNAUTHENTICATED:
                        return
                    await asyncio.sleep(_AWAY_PAUSE_S)
                    sheet = Sheet(Page((), checked=place, is_full=True, forgotten_seq=told, last_seq=place), b"")
                piece = _told(sheet, place, told)
                if piece or beat_at <= time.monotonic():
                    yield piece or sse.HEARTBEAT
                    beat_at = time.monotonic() + self._heartbeat_s

    async def _read(self, project: str, place: int, vm_id: UUID | None) -> Sheet:
        """The sheet after this place. Shared only with those whose read began after the last news, so it has them."""
        key = (project, place, vm_id, self._feed.wakes)
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = asyncio.create_task(self._read_alone(project, place, vm_id))
            reading.add_done_callback(lambda done: self._was_read(key, done))
        return await asyncio.shield(reading)

    async def _read_alone(self, project: str, place: int, vm_id: UUID | None) -> Sheet:
        page = await self._log.read(project, place, PAGE, vm_id)
        return Sheet(page, b"".join(map(sse.event, page.items)))

    def _was_read(self, key: tuple[str, int, UUID | None, int], done: "asyncio.Task[Sheet]") -> None:
        del self._reading[key]
        if not done.cancelled():
            done.exception()  # those who wait for it have it too, if there still is one

    @contextmanager
    def _seat(self, project: str) -> Iterator[None]:
        """One of the streams that a project may have at a time."""
        if self._open[project] >= self._most:
            message = f"Project {project} has {self._most} streams of events open here, which is as many as it may."
            raise fail(Code.RATE_LIMITED, message, retry_after_s=_RETRY_AFTER_S)
        self._open[project] += 1
        try:
            yield
        finally:
            self._open[project] -= 1
            if not self._open[project]:
                del self._open[project]


def _told(sheet: Sheet, place: int, told: int) -> bytes:
    """What a watcher is sent: before the events, that some may be missing, if that was not told before."""
    forgotten, last = sheet.page.forgotten_seq, sheet.page.last_seq
    is_passed = 0 < place < forgotten and told < forgotten
    return sse.gap(place, forgotten, last) + sheet.wire if is_passed or last < place else sheet.wire


def _next_place(page: Page, place: int) -> int:
    """Who stands behind the newest event stands nowhere, and comes back to where there are events."""
    return page.last_seq if page.last_seq < place else page.checked
