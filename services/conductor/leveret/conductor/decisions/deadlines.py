"""What becomes of a VM that has waited too long."""

from dataclasses import replace
from datetime import datetime

from leveret.conductor.decisions.parts import Limits, attempts, error, failed
from leveret.conductor.rows import Change, Event, Vm, told
from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import WAITING, Desired, State, Step


def on_deadline(vm: Vm, now: datetime, limits: Limits) -> Change | None:
    """What becomes of a VM that has waited too long. Nothing is given up that a host has not confirmed (law 3)."""
    if vm.deadline is None or now < vm.deadline:
        return None
    if vm.state is State.BUILDING and now < vm.deadline + limits.backstop:
        return None  # the host gives up by itself, and its word may be under way
    match vm.state:
        case State.PENDING if vm.step == WAITING and vm.problem is not None:
            return failed(vm, _waited_in_vain(vm, Problem.model_validate(vm.problem)))
        case State.PENDING:
            problem = Problem.of(
                Code.BUILD_TIMEOUT, f"No host took VM {vm.name} in time.", step=vm.step, attempts=attempts(vm)
            )
            return failed(vm, problem)
        case State.BUILDING:
            problem = Problem.of(
                Code.BUILD_TIMEOUT,
                f"VM {vm.name} was not built in time; it stood at step {vm.step}.",
                step=vm.step,
                attempts=attempts(vm),
                last=vm.problem,
            )
            after = replace(vm, step=Step.CLEANUP, deadline=now + limits.delete, sent_at=None)
            return error(vm, after, problem)
        case State.ERROR:
            return Change(vm, replace(vm, deadline=now + limits.delete, sent_at=None))
        case State.DELETING:
            late = Problem.of(
                Code.DELETE_TIMEOUT, f"The host has not yet confirmed that VM {vm.name} is gone.", last=vm.problem
            )
        case _:
            late = Problem.of(
                Code.STOP_TIMEOUT if vm.desired is Desired.STOPPED else Code.HYPERVISOR_TIMEOUT,
                f"The host has not yet made VM {vm.name} {vm.desired}.",
                last=vm.problem,
            )
    after = replace(vm, problem=told(late), deadline=now + limits.delete, sent_at=None)
    if (vm.problem or {}).get("code") == late.code:
        return Change(vm, replace(after, problem=vm.problem))  # said already; a host may be away for days
    return Change(vm, after, (Event(after, "late", {"problem": told(late)}),))


def _waited_in_vain(vm: Vm, last: Problem) -> Problem:
    """The reason for which there was no room, as it was last."""
    return last.model_copy(update={"message": f"No room came about for VM {vm.name} in time. {last.message}"})
