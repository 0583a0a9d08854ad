"""What becomes of a VM that waits for a host."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from leveret.conductor.decisions.parts import Limits, build_problem, failed, moved
from leveret.conductor.rows import Change, Event, Vm, told
from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import WAITING, State, Step


def placed(
    vm: Vm,
    host_id: UUID,
    host_name: str,
    token: int,
    now: datetime,
    limits: Limits,
    *,
    seat: str | None = None,
    why: Mapping[str, Any] | None = None,
) -> Change:
    """A pending VM has got a host and a new fence. `why` says how the host was found."""
    after = replace(
        vm,
        state=State.BUILDING,
        step=Step.DISPATCHED,
        host_id=host_id,
        token=token,
        seat=seat,
        attempts=vm.attempts + 1,
        report_epoch=0,
        report_seq=0,
        steps=(),
        ssh=None,
        problem=None if vm.step == WAITING else vm.problem,
        # Who waited for room has all the time for a build that others have.
        deadline=now + limits.build if vm.step == WAITING else vm.deadline,
        looked_rooms=None,
        sent_at=now,
    )
    return moved(vm, after, "scheduled", host=host_name, host_id=str(host_id), attempt=after.attempts, **(why or {}))


def unplaceable(vm: Vm, problem: Problem, looked: int, now: datetime, limits: Limits) -> Change:
    """No host takes it now. It waits for room if its owner wants that; `looked` is what it was looked at with.

    One that does not wait, and failed elsewhere before, ends with the reasons of that, too.
    """
    if problem.code is Code.NO_CAPACITY and vm.waits_for_capacity:
        return wait(vm, problem, looked, now, limits)
    if not vm.failed_hosts:
        return failed(vm, problem)
    return failed(vm, build_problem(vm, **problem.details))


def wait(vm: Vm, problem: Problem, looked: int, now: datetime, limits: Limits) -> Change:
    """There is no room for it yet, and `problem` says why. That it waits is said once."""
    after = replace(vm, step=WAITING, problem=told(problem), looked_rooms=looked)
    if vm.step == WAITING:
        return Change(vm, after)
    after = replace(after, deadline=now + limits.wait)
    return Change(vm, after, (Event(after, "waiting", {"problem": told(problem)}),))
