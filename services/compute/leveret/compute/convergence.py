"""What is next for a VM: a pure function of what is wanted of it and what the hypervisor has.

Nothing here waits, calls or remembers, so every rule stands in a table of tests.
"""

from dataclasses import dataclass
from enum import StrEnum

from leveret.compute.driver import Domain, Power
from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import BUILD_STEPS, Observed, Step, Wanted
from leveret.shared.messages import DesiredVm


class Then(StrEnum):
    """What follows when the steps of a plan are done."""

    MARK = "mark"
    """Write the journal: the generation has been made true."""
    AGAIN = "again"
    """Look again: a remnant is out of the way."""
    GONE = "gone"
    """Nothing is left of the VM, as wished."""
    REST = "rest"
    """There is nothing to do for this generation."""
    MISSING = "missing"
    """The VM had run here and its domain is not there: say so, never make it anew."""
    STALE = "stale"
    """The hypervisor has something newer than this wish: forget the wish."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps to take, and what follows. A plan that `builds` has a deadline, and is undone when it fails."""

    steps: tuple[Step, ...]
    then: Then
    builds: bool = False


Rank = tuple[int, bool, int]


def rank(vm: DesiredVm) -> Rank:
    """The order of wishes for one VM: by placement, then by generation.

    Within a placement `absent` is final: a VM is only ever made again under a new token. So it outranks every other
    wish of its placement, whichever comes first.
    """
    return vm.token, vm.wanted is Wanted.ABSENT, vm.generation


def plan(vm: DesiredVm, domain: Domain | None, *, had_run: bool = False) -> Plan:
    """What to do next. `had_run` is set when this worker saw the VM settled under the same token."""
    may_build = vm.may_build and not had_run
    if domain is not None and domain.journal.token > vm.token:
        return Plan((), Then.STALE)
    if vm.wanted is Wanted.ABSENT:
        return Plan((Step.REMOVE,), Then.GONE)
    if domain is None:
        return Plan(_build_steps(vm), Then.MARK, builds=True) if may_build else Plan((), Then.MISSING)
    if domain.journal.token < vm.token:
        # A remnant of an earlier placement, unless the VM is said to have run here: then it may hold a guest's data.
        return Plan((Step.REMOVE,), Then.AGAIN) if may_build else Plan((), Then.MISSING)
    if domain.journal.generation > vm.generation:
        return Plan((), Then.STALE)
    if domain.journal.generation == vm.generation:
        return Plan((), Then.REST)
    if domain.journal.generation == 0 and domain.power is Power.OFF and may_build:
        # All steps again: a crash of the host may have lost files that the domain was made from.
        return Plan(_build_steps(vm), Then.MARK, builds=True)
    return Plan(_change_steps(vm, domain), Then.MARK)


def _build_steps(vm: DesiredVm) -> tuple[Step, ...]:
    return BUILD_STEPS if vm.wanted is Wanted.RUNNING else BUILD_STEPS[:-1]


def _change_steps(vm: DesiredVm, domain: Domain) -> tuple[Step, ...]:
    running = domain.power is Power.RUNNING
    if vm.wanted is Wanted.STOPPED:
        return (Step.STOP,) if running else ()
    if not running:
        return (Step.START,)
    return (Step.REBOOT,) if vm.restarts > domain.journal.restarts else ()


def is_pointless(step: Step, was: DesiredVm, now: DesiredVm) -> bool:
    """Whether a step under way for one wish should be broken off because of a newer one.

    Only steps that may take long are broken off. A guest that was asked to shut down is not asked back: it goes off and
    is started again.
    """
    if step in {Step.IMAGE, Step.DISK, Step.STOP, Step.DISPATCHED} and (
        now.wanted is Wanted.ABSENT or now.token != was.token
    ):
        return True
    return step is Step.STOP and now.wanted is Wanted.STOPPED and now.grace_s < was.grace_s


def observe(domain: Domain) -> Observed:
    """What a domain counts as in reports."""
    if domain.journal.generation == 0:
        return Observed.BUILDING
    return Observed.RUNNING if domain.power is Power.RUNNING else Observed.STOPPED


def why_off(domain: Domain, boot_id: str) -> Problem | None:
    """Why a domain that should run does not; None when it runs, or was switched off as wished."""
    journal = domain.journal
    if domain.power is Power.RUNNING or journal.generation == 0 or journal.wanted is not Wanted.RUNNING:
        return None
    if journal.boot_id != boot_id:
        return Problem.of(Code.HOST_REBOOTED, "The host was rebooted while the VM ran.")
    return domain.why_off or Problem.of(Code.GUEST_SHUTDOWN, "The guest switched itself off.")
