"""What becomes of a VM that waits for a host."""

from dataclasses import replace
from datetime import datetime
from uuid import UUID

from leveret.conductor.decisions.parts import build_problem, failed, moved
from leveret.conductor.rows import Change, Vm
from leveret.shared.errors import Problem
from leveret.shared.lifecycle import State, Step


def placed(vm: Vm, host_id: UUID, host_name: str, token: int, now: datetime) -> Change:
    """A pending VM has got a host and a new fence."""
    after = replace(
        vm,
        state=State.BUILDING,
        step=Step.DISPATCHED,
        host_id=host_id,
        token=token,
        attempts=vm.attempts + 1,
        report_epoch=0,
        report_seq=0,
        steps=(),
        ssh=None,
        sent_at=now,
    )
    return moved(vm, after, "scheduled", host=host_name, host_id=str(host_id), attempt=after.attempts)


def unplaceable(vm: Vm, problem: Problem) -> Change:
    """No host takes it any more. One that failed elsewhere before ends with the reasons of that, too."""
    if not vm.failed_hosts:
        return failed(vm, problem)
    return failed(vm, build_problem(vm, **problem.details))
