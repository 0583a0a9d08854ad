"""Decisions about VMs, as functions: whatever comes in whatever order, the row stays possible and the moves legal."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leveret.conductor import decisions
from leveret.conductor.decisions import Limits, on_deadline, on_report, on_request
from leveret.conductor.dispatch import wanted_of
from leveret.conductor.rows import Change, Vm
from leveret.shared.documents import DeleteVm, RebootVm, RetryVm, StartVm, StopVm
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.lifecycle import MOVES, Desired, Observed, State, Step, Wanted
from leveret.shared.messages import VmReport

pytestmark = pytest.mark.unit

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LIMITS = Limits(timedelta(seconds=200), timedelta(seconds=120), timedelta(seconds=60), attempts=3)
HOST = uuid.UUID(int=1)


def pending(**more: Any) -> Vm:
    base: dict[str, Any] = {
        "id": uuid.UUID(int=7), "project_id": "default", "name": "web", "spec": {}, "spec_hash": b"0" * 32,
        "labels": {},
        "vcpus": 1, "memory_mib": 128, "disk_gib": 1, "image": {}, "network": "default", "mac": "", "address": None,
        "desired": Desired.RUNNING, "state": State.PENDING, "step": Step.SCHEDULING, "created_at": NOW,
        "deadline": NOW + LIMITS.build,
    }  # fmt: skip
    return Vm(**(base | more))


def building() -> Vm:
    return decisions.placed(pending(), HOST, "h1", 1, NOW, LIMITS).after


def report(vm: Vm, observed: Observed, **more: Any) -> VmReport:
    base: dict[str, Any] = {
        "vm_id": vm.id, "token": vm.token or 0, "generation": vm.generation, "seq": vm.report_seq + 1,
        "observed": observed, "settled": True,
    }  # fmt: skip
    return VmReport(**(base | more))


def after(change: Change | None) -> Vm:
    assert change is not None
    return change.after


def running() -> Vm:
    return after(on_report(building(), report(building(), Observed.RUNNING), 1, NOW, LIMITS))


def check(change: Change, *, is_fenced: bool = False) -> None:
    """What the CHECKs and the trigger of the database would say, and that the log tells the truth."""
    vm, before = change.after, change.before
    assert before is not None
    assert vm.state is before.state or vm.state in MOVES[before.state]
    assert vm.generation >= before.generation
    assert 0 <= vm.observed_generation <= vm.generation
    assert (vm.host_id is None) == (vm.token is None)
    assert vm.host_id is not None or vm.state in {State.PENDING, State.DELETED, State.ERROR}
    assert vm.host_id is None or vm.state not in {State.PENDING, State.DELETED}
    assert vm.deadline is not None or vm.state not in {State.PENDING, State.BUILDING, State.DELETING}
    assert (
        vm.deadline is not None or vm.observed_generation == vm.generation or vm.state in {State.ERROR, State.DELETED}
    )
    assert vm.problem is not None or vm.state is not State.ERROR
    assert (vm.desired is Desired.DELETED) == (vm.state in {State.DELETING, State.DELETED})
    moves = [event for event in change.events if event.moved_from is not None]
    if vm.state is not before.state:
        assert moves
        assert moves[0].moved_from is before.state
        assert moves[-1].vm.state is vm.state
    # Law 3: a host is given up only when it said that the domain is gone, or there never was one, or it is proven off.
    if before.host_id is not None and vm.host_id is None:
        assert is_fenced or before.state is not State.RUNNING


VERBS = st.sampled_from([DeleteVm(), StartVm(), StopVm(grace_s=0), StopVm(grace_s=30), RebootVm(), RetryVm()])
PROBLEMS = st.sampled_from(
    [None, *(Problem.of(c, "x") for c in (Code.DISK_FULL, Code.IMAGE_INVALID, Code.HOST_REBOOTED, Code.GUEST_CRASHED))]
)
REPORTS = st.tuples(
    st.sampled_from(Observed), st.booleans(), st.integers(-2, 2), st.integers(-1, 3), PROBLEMS, st.booleans()
)
FENCES = st.sampled_from(["fenced", "retired"])
FACTS = st.lists(
    st.one_of(VERBS, REPORTS, st.just("late"), st.just("placed"), st.just("unplaceable"), FENCES), max_size=25
)


@given(FACTS, st.sampled_from(["none", "restart"]))
@settings(max_examples=100, deadline=None)
def test_no_sequence_of_facts_makes_an_impossible_row(facts: list[Any], on_host_failure: str) -> None:
    vm, now, token = pending(spec={"on_host_failure": on_host_failure}), NOW, 0
    refusals: set[str] = set()
    for n, fact in enumerate(facts):
        change: Change | None = None
        now += timedelta(seconds=1)
        match fact:
            case "late" if vm.deadline is not None:
                now = max(now, vm.deadline)
                change = on_deadline(vm, now, LIMITS)
            case "placed" if vm.state is State.PENDING:
                token += 1
                change = decisions.placed(vm, HOST, "h1", token, now, LIMITS)
            case "unplaceable" if vm.state is State.PENDING:
                change = decisions.unplaceable(vm, Problem.of(Code.NO_CAPACITY, "full"), 1, now, LIMITS)
            case "fenced" if vm.host_id is not None:
                change = decisions.on_fence(vm, "h1", now, LIMITS)
            case "retired" if vm.host_id is not None:
                change = decisions.on_retire(vm, "h1")
            case (observed, settled, generation, seq, problem, ready) if vm.host_id is not None:
                seen = report(
                    vm, observed, settled=settled, generation=max(vm.generation + generation, 0),
                    seq=vm.report_seq + seq, problem=problem, guest_ready=ready,
                )  # fmt: skip
                change = on_report(vm, seen, 1, now, LIMITS)
            case DeleteVm() | StartVm() | StopVm() | RebootVm() | RetryVm():
                try:
                    change = on_request(vm, fact, f"r{n}", now, LIMITS)
                except LeveretError as error:
                    refusals.add(error.problem.code)
        if change is not None:
            check(change, is_fenced=isinstance(fact, str) and fact in {"fenced", "retired"})
            vm = change.after
    assert refusals <= {Code.VM_DELETED, Code.STATE_CONFLICT}
    # Law 7: whatever happened, a delete is accepted, and the host's word ends it.
    change = on_request(vm, DeleteVm(), "last", now, LIMITS)
    vm = change.after if change else vm
    if vm.host_id is not None:
        vm = after(on_report(vm, report(vm, Observed.ABSENT), 1, now, LIMITS))
    assert vm.state is State.DELETED


@pytest.mark.parametrize("verb", [StopVm(), RebootVm(), DeleteVm(), StartVm()])
def test_a_request_that_is_repeated_is_carried_out_once(verb: Any) -> None:
    vm = running()
    once = on_request(vm, verb, "r1", NOW, LIMITS)
    vm = once.after if once else vm
    twice = on_request(vm, verb, "r1", NOW, LIMITS)
    assert twice is None or twice.after.generation == vm.generation


def test_a_report_that_was_overtaken_is_dropped() -> None:
    vm = running()
    assert on_report(vm, report(vm, Observed.STOPPED, seq=vm.report_seq), 1, NOW, LIMITS) is None
    assert on_report(vm, report(vm, Observed.STOPPED, seq=99), 0, NOW, LIMITS) is None
    assert after(on_report(vm, report(vm, Observed.STOPPED, seq=0), 2, NOW, LIMITS)).state is State.STOPPED


def test_a_vm_that_ran_is_never_rebuilt_when_its_domain_is_missing() -> None:
    vm = after(on_report(running(), report(running(), Observed.ABSENT), 1, NOW, LIMITS))
    assert (vm.state, vm.host_id) == (State.ERROR, HOST)
    assert vm.problem is not None
    assert vm.problem["code"] == Code.DOMAIN_MISSING
    assert not vm.is_lagging  # nothing is done to what may be left there
    back = after(on_report(vm, report(vm, Observed.RUNNING), 1, NOW, LIMITS))
    assert (back.state, back.problem) == (State.RUNNING, None)


def test_a_failed_build_is_tried_on_three_hosts_and_then_explained() -> None:
    vm = building()
    for attempt in (1, 2, 3):
        assert vm.attempts == attempt
        failed = report(vm, Observed.ABSENT, problem=Problem.of(Code.DISK_FULL, f"try {attempt}"))
        vm = after(on_report(vm, failed, 1, NOW, LIMITS))
        if attempt < 3:
            assert vm.state is State.PENDING
            vm = decisions.placed(vm, uuid.UUID(int=attempt + 1), "h", attempt + 1, NOW, LIMITS).after
    assert vm.state is State.ERROR
    assert vm.problem is not None
    assert [a["message"] for a in vm.problem["details"]["attempts"]] == ["try 1", "try 2", "try 3"]


def test_a_wish_made_while_building_is_kept_for_when_it_is_built() -> None:
    vm = after(on_request(building(), StopVm(grace_s=0), "r1", NOW, LIMITS))
    assert (vm.state, vm.desired, vm.generation) == (State.BUILDING, Desired.STOPPED, 2)
    vm = after(on_report(vm, report(vm, Observed.RUNNING, generation=1), 1, NOW, LIMITS))
    assert (vm.state, vm.is_lagging) == (State.RUNNING, True)
    vm = after(on_report(vm, report(vm, Observed.STOPPED, generation=2), 1, NOW, LIMITS))
    assert (vm.state, vm.is_lagging, vm.deadline) == (State.STOPPED, False, None)


def test_a_stop_may_be_made_harder_but_not_softer() -> None:
    stopping = after(on_request(running(), StopVm(grace_s=60), "r1", NOW, LIMITS))
    assert after(on_request(stopping, StopVm(grace_s=90), "r2", NOW, LIMITS)).generation == stopping.generation
    forced = after(on_request(stopping, StopVm(grace_s=0), "r3", NOW, LIMITS))
    assert (forced.grace_s, forced.generation) == (0, stopping.generation + 1)


def test_the_error_of_a_late_build_is_cleaned_up_by_its_host() -> None:
    vm = building()
    assert on_deadline(vm, NOW + LIMITS.build, LIMITS) is None  # the host's own word may be under way
    late = after(on_deadline(replace(vm, step=Step.IMAGE), NOW + LIMITS.build + LIMITS.backstop, LIMITS))
    assert (late.state, late.step, late.is_lagging, late.host_id) == (State.ERROR, Step.CLEANUP, True, HOST)
    clean = after(on_report(late, report(late, Observed.ABSENT), 1, NOW, LIMITS))
    assert (clean.state, clean.host_id, clean.is_lagging) == (State.ERROR, None, False)
    again = after(on_request(clean, RetryVm(), "r1", NOW, LIMITS))
    assert (again.state, again.attempts, again.problem) == (State.PENDING, 0, None)


def test_a_delete_that_is_late_says_so_once_and_goes_on() -> None:
    vm = after(on_request(running(), DeleteVm(), "r1", NOW, LIMITS))
    first = on_deadline(vm, NOW + LIMITS.delete, LIMITS)
    vm = after(first)
    assert first is not None
    assert [event.type for event in first.events] == ["late"]
    again = on_deadline(vm, NOW + 2 * LIMITS.delete, LIMITS)
    assert again is not None
    assert again.events == ()
    assert (again.after.state, again.after.sent_at) == (State.DELETING, None)


def test_a_failed_build_without_another_host_tells_the_build_s_reason_and_why_there_is_none() -> None:
    failed = report(building(), Observed.ABSENT, problem=Problem.of(Code.START_FAILED, "QEMU said no"))
    vm = after(on_report(building(), failed, 1, NOW, LIMITS))
    vm = decisions.unplaceable(
        vm, Problem.of(Code.NO_CAPACITY, "full", constraints={"failed_before": 1}), 1, NOW, LIMITS
    ).after
    assert vm.problem is not None
    assert vm.problem["code"] == Code.BUILD_FAILED
    assert "QEMU said no" in vm.problem["message"]
    assert vm.problem["details"]["constraints"] == {"failed_before": 1}
    assert [a["code"] for a in vm.problem["details"]["attempts"]] == [Code.START_FAILED]


def test_a_request_with_nothing_to_do_does_not_undo_a_later_one_when_it_comes_again() -> None:
    vm = after(on_request(running(), StartVm(), "r1", NOW, LIMITS))  # it runs already
    vm = after(on_request(vm, StopVm(), "r2", NOW, LIMITS))
    again = on_request(vm, StartVm(), "r1", NOW, LIMITS)
    assert again is None
    assert vm.desired is Desired.STOPPED


def test_a_domain_that_was_put_back_while_a_wish_is_open_is_told_the_wish() -> None:
    vm = after(on_request(running(), StopVm(), "r1", NOW, LIMITS))
    vm = after(on_report(vm, report(vm, Observed.ABSENT), 1, NOW, LIMITS))
    change = on_report(vm, report(vm, Observed.RUNNING, generation=1), 1, NOW, LIMITS)
    assert change is not None
    check(change)
    assert (change.after.state, change.after.is_lagging) == (State.RUNNING, True)


def test_a_host_that_was_rebooted_before_running_was_heard_starts_the_vm_again() -> None:
    rebooted = Problem.of(Code.HOST_REBOOTED, "The host was rebooted.")
    vm = after(on_report(building(), report(building(), Observed.STOPPED, problem=rebooted), 1, NOW, LIMITS))
    assert (vm.state, vm.generation, vm.is_lagging) == (State.STOPPED, 2, True)


def test_a_row_that_is_older_than_its_host_catches_up_and_keeps_its_wish() -> None:
    vm = after(on_request(running(), StopVm(), "r1", NOW, LIMITS))
    vm = after(on_report(vm, report(vm, Observed.RUNNING, generation=7), 1, NOW, LIMITS))
    assert (vm.generation, vm.is_lagging, vm.desired) == (8, True, Desired.STOPPED)
    vm = after(on_report(vm, report(vm, Observed.STOPPED, generation=8), 1, NOW, LIMITS))
    assert (vm.state, vm.is_lagging) == (State.STOPPED, False)


def test_a_guest_that_was_rebooted_is_not_ready_until_it_says_so_again() -> None:
    vm = after(on_report(running(), report(running(), Observed.RUNNING, guest_ready=True), 1, NOW, LIMITS))
    assert vm.guest_ready
    vm = after(on_request(vm, RebootVm(), "r1", NOW, LIMITS))
    vm = after(on_report(vm, report(vm, Observed.RUNNING), 1, NOW, LIMITS))
    assert (vm.is_lagging, vm.guest_ready) == (False, False)


def test_a_vm_on_a_fenced_host_waits_for_it_unless_it_is_to_be_made_anew() -> None:
    waits = after(decisions.on_fence(running(), "h1", NOW, LIMITS))
    assert (waits.state, waits.host_id, waits.token) == (State.ERROR, HOST, 1)
    assert (waits.problem or {})["code"] == Code.HOST_FENCED
    assert decisions.on_fence(waits, "h1", NOW, LIMITS) is None
    anew = after(decisions.on_fence(replace(running(), spec={"on_host_failure": "restart"}), "h1", NOW, LIMITS))
    assert (anew.state, anew.host_id, anew.generation, anew.deadline) == (State.PENDING, None, 2, NOW + LIMITS.build)
    unborn = after(decisions.on_fence(building(), "h1", NOW, LIMITS))
    assert (unborn.state, unborn.host_id) == (State.PENDING, None)


def test_a_vm_that_waits_for_its_fenced_host_comes_back_with_it_or_is_explained() -> None:
    waits = after(decisions.on_fence(running(), "h1", NOW, LIMITS))
    back = after(on_report(waits, report(waits, Observed.RUNNING), 2, NOW, LIMITS))
    assert (back.state, back.problem) == (State.RUNNING, None)
    lost = after(on_report(waits, report(waits, Observed.ABSENT), 2, NOW, LIMITS))
    assert (lost.problem or {})["code"] == Code.DOMAIN_MISSING


def test_only_while_its_host_is_fenced_may_a_waiting_vm_be_made_anew_elsewhere() -> None:
    waits = after(decisions.on_fence(running(), "h1", NOW, LIMITS))
    with pytest.raises(LeveretError, match="is error"):
        on_request(waits, RetryVm(), "r", NOW, LIMITS)
    anew = after(on_request(waits, RetryVm(), "r", NOW, LIMITS, host_is_fenced=True))
    assert (anew.state, anew.host_id) == (State.PENDING, None)


def test_a_vm_whose_user_data_is_gone_is_not_made_anew_as_another() -> None:
    lost = after(decisions.on_retire(replace(running(), user_data_wiped=True), "h1"))
    assert (lost.state, lost.host_id, (lost.problem or {})["code"]) == (State.ERROR, None, Code.HOST_RETIRED)
    with pytest.raises(LeveretError, match="user-data"):
        on_request(lost, RetryVm(), "r", NOW, LIMITS)


def test_a_host_that_clears_away_a_failed_build_is_not_told_to_remove_the_vm() -> None:
    clearing = after(
        on_report(building(), report(building(), Observed.BUILDING, settled=False, step=Step.CLEANUP), 1, NOW, LIMITS)
    )
    assert (clearing.state, clearing.step) == (State.BUILDING, Step.CLEANUP)
    assert wanted_of(clearing) is Wanted.RUNNING
    late = after(on_deadline(clearing, NOW + timedelta(hours=1), LIMITS))
    assert wanted_of(late) is Wanted.ABSENT


def test_a_placement_that_its_host_has_removed_is_over_and_not_asked_for_again() -> None:
    elsewhere = after(on_report(building(), report(building(), Observed.ABSENT), 1, NOW, LIMITS))
    assert (elsewhere.state, elsewhere.host_id, elsewhere.token) == (State.PENDING, None, None)
