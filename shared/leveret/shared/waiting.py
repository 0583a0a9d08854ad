"""Waiting for a VM: the one judge of whether it is what is waited for, or cannot become so by itself any more."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from leveret.shared.documents import VmView
from leveret.shared.lifecycle import Desired, State

#: What one may wait for. `ready`: it runs, and its guest said that it has come up.
Target = Literal["running", "ready", "stopped", "deleted"]

_LEAVING = frozenset({State.DELETING, State.DELETED})


class Outcome(StrEnum):
    """How a wait ended. `timed_out` is never judged: only who waits knows what time it is."""

    REACHED = "reached"
    FAILED = "failed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a VM stands, as far as it is known: events tell less than its document does.

    `settled`: the newest wish has come true, and nothing is under way. None is "not known", in all three.
    """

    state: State
    desired: Desired | None = None
    generation: int | None = None
    settled: bool | None = None
    guest_ready: bool = False

    @classmethod
    def of(cls, vm: VmView) -> "Standing":
        """Where a VM stands by its document."""
        settled = vm.observed_generation >= vm.generation
        return cls(vm.state, vm.desired, vm.generation, settled, vm.guest_ready)


def judge(vm: Standing, target: Target, generation: int = 0) -> Outcome | None:
    """Whether a VM is what is waited for, or cannot become so by itself any more; None while it may.

    `generation` is the least that counts: a VM that has not yet heard of a request says nothing about it. Of what is
    not known, nothing is concluded that ends a wait in vain.
    """
    heard = vm.generation is None or vm.generation >= generation
    if target == "deleted":
        if vm.state is State.DELETED:
            return Outcome.REACHED
        return Outcome.FAILED if heard and _nobody_deletes(vm) else None
    if vm.state in _LEAVING:
        return Outcome.FAILED  # nothing leads back
    if not heard:
        return None
    if vm.state is State.ERROR or (target != "stopped" and _nobody_starts(vm)):
        return Outcome.FAILED
    return Outcome.REACHED if vm.settled is not False and _is(vm, target) else None


def _is(vm: Standing, target: Target) -> bool:
    match target:
        case "ready":
            return vm.state is State.RUNNING and vm.guest_ready
        case _:
            return vm.state == target


def _nobody_deletes(vm: Standing) -> bool:
    """The moment a delete is accepted, the state says so."""
    if vm.state in _LEAVING or vm.desired is Desired.DELETED:
        return False
    return vm.desired is not None or vm.settled is True


def _nobody_starts(vm: Standing) -> bool:
    """It is to be stopped, however far that is; or it is off, by whoever's doing, and nothing is under way."""
    return vm.desired is Desired.STOPPED or (vm.state is State.STOPPED and vm.settled is True)
