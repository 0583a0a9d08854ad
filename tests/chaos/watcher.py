"""Somebody who only listens: everything that happens in a project must reach him, once and in order."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from chaos.snapshot import Watched
from leveret.client.errors import ClientError, EventGap
from leveret.shared.documents import EventView

RESTING = frozenset({"running", "stopped", "error", "deleted", "rejected"})


class Watcher:
    """Follows a project's events for ever, and keeps the numbers of all that it was told.

    `states` is what was last heard of each VM; who waits for one is woken.
    """

    def __init__(self, name: str, project: str, since: int = 0) -> None:
        self.name = name
        self.project = project
        self.since = since
        self.seqs: list[int] = []
        self.gaps: list[str] = []
        self.states: dict[str, str] = {}
        self._wakers: dict[str, asyncio.Event] = {}

    async def run(self, events: AsyncGenerator[EventView, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    self._hear(event)
        except ClientError as error:
            self.gaps.append(f"ended after event {self.seqs[-1] if self.seqs else 0}: {error!r}")

    def _hear(self, event: EventView) -> None:
        self.seqs.append(event.seq)
        if event.vm_id is not None:
            vm_id = str(event.vm_id)
            self.states[vm_id] = event.state.value if event.state else event.type
            if waker := self._wakers.get(vm_id):
                waker.set()

    def on_gap(self, gap: EventGap) -> None:
        self.gaps.append(str(gap))

    async def until_resting(self, vm_id: str, within_s: float) -> None:
        """Return when the VM is heard to rest, or this much later."""
        waker = self._wakers.setdefault(vm_id, asyncio.Event())
        try:
            async with asyncio.timeout(within_s):
                while self.states.get(vm_id) not in RESTING:
                    waker.clear()
                    await waker.wait()
        except TimeoutError:
            return
        finally:
            self._wakers.pop(vm_id, None)

    def told(self) -> Watched:
        return Watched(watcher=self.name, project=self.project, since=self.since, seqs=tuple(self.seqs))
