"""What a program has heard of VMs over AMQP, where nothing can be read; and waiting for one of them."""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TypeVar
from uuid import UUID

from leveret.client.errors import ClientError, VmFailed, refusal
from leveret.shared.documents import EventView
from leveret.shared.errors import Problem
from leveret.shared.lifecycle import State
from leveret.shared.waiting import Outcome, Standing, Target, judge

#: Of so many VMs the last news is kept, and so many requests are known to have been heard of.
_KEPT_VMS = 50_000
_KEPT_REQUESTS = 10_000
#: How long the event of an accepted request is waited for. There is none when the request changed nothing.
_HEARD_WITHIN_S = 3.0
K = TypeVar("K")
V = TypeVar("V")
_ARRIVED = frozenset({"running", "stopped", "settled", "deleted"})


@dataclass(frozen=True, slots=True)
class VmSight:
    """A VM as its last event or a verdict told of it.

    `moving`: a wish is on its way; None: not known, since its last event was not heard. `refused` is why a request
    for a VM that is not there was refused.
    """

    id: UUID
    name: str = ""
    state: State | None = None
    guest_ready: bool = False
    moving: bool | None = None
    problem: Problem | None = None
    refused: Problem | None = None

    def after(self, event: EventView) -> "VmSight":
        """What is known when this was heard too."""
        told = event.data.get("problem")
        problem = Problem.model_validate(told) if isinstance(told, dict) else None
        if event.type == "rejected":
            return replace(self, refused=problem)
        moving = self.moving
        if event.type in _ARRIVED:
            moving = False
        elif event.type == "accepted" or (event.type == "changed" and event.data.get("verb") != "update"):
            moving = True
        guest_ready = event.state is State.RUNNING and (self.guest_ready or event.type == "guest_ready")
        return VmSight(self.id, event.vm_name or self.name, event.state, guest_ready, moving, problem)

    def reached(self, target: Target) -> bool:
        """Whether it is what is waited for. Raises VmFailed when it will not be by itself, and why there is no VM."""
        if self.state is None:
            if self.refused is not None:
                raise refusal(str(self.refused.code), self.refused.message, hint=self.refused.hint)
            return False
        settled = None if self.moving is None else not self.moving
        outcome = judge(Standing(self.state, settled=settled, guest_ready=self.guest_ready), target)
        if outcome is Outcome.FAILED:
            raise VmFailed(self, target)
        return outcome is Outcome.REACHED


class Sights:
    """The newest sight of every VM that was heard of, and who waits for the next one.

    An accepted request is news that may be faster than its event: until that is heard (or has had the time to come),
    what is known of the VM is from before the request, and says nothing about it.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[UUID, VmSight] = OrderedDict()
        self._waiting: dict[UUID, set[asyncio.Event]] = {}
        self._heard: OrderedDict[str, None] = OrderedDict()
        self._asked: OrderedDict[UUID, tuple[str, float]] = OrderedDict()
        self._ended: ClientError | None = None

    def get(self, vm_id: UUID) -> VmSight | None:
        return self._known.get(vm_id)

    def hear(self, event: EventView) -> None:
        if event.vm_id is None:
            return
        request_id = event.data.get("request_id")
        if isinstance(request_id, str):
            _keep(self._heard, request_id, None, _KEPT_REQUESTS)
            if self._asked.get(event.vm_id, ("", 0.0))[0] == request_id:
                del self._asked[event.vm_id]
        self.put((self._known.get(event.vm_id) or VmSight(event.vm_id)).after(event))

    def asked(self, vm_id: UUID, request_id: str) -> None:
        """This request was accepted just now."""
        if request_id not in self._heard:
            _keep(self._asked, vm_id, (request_id, time.monotonic() + _HEARD_WITHIN_S), _KEPT_VMS)

    def put(self, sight: VmSight) -> None:
        _keep(self._known, sight.id, sight, _KEPT_VMS)
        self._wake(sight.id)

    def doubt(self) -> None:
        """Events were lost: where VMs are on their way to is not known any more."""
        for vm_id, sight in self._known.items():
            self._known[vm_id] = replace(sight, moving=None)

    def end(self, error: ClientError) -> None:
        """Nothing will be heard any more."""
        self._ended = error
        for vm_id in list(self._waiting):
            self._wake(vm_id)

    def _wake(self, vm_id: UUID) -> None:
        for news in self._waiting.get(vm_id, ()):
            news.set()

    async def until(self, vm_id: UUID, target: Target) -> VmSight:
        """The sight that reaches it. Raises VmFailed, a refusal, or what ended the hearing."""
        news = asyncio.Event()
        self._waiting.setdefault(vm_id, set()).add(news)
        try:
            while True:
                stale_s = self._stale_s(vm_id)
                sight = self._known.get(vm_id)
                if not stale_s and sight is not None and sight.reached(target):
                    return sight
                if self._ended is not None:
                    raise self._ended
                news.clear()
                await _within(news, stale_s or None)
        finally:
            waiting = self._waiting[vm_id]
            waiting.discard(news)
            if not waiting:
                del self._waiting[vm_id]

    def _stale_s(self, vm_id: UUID) -> float:
        """For how long what is known of this VM is to be held for older than what was asked last."""
        _, until = self._asked.get(vm_id, ("", 0.0))
        return max(0.0, until - time.monotonic())


async def _within(news: asyncio.Event, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await news.wait()
    except TimeoutError:
        return


def _keep(kept: "OrderedDict[K, V]", key: K, value: V, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
