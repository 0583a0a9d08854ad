"""When a wait is over, over REST and AMQP alike."""

from typing import Any

import pytest

from leveret.api import examples
from leveret.shared.documents import VmView
from leveret.shared.lifecycle import Desired, State
from leveret.shared.waiting import Outcome, Standing, Target, judge

pytestmark = pytest.mark.unit

REACHED, FAILED = Outcome.REACHED, Outcome.FAILED


def vm(state: str, **more: Any) -> Standing:
    wanted = {"stopped": "stopped", "deleting": "deleted", "deleted": "deleted"}.get(state, "running")
    view = VmView.model_validate(examples.VM | {"state": state, "desired": wanted, "guest_ready": False} | more)
    assert view.state == state
    return Standing.of(view)


@pytest.mark.parametrize(
    ("target", "there"),
    [
        ("running", vm("running")),
        ("ready", vm("running", guest_ready=True)),
        ("stopped", vm("stopped")),
        ("deleted", vm("deleted")),
    ],
)
def test_a_wait_is_over_when_the_vm_is_there(target: Target, there: Standing) -> None:
    assert judge(there, target) is REACHED


@pytest.mark.parametrize("target", ["running", "ready", "stopped"])
@pytest.mark.parametrize("state", ["error", "deleting", "deleted"])
def test_a_wait_fails_when_the_vm_cannot_get_there(target: Target, state: str) -> None:
    assert judge(vm(state), target) is FAILED


def test_a_wait_for_deletion_goes_on_while_the_vm_is_being_deleted() -> None:
    assert judge(vm("deleting"), "deleted") is None


@pytest.mark.parametrize("state", ["pending", "building", "running", "stopped", "error"])
def test_a_wait_for_the_deletion_of_a_vm_that_nobody_deletes_fails_at_once(state: str) -> None:
    assert judge(vm(state), "deleted") is FAILED


@pytest.mark.parametrize("state", ["pending", "building", "running", "stopped", "error"])
def test_a_delete_that_was_not_judged_yet_is_waited_for(state: str) -> None:
    assert judge(vm(state, generation=3), "deleted", generation=4) is None


@pytest.mark.parametrize("target", ["running", "ready", "stopped"])
@pytest.mark.parametrize("state", ["pending", "building"])
def test_a_wait_goes_on_while_the_vm_is_on_its_way(target: Target, state: str) -> None:
    assert judge(vm(state, observed_generation=0), target) is None


def test_ready_means_that_the_guest_said_so() -> None:
    assert judge(vm("running"), "ready") is None


def test_a_state_that_belongs_to_an_older_wish_does_not_count() -> None:
    asked_to_stop = vm("running", generation=2, observed_generation=1, desired="stopped")
    assert judge(asked_to_stop, "stopped") is None
    asked_to_start = vm("running", generation=2, observed_generation=1)
    assert judge(asked_to_start, "running") is None


@pytest.mark.parametrize("target", ["running", "ready"])
@pytest.mark.parametrize("state", ["pending", "building", "running", "stopped"])
def test_a_vm_that_is_to_be_stopped_never_comes_to_run_by_itself(target: Target, state: str) -> None:
    to_be_stopped = vm(state, desired="stopped", generation=2, observed_generation=1, guest_ready=True)
    assert judge(to_be_stopped, target) is FAILED
    assert judge(to_be_stopped, target, generation=3) is None


@pytest.mark.parametrize(("state", "target"), [("running", "running"), ("stopped", "stopped"), ("error", "running")])
def test_a_row_that_has_not_heard_of_the_request_says_nothing_about_it(state: str, target: Target) -> None:
    before = vm(state, generation=3, observed_generation=3)
    assert judge(before, target, generation=4) is None
    after = vm(state, generation=4, observed_generation=4)
    assert judge(after, target, generation=4) is (FAILED if state == "error" else REACHED)


def test_a_vm_that_went_off_by_itself_fails_a_wait_for_running() -> None:
    off = vm("stopped", desired="running")
    assert judge(off, "running") is FAILED
    assert judge(off, "stopped") is REACHED


def test_a_vm_that_is_about_to_be_started_again_after_a_reboot_of_its_host_is_waited_for() -> None:
    again = vm("stopped", desired="running", generation=2, observed_generation=1)
    assert judge(again, "running") is None


@pytest.mark.parametrize("target", ["running", "ready"])
def test_a_vm_that_was_stopped_on_purpose_fails_a_wait_for_running_at_once(target: Target) -> None:
    assert judge(vm("stopped"), target) is FAILED
    assert judge(vm("stopped"), target, generation=2) is None


def test_a_guest_may_still_switch_itself_off() -> None:
    assert judge(vm("running"), "stopped") is None


# What events tell is less than a document.


@pytest.mark.parametrize(
    ("heard", "target", "outcome"),
    [
        (Standing(State.RUNNING), "running", REACHED),
        (Standing(State.RUNNING, settled=False), "running", None),
        (Standing(State.RUNNING, settled=True, guest_ready=True), "ready", REACHED),
        (Standing(State.STOPPED, settled=True), "running", FAILED),
        (Standing(State.STOPPED), "running", None),
        (Standing(State.STOPPED, Desired.STOPPED), "running", FAILED),
        (Standing(State.STOPPED, settled=False), "stopped", None),
        (Standing(State.ERROR), "stopped", FAILED),
        (Standing(State.DELETING), "running", FAILED),
        (Standing(State.DELETING), "deleted", None),
        (Standing(State.RUNNING), "deleted", None),
        (Standing(State.RUNNING, settled=True), "deleted", FAILED),
        (Standing(State.DELETED), "deleted", REACHED),
    ],
)
def test_of_what_is_not_known_nothing_is_concluded(heard: Standing, target: Target, outcome: Outcome | None) -> None:
    assert judge(heard, target) is outcome
