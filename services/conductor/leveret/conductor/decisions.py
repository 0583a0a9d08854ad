"""What becomes of a VM: pure functions from a row and a fact to a change, or to a refusal.

No clock, no database, no bus in here. `now` is always Postgres's own, so that one clock sets every deadline (law 9);
a change says everything: counters, addresses and commands follow from the row before and the row after.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from leveret.conductor.rows import Change, Event, Vm, told
from leveret.shared.documents import DeleteVm, RebootVm, RetryVm, StartVm, StopVm
from leveret.shared.errors import Code, Problem, fail
from leveret.shared.lifecycle import Desired, Observed, State, Step
from leveret.shared.messages import VmReport

#: Failures that another host would repeat: the request itself is at fault, not the host.
HOPELESS = frozenset({Code.IMAGE_HASH_MISMATCH, Code.IMAGE_INVALID, Code.IMAGE_TOO_LARGE, Code.IMAGE_FORBIDDEN})

#: Failures that speak against the host: several in a row take it out of service. A misspelt URL does not.
HOST_FAULTS = frozenset(
    {
        Code.DISK_FULL,
        Code.DISK_FAILED,
        Code.CONFIG_DRIVE_FAILED,
        Code.NETWORK_FAILED,
        Code.DEFINE_FAILED,
        Code.START_FAILED,
        Code.HYPERVISOR_TIMEOUT,
        Code.HYPERVISOR_UNAVAILABLE,
    }
)

REMEMBERED_REQUESTS = 16

Verb = DeleteVm | StartVm | StopVm | RebootVm | RetryVm


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, and how often they are tried."""

    build: timedelta
    change: timedelta
    delete: timedelta
    attempts: int
    #: How long a host's own word on a build that is late is waited for.
    backstop: timedelta = timedelta(seconds=15)


# Requests


def on_request(vm: Vm, verb: Verb, request_id: str, now: datetime, limits: Limits) -> Change | None:
    """What an accepted request makes of a VM; None when there is nothing to change.

    Raises LeveretError with `vm_deleted` or `state_conflict` when it cannot be accepted.
    """
    if request_id in vm.recent_requests and not isinstance(verb, DeleteVm):
        return None
    if isinstance(verb, DeleteVm):
        change = _delete(vm, now, limits)
    elif vm.desired is Desired.DELETED:
        raise fail(Code.VM_DELETED, f"VM {vm.name} is {vm.state}.")
    else:
        match verb:
            case StartVm():
                change = _start(vm, now, limits)
            case StopVm(grace_s=grace_s):
                change = _stop(vm, grace_s, now, limits)
            case RebootVm():
                change = _reboot(vm, now, limits)
            case RetryVm():
                change = _retry(vm, now, limits)
    if change is None:
        # To be remembered all the same: repeated after a later wish, it would undo that one.
        return None if vm.state is State.DELETED else remember(vm, request_id)
    return replace(change, after=remember(change.after, request_id).after)


def remember(vm: Vm, request_id: str) -> Change:
    """Carried out or refused: this request is not to be looked at again."""
    return Change(vm, replace(vm, recent_requests=(*vm.recent_requests, request_id)[-REMEMBERED_REQUESTS:]))


def _delete(vm: Vm, now: datetime, limits: Limits) -> Change | None:
    if vm.state is State.DELETED:
        return None
    if vm.host_id is None:
        return _deleted(vm)
    if vm.state is State.DELETING:
        return Change(vm, replace(vm, sent_at=None))  # asked again: drive it again (law 7)
    after = replace(
        vm,
        desired=Desired.DELETED,
        generation=vm.generation + 1,
        state=State.DELETING,
        step=Step.REMOVE,
        problem=None,
        deadline=now + limits.delete,
        sent_at=None,
    )
    return _moved(vm, after, "deleting")


def _start(vm: Vm, now: datetime, limits: Limits) -> Change | None:
    if vm.state is State.ERROR:
        raise fail(
            Code.STATE_CONFLICT,
            f"VM {vm.name} is in error.",
            hint="Retry it (`leveret retry`) or delete it; `leveret explain` says why it failed.",
        )
    if vm.desired is Desired.RUNNING and (vm.state is not State.STOPPED or vm.is_lagging):
        return None
    return _wish(vm, "start", now + limits.change, desired=Desired.RUNNING, problem=None)


def _stop(vm: Vm, grace_s: int, now: datetime, limits: Limits) -> Change | None:
    if vm.state is State.ERROR:
        raise fail(Code.STATE_CONFLICT, f"VM {vm.name} is in error: it cannot be stopped.")
    if vm.desired is Desired.STOPPED and (not vm.is_lagging or grace_s >= vm.grace_s):
        return None
    deadline = now + limits.change + timedelta(seconds=grace_s)
    return _wish(vm, "stop", deadline, desired=Desired.STOPPED, grace_s=grace_s)


def _reboot(vm: Vm, now: datetime, limits: Limits) -> Change:
    if vm.state is not State.RUNNING or vm.desired is not Desired.RUNNING:
        raise fail(Code.STATE_CONFLICT, f"VM {vm.name} is {vm.state}: only a running VM can be rebooted.")
    return _wish(vm, "reboot", now + limits.change, restarts=vm.restarts + 1)


def _wish(vm: Vm, verb: str, deadline: datetime, **wanted: Any) -> Change:
    """A new generation. A VM that is still pending or building keeps the deadline of its build."""
    if vm.state in {State.PENDING, State.BUILDING} and vm.deadline is not None:
        deadline = vm.deadline
    after = replace(vm, generation=vm.generation + 1, deadline=deadline, sent_at=None, **wanted)
    return Change(vm, after, (Event(after, "changed", {"verb": verb}),))


def _retry(vm: Vm, now: datetime, limits: Limits) -> Change:
    if vm.state is not State.ERROR or vm.host_id is not None:
        raise fail(
            Code.STATE_CONFLICT,
            f"VM {vm.name} is {vm.state}{' and still being cleaned up' if vm.step == Step.CLEANUP else ''}.",
            hint="Only a VM in error that no host holds any more can be tried again.",
        )
    after = replace(
        vm,
        state=State.PENDING,
        step=Step.SCHEDULING,
        generation=vm.generation + 1,
        attempts=0,
        failed_hosts=(),
        problem=None,
        steps=(),
        deadline=now + limits.build,
    )
    return _moved(vm, after, "accepted", verb="retry")


# Placement


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
    return _moved(vm, after, "scheduled", host=host_name, host_id=str(host_id), attempt=after.attempts)


def unplaceable(vm: Vm, problem: Problem) -> Change:
    """No host takes it any more. One that failed elsewhere before ends with the reasons of that, too."""
    if not vm.failed_hosts:
        return _failed(vm, problem)
    return _failed(vm, _build_problem(vm, **problem.details))


# Reports


def on_report(vm: Vm, report: VmReport, epoch: int, now: datetime, limits: Limits) -> Change | None:
    """What a current report of the placement's own host makes of a VM; None when it is old or says nothing new.

    The caller has checked host and token.
    """
    if (epoch, report.seq) <= (vm.report_epoch, vm.report_seq):
        return None
    seen = replace(vm, report_epoch=epoch, report_seq=report.seq)
    if vm.state is State.DELETING:
        return _seen_deleting(vm, seen, report)
    if vm.state is State.ERROR:
        return _seen_in_error(vm, seen, report, now, limits)
    if vm.state is State.BUILDING:
        return _seen_building(vm, seen, report, now, limits)
    return _seen_living(vm, seen, report, now, limits)


def _seen_deleting(vm: Vm, seen: Vm, report: VmReport) -> Change:
    if report.observed is Observed.ABSENT:
        return _deleted(vm, seen)
    return Change(vm, replace(seen, problem=told(report.problem) if report.problem else vm.problem))


def _seen_in_error(vm: Vm, seen: Vm, report: VmReport, now: datetime, limits: Limits) -> Change:
    if report.observed is Observed.ABSENT and vm.step == Step.CLEANUP:
        return Change(vm, replace(_released(seen), step=None, deadline=None))
    missing = (vm.problem or {}).get("code") == Code.DOMAIN_MISSING
    if missing and report.settled and report.observed in {Observed.RUNNING, Observed.STOPPED}:
        return _settle(vm, seen, report, now, limits)  # somebody put it back
    return Change(vm, seen)


def _seen_building(vm: Vm, seen: Vm, report: VmReport, now: datetime, limits: Limits) -> Change:
    if report.observed is Observed.ABSENT:
        if report.problem is None:
            return Change(vm, replace(seen, sent_at=None))  # it never heard of it: tell it again
        return _build_failed(vm, seen, report.problem, now, limits)
    if report.settled and report.observed is not Observed.BUILDING:
        return _settle(vm, seen, report, now, limits)
    steps = tuple(step.model_dump(mode="json") for step in report.steps)
    after = replace(
        seen,
        step=report.step or vm.step,
        steps=steps or vm.steps,
        problem=told(report.problem) if report.problem else None,
    )
    if (after.step, after.steps) == (vm.step, vm.steps):
        return Change(vm, after)
    return Change(vm, after, (Event(after, "progress", {"step": after.step, "steps": list(after.steps)}),))


def _seen_living(vm: Vm, seen: Vm, report: VmReport, now: datetime, limits: Limits) -> Change:
    if report.observed is Observed.ABSENT:
        problem = Problem.of(Code.DOMAIN_MISSING, f"The host has no domain of VM {vm.name} any more.")
        return _error(vm, replace(seen, step=None, deadline=None, guest_ready=False), report.problem or problem)
    if not report.settled:
        return Change(vm, replace(seen, step=report.step, problem=told(report.problem) if report.problem else None))
    return _settle(vm, seen, report, now, limits)


def _settle(vm: Vm, seen: Vm, report: VmReport, now: datetime, limits: Limits) -> Change:
    """The host says that it is done with a generation: what it observes is the state."""
    state = State.RUNNING if report.observed is Observed.RUNNING else State.STOPPED
    observed = max(vm.observed_generation, min(report.generation, vm.generation))
    as_before = vm.guest_ready and vm.state is State.RUNNING and observed == vm.observed_generation
    after = replace(
        seen,
        state=state,
        step=None,
        observed_generation=observed,
        deadline=None if observed == vm.generation else vm.deadline or now + limits.change,
        guest_ready=state is State.RUNNING and (report.guest_ready or as_before),
        ssh=report.ssh.model_dump(mode="json") if report.ssh else vm.ssh,
        steps=tuple(step.model_dump(mode="json") for step in report.steps) or vm.steps,
        problem=told(report.problem) if report.problem else None,
    )
    change = Change(vm, after, _settled_events(vm, after))
    return _wish_again(change, report, now, limits)


def _settled_events(vm: Vm, after: Vm) -> tuple[Event, ...]:
    events: tuple[Event, ...] = ()
    if vm.state is not after.state:
        data: dict[str, Any] = {"steps": list(after.steps)} if vm.state is State.BUILDING else {}
        if after.problem:
            data["problem"] = after.problem
        events += (Event(after, after.state.value, data, vm.state),)
    elif after.observed_generation > vm.observed_generation:
        events += (Event(after, "settled", {"restarts": after.restarts}),)
    if after.guest_ready and not vm.guest_ready:
        events += (Event(after, "guest_ready"),)
    return events


def _wish_again(change: Change, report: VmReport, now: datetime, limits: Limits) -> Change:
    """A new generation of the same wish, when the host needs to be told once more.

    It was rebooted under a VM that should run; or it has seen a newer generation than the row, which an older copy of
    the database was restored under.
    """
    vm = change.after
    rebooted = report.problem is not None and report.problem.code == Code.HOST_REBOOTED
    if report.generation > vm.generation:
        again = _wish(vm, "restored", now + limits.change)
        again = replace(again, after=replace(again.after, generation=report.generation + 1))
    elif rebooted and vm.desired is Desired.RUNNING and report.generation == vm.generation:
        again = _wish(vm, "start", now + limits.change)
    else:
        return change
    return Change(change.before, again.after, (*change.events, *again.events))


def _build_failed(vm: Vm, seen: Vm, problem: Problem, now: datetime, limits: Limits) -> Change:
    """The host could not build it and has cleaned up: elsewhere, if there is a chance and time for it."""
    failed = {"host_id": str(vm.host_id), "problem": told(problem)}
    freed = replace(_released(seen), failed_hosts=(*vm.failed_hosts, failed))
    event = Event(freed, "build_failed", {"problem": told(problem), "attempt": vm.attempts})
    in_time = vm.deadline is None or now < vm.deadline
    if problem.code in HOPELESS or (vm.attempts <= 1 and limits.attempts <= 1):
        change = _failed(freed, problem)
    elif vm.attempts < limits.attempts and in_time:
        after = replace(freed, state=State.PENDING, step=Step.SCHEDULING, problem=told(problem))
        change = _moved(freed, after, "pending", attempt=vm.attempts)
    else:
        change = _failed(freed, _build_problem(freed))
    return Change(vm, change.after, (replace(event, vm=change.after), *change.events))


# Deadlines


def on_deadline(vm: Vm, now: datetime, limits: Limits) -> Change | None:
    """What becomes of a VM that has waited too long. Nothing is given up that a host has not confirmed (law 3)."""
    if vm.deadline is None or now < vm.deadline:
        return None
    if vm.state is State.BUILDING and now < vm.deadline + limits.backstop:
        return None  # the host gives up by itself, and its word may be under way
    match vm.state:
        case State.PENDING:
            problem = Problem.of(
                Code.BUILD_TIMEOUT, f"No host took VM {vm.name} in time.", step=vm.step, attempts=_attempts(vm)
            )
            return _failed(vm, problem)
        case State.BUILDING:
            problem = Problem.of(
                Code.BUILD_TIMEOUT,
                f"VM {vm.name} was not built in time; it stood at step {vm.step}.",
                step=vm.step,
                attempts=_attempts(vm),
                last=vm.problem,
            )
            after = replace(vm, step=Step.CLEANUP, deadline=now + limits.delete, sent_at=None)
            return _error(vm, after, problem)
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


# Parts of changes


def _moved(before: Vm, after: Vm, event: str, **data: Any) -> Change:
    return Change(before, after, (Event(after, event, data, before.state),))


def _released(vm: Vm) -> Vm:
    """Off its host: only after the host said that nothing is left of it there."""
    return replace(vm, host_id=None, token=None, ssh=None, sent_at=None, guest_ready=False, steps=())


def _deleted(vm: Vm, seen: Vm | None = None) -> Change:
    after = replace(
        _released(seen or vm),
        desired=Desired.DELETED,
        generation=vm.generation if vm.desired is Desired.DELETED else vm.generation + 1,
        state=State.DELETED,
        step=None,
        deadline=None,
        address=None,
        problem=None,
    )
    return _moved(vm, after, "deleted")


def _error(before: Vm, after: Vm, problem: Problem) -> Change:
    after = replace(after, state=State.ERROR, problem=told(problem))
    return _moved(before, after, "error", problem=told(problem))


def _failed(vm: Vm, problem: Problem) -> Change:
    """In error without a host: there is nothing to wait for."""
    return _error(vm, replace(vm, step=None, deadline=None), problem)


def _build_problem(vm: Vm, **details: Any) -> Problem:
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
        attempts=_attempts(vm),
        **details,
    )


def _attempts(vm: Vm) -> list[dict[str, Any]]:
    return [failure["problem"] | {"host_id": failure["host_id"]} for failure in vm.failed_hosts]
