"""Waiting until a VM is as asked, pushed by the event feed. What was seen decides, never a message."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar
from uuid import UUID

from leveret.api import queries, views
from leveret.api.auth import Asker
from leveret.api.database import Database
from leveret.api.feed import EventFeed, Watch
from leveret.shared.documents import VmView
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.waiting import Outcome

#: How often a wait looks at the rows by itself: a queued request may be refused, and no event tells of that.
_LOOK_QUEUED_S = 1.0
_LOOK_S = 10.0
_AWAY_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Sight:
    """What was found of a VM: itself, the problem of its refused create, or that it will never be."""

    vm: VmView | None = None
    refusal: Problem | None = None
    refused_request_id: str | None = None
    tombstone: bool = False

    @property
    def is_there(self) -> bool:
        return self.vm is not None


class _Seen(Protocol):
    """Whatever is looked at until it is as asked."""

    @property
    def is_there(self) -> bool: ...


Seen = TypeVar("Seen", bound=_Seen)


async def look(database: Database, project: str, vm_id: UUID) -> Sight:
    """What there is of this id in this project."""
    row = await database.row(project, queries.GET_VM, project, vm_id)
    if row is not None:
        return Sight(vm=views.vm(row))
    rejection = await database.row(project, queries.GET_REJECTION, project, vm_id)
    if rejection is not None:
        problem = Problem.model_validate(rejection["problem"])
        return Sight(refusal=problem, refused_request_id=rejection["request_id"])
    tombstone = await database.row(project, queries.GET_TOMBSTONE, project, vm_id)
    return Sight(tombstone=tombstone is not None)


async def news(watch: Watch, asker: Asker, for_s: float) -> bool:
    """Whether something happened within this time. The token is confirmed as often as it must be meanwhile.

    Returns early when nobody can tell of the token: then nobody can tell of the VM either, and whoever looks finds out.
    Raises LeveretError `unauthenticated` when the token has ended.
    """
    until = time.monotonic() + for_s
    while (left_s := until - time.monotonic()) > 0:
        if await watch.wait(min(left_s, asker.good_for_s)):
            return True
        try:
            await asker.confirm()
        except LeveretError as error:
            if error.problem.code is not Code.UNAVAILABLE:
                raise
            return False
    return False


class Waits:
    """Waits for VMs. Ends early when the process is about to stop or the client has gone."""

    def __init__(self, database: Database, feed: EventFeed) -> None:
        self._database = database
        self._feed = feed

    async def until(
        self,
        project: str,
        vm_id: UUID,
        done: Callable[[Sight], Outcome | None],
        *,
        timeout_s: float,
        asker: Asker,
    ) -> tuple[Outcome, Sight]:
        """Look at one VM until `done` says what came of it. Raises as `until_seen` does."""
        return await self.until_seen(
            project,
            vm_id,
            lambda: look(self._database, project, vm_id),
            done,
            nothing=Sight(),
            timeout_s=timeout_s,
            asker=asker,
        )

    async def until_seen(
        self,
        project: str,
        vm_id: UUID | None,
        look_at: Callable[[], Awaitable[Seen]],
        done: Callable[[Seen], Outcome | None],
        *,
        nothing: Seen,
        timeout_s: float,
        asker: Asker,
    ) -> tuple[Outcome, Seen]:
        """Look whenever something happens to this VM, or to any of the project, until `done` says what came of it.

        Raises LeveretError `unavailable` if Postgres was away to the end, `unauthenticated` when the token ended.
        """
        until = time.monotonic() + timeout_s
        with self._feed.watch(project, vm_id, settled_only=True) as watch:
            while True:
                away: LeveretError | None = None
                sight = nothing
                try:
                    await asker.confirm()
                    sight = await look_at()
                except LeveretError as error:
                    if error.problem.code is not Code.UNAVAILABLE:
                        raise
                    away = error
                outcome = done(sight) if away is None else None
                if outcome is not None:
                    return outcome, sight
                if until <= time.monotonic() or self._feed.is_closed or await asker.is_gone():
                    if away is not None:
                        raise away
                    return Outcome.TIMED_OUT, sight
                if away is not None:
                    await asyncio.sleep(min(until - time.monotonic(), _AWAY_PAUSE_S))
                else:
                    look_s = _LOOK_S if sight.is_there else _LOOK_QUEUED_S
                    await news(watch, asker, min(until - time.monotonic(), look_s))
