"""Parts that changes are made of, whatever brings them about."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from leveret.conductor.rows import Change, Event, Vm, told
from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import Desired, State


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, and how often they are tried."""

    build: timedelta
    change: timedelta
    delete: timedelta
    attempts: int
    #: How long a VM waits for room that is to.
    wait: timedelta = timedelta(hours=1)
    #: How long a host's own word on a build that is late is waited for.
    backstop: timedelta = timedelta(seconds=15)


def wish(vm: Vm, verb: str, deadline: datetime, **wanted: Any) -> Change:
    """A new generation. A VM that is still pending or building keeps the deadline of its build."""
    if vm.state in {State.PENDING, State.BUILDING} and vm.deadline is not None:
        deadline = vm.deadline
    after = replace(vm, generation=vm.generation + 1, deadline=deadline, sent_at=None, **wanted)
    return Change(vm, after, (Event(after, "changed", {"verb": verb}),))


def moved(before: Vm, after: Vm, event: str, **data: Any) -> Change:
    return Change(before, after, (Event(after, event, data, before.state),))


def released(vm: Vm) -> Vm:
    """Off its host: only after the host said that nothing is left of it there."""
    return replace(vm, host_id=None, token=None, seat=None, ssh=None, sent_at=None, guest_ready=False, steps=())


def deleted(vm: Vm, seen: Vm | None = None) -> Change:
    after = replace(
        released(seen or vm),
        desired=Desired.DELETED,
        generation=vm.generation if vm.desired is Desired.DELETED else vm.generation + 1,
        state=State.DELETED,
        step=None,
        deadline=None,
        address=None,
        group_name=None,
        problem=None,
    )
    return moved(vm, after, "deleted")


def error(before: Vm, after: Vm, problem: Problem) -> Change:
    after = replace(after, state=State.ERROR, problem=told(problem))
    return moved(before, after, "error", problem=told(problem))


def failed(vm: Vm, problem: Problem) -> Change:
    """In error without a host: there is nothing to wait for."""
    return error(vm, replace(vm, step=None, deadline=None), problem)


def build_problem(vm: Vm, **details: Any) -> Problem:
    """Why a VM was not built, from every host that tried. `details` say why no other host could."""
    last = Problem.model_validate(vm.failed_hosts[-1]["problem"])
    tried = len(vm.failed_hosts)
    what = f"{tried} hosts tried" if tried > 1 else "One host tried"
    but = ", and no other host can take it" if details else ""
    return Problem.of(
        Code.BUILD_FAILED,
        f"{what} to build VM {vm.name} and failed{but}; the last said: {last.message}",
        step=last.step,
        host=last.host,
        attempts=attempts(vm),
        **details,
    )


def attempts(vm: Vm) -> list[dict[str, Any]]:
    return [failure["problem"] | {"host_id": failure["host_id"]} for failure in vm.failed_hosts]
