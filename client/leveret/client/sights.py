"""What a program has heard of VMs over AMQP, where nothing can be read; and waiting for one of them."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, replace
from uuid import UUID

from leveret.client.errors import ClientError, VmFailed, refusal
from leveret.client.target import Target
from leveret.shared.documents import EventView
from leveret.shared.errors import Problem
from leveret.shared.lifecycle import State

#: Of so many VMs the last news is kept.
_KEPT_VMS = 50_000
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
        there = {
            "running": self.state is State.RUNNING and not self.moving,
            "ready": self.state is State.RUNNING and not self.moving and self.guest_ready,
            "stopped": self.state is State.STOPPED and not self.moving,
            "deleted": self.state is State.DELETED,
        }
        if there[target]:
            return True
        gone = self.state in {State.DELETING, State.DELETED} and target != "deleted"
        went_off = self.state is State.STOPPED and self.moving is False and target in {"running", "ready"}
        if gone or went_off or self.state is State.ERROR:
            raise VmFailed(self, target)
        return False


class Sights:
    """The newest sight of every VM that was heard of, and who waits for the next one."""

    def __init__(self) -> None:
        self._known: OrderedDict[UUID, VmSight] = OrderedDict()
        self._waiting: dict[UUID, set[asyncio.Event]] = {}
        self._ended: ClientError | None = None

    def get(self, vm_id: UUID) -> VmSight | None:
        return self._known.get(vm_id)

    def hear(self, event: EventView) -> None:
        if event.vm_id is None:
            return
        self.put((self._known.get(event.vm_id) or VmSight(event.vm_id)).after(event))

    def put(self, sight: VmSight) -> None:
        self._known[sight.id] = sight
        self._known.move_to_end(sight.id)
        while len(self._known) > _KEPT_VMS:
            self._known.popitem(last=False)
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
                sight = self._known.get(vm_id)
                if sight is not None and sight.reached(target):
                    return sight
                if self._ended is not None:
                    raise self._ended
                news.clear()
                await news.wait()
        finally:
            waiting = self._waiting[vm_id]
            waiting.discard(news)
            if not waiting:
                del self._waiting[vm_id]
