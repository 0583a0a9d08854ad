"""What becomes of a VM when its host says what it sees."""

from dataclasses import replace
from datetime import datetime
from typing import Any

from leveret.conductor.decisions.fencing import is_waiting_for_its_host
from leveret.conductor.decisions.parts import Limits, build_problem, deleted, error, failed, moved, released, wish
from leveret.conductor.rows import Change, Event, Vm, told
from leveret.shared.errors import Code, Problem
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
        return deleted(vm, seen)
    return Change(vm, replace(seen, problem=told(report.problem) if report.problem else vm.problem))


def _seen_in_error(vm: Vm, seen: Vm, report: VmReport, now: datetime, limits: Limits) -> Change:
    if report.observed is Observed.ABSENT and vm.is_given_up:
        return Change(vm, replace(released(seen), step=None, deadline=None))
    is_back = is_waiting_for_its_host(vm) or (vm.problem or {}).get("code") == Code.DOMAIN_MISSING
    if is_back and report.settled and report.observed in {Observed.RUNNING, Observed.STOPPED}:
        return _settle(vm, seen, report, now, limits)  # somebody put it back, or its host is there again
    if is_waiting_for_its_host(vm) and report.observed is Observed.ABSENT:
        return error(vm, seen, report.problem or _missing(vm))
    return Change(vm, seen)


def _removed(vm: Vm) -> Problem:
    """Within a placement absent is final: told to build under the same token, the host would only say it again."""
    return Problem.of(Code.BUILD_FAILED, f"The host has removed VM {vm.name}, under the token that it was to be built.")


def _missing(vm: Vm) -> Problem:
    return Problem.of(Code.DOMAIN_MISSING, f"The host has no domain of VM {vm.name} any more.")


def _seen_building(vm: Vm, seen: Vm, report: VmReport, now: datetime, limits: Limits) -> Change:
    if report.observed is Observed.ABSENT:
        return _build_failed(vm, seen, report.problem or _removed(vm), now, limits)
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
        return error(vm, replace(seen, step=None, deadline=None, guest_ready=False), report.problem or _missing(vm))
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
        again = wish(vm, "restored", now + limits.change)
        again = replace(again, after=replace(again.after, generation=report.generation + 1))
    elif rebooted and vm.desired is Desired.RUNNING and report.generation == vm.generation:
        again = wish(vm, "start", now + limits.change)
    else:
        return change
    return Change(change.before, again.after, (*change.events, *again.events))


def _build_failed(vm: Vm, seen: Vm, problem: Problem, now: datetime, limits: Limits) -> Change:
    """The host could not build it and has cleaned up: elsewhere, if there is a chance and time for it."""
    failure = {"host_id": str(vm.host_id), "problem": told(problem)}
    freed = replace(released(seen), failed_hosts=(*vm.failed_hosts, failure))
    event = Event(freed, "build_failed", {"problem": told(problem), "attempt": vm.attempts})
    in_time = vm.deadline is None or now < vm.deadline
    if problem.code in HOPELESS or (vm.attempts <= 1 and limits.attempts <= 1):
        change = failed(freed, problem)
    elif vm.attempts < limits.attempts and in_time:
        after = replace(freed, state=State.PENDING, step=Step.SCHEDULING, problem=told(problem))
        change = moved(freed, after, "pending", attempt=vm.attempts)
    else:
        change = failed(freed, build_problem(freed))
    return Change(vm, change.after, (replace(event, vm=change.after), *change.events))
