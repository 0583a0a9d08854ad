"""When a wait is over."""

from typing import Any

import pytest

from leveret.api import examples
from leveret.api.waits import Goal, Outcome, Target, judge
from leveret.shared.documents import VmView
from leveret.shared.lifecycle import State

pytestmark = pytest.mark.unit

REACHED, FAILED = Outcome.REACHED, Outcome.FAILED


def vm(state: str, **more: Any) -> VmView:
    wanted = {"stopped": "stopped", "deleting": "deleted", "deleted": "deleted"}.get(state, "running")
    view = VmView.model_validate(examples.VM | {"state": state, "desired": wanted, "guest_ready": False} | more)
    assert view.state == state
    return view


@pytest.mark.parametrize(
    ("target", "there"),
    [
        ("running", vm("running")),
        ("ready", vm("running", guest_ready=True)),
        ("stopped", vm("stopped")),
        ("deleted", vm("deleted")),
    ],
)
def test_a_wait_is_over_when_the_vm_is_there(target: Target, there: VmView) -> None:
    assert judge(there, Goal(target)) is REACHED


@pytest.mark.parametrize("target", ["running", "ready", "stopped"])
@pytest.mark.parametrize("state", ["error", "deleting", "deleted"])
def test_a_wait_fails_when_the_vm_cannot_get_there(target: Target, state: str) -> None:
    assert judge(vm(state), Goal(target)) is FAILED


@pytest.mark.parametrize("state", [state for state in State if state != "deleted"])
def test_a_wait_for_deletion_never_fails_because_delete_always_works(state: str) -> None:
    assert judge(vm(state), Goal("deleted")) is None


@pytest.mark.parametrize("target", ["running", "ready", "stopped"])
@pytest.mark.parametrize("state", ["pending", "building"])
def test_a_wait_goes_on_while_the_vm_is_on_its_way(target: Target, state: str) -> None:
    assert judge(vm(state, observed_generation=0), Goal(target)) is None


def test_ready_means_that_the_guest_said_so() -> None:
    assert judge(vm("running"), Goal("ready")) is None


def test_a_state_that_belongs_to_an_older_wish_does_not_count() -> None:
    asked_to_stop = vm("running", generation=2, observed_generation=1, desired="stopped")
    assert judge(asked_to_stop, Goal("running")) is None
    assert judge(asked_to_stop, Goal("stopped")) is None


@pytest.mark.parametrize(("state", "target"), [("running", "running"), ("stopped", "stopped"), ("error", "running")])
def test_a_row_that_has_not_heard_of_the_request_says_nothing_about_it(state: str, target: Target) -> None:
    before = vm(state, generation=3, observed_generation=3)
    assert judge(before, Goal(target, generation=4)) is None
    after = vm(state, generation=4, observed_generation=4)
    assert judge(after, Goal(target, generation=4)) is (FAILED if state == "error" else REACHED)


def test_a_vm_that_went_off_by_itself_fails_a_wait_for_running() -> None:
    off = vm("stopped", desired="running")
    assert judge(off, Goal("running")) is FAILED
    assert judge(off, Goal("stopped")) is REACHED


def test_a_vm_that_is_about_to_be_started_again_after_a_reboot_of_its_host_is_waited_for() -> None:
    again = vm("stopped", desired="running", generation=2, observed_generation=1)
    assert judge(again, Goal("running")) is None


def test_a_stopped_vm_that_should_be_stopped_may_still_be_started_by_somebody() -> None:
    assert judge(vm("stopped"), Goal("running")) is None
