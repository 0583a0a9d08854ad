"""What one may wait for, and whether a VM is there."""

from typing import Literal

from leveret.client.errors import VmFailed
from leveret.shared.documents import VmView
from leveret.shared.lifecycle import Desired, State

Target = Literal["running", "ready", "stopped", "deleted"]

#: The event with which each wait ends.
LAST_WORD: dict[Target, str] = {
    "running": "running",
    "ready": "guest_ready",
    "stopped": "stopped",
    "deleted": "deleted",
}


def reached(vm: VmView, target: Target) -> bool:
    """Whether a VM is what is waited for. Raises VmFailed when it will not be by itself."""
    settled = vm.observed_generation >= vm.generation
    stands = {
        "running": vm.state is State.RUNNING and settled and vm.desired is Desired.RUNNING,
        "ready": vm.state is State.RUNNING and settled and vm.guest_ready,
        "stopped": vm.state is State.STOPPED and settled,
        "deleted": vm.state is State.DELETED,
    }
    if stands[target]:
        return True
    will_not_run = vm.desired is not Desired.RUNNING or (vm.state is State.STOPPED and settled)
    hopeless = {
        "running": will_not_run,
        "ready": will_not_run,
        "stopped": vm.desired is Desired.DELETED,
        "deleted": vm.desired is not Desired.DELETED,
    }
    if hopeless[target] or vm.state is State.ERROR:
        raise VmFailed(vm, target)
    return False
