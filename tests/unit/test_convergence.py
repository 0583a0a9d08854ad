"""What is next for a VM, as a table."""

from uuid import UUID

import pytest

from leveret.compute.convergence import Plan, Then, is_pointless, observe, plan, rank, why_off
from leveret.compute.driver import Domain, Journal, Power
from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import BUILD_STEPS, Observed, Step, Wanted
from leveret.shared.messages import DesiredVm, Image

pytestmark = pytest.mark.unit

VM_ID = UUID(int=7)


def wish(
    wanted: Wanted = Wanted.RUNNING,
    *,
    token: int = 5,
    generation: int = 1,
    may_build: bool = True,
    restarts: int = 0,
    grace_s: int = 60,
) -> DesiredVm:
    return DesiredVm(
        vm_id=VM_ID,
        host_epoch=1,
        project="default",
        name="a",
        generation=generation,
        token=token,
        wanted=wanted,
        may_build=may_build,
        restarts=restarts,
        grace_s=grace_s,
        vcpus=1,
        memory_mib=64,
        disk_gib=1,
        image=Image(url="file:///i", sha256="0" * 64, format="qcow2"),
        nic=None,
        deadline_s=60,
    )


def domain(
    power: Power,
    *,
    token: int = 5,
    generation: int = 1,
    wanted: Wanted = Wanted.RUNNING,
    restarts: int = 0,
    boot_id: str = "boot",
    reason: Problem | None = None,
) -> Domain:
    return Domain(Journal(VM_ID, "default", "a", token, generation, wanted, restarts, boot_id), power, reason)


RUNNING, STOPPED, ABSENT = Wanted.RUNNING, Wanted.STOPPED, Wanted.ABSENT
ON, OFF = Power.RUNNING, Power.OFF
BUILD = Plan(BUILD_STEPS, Then.MARK, builds=True)
DEFINE_ONLY = Plan(BUILD_STEPS[:-1], Then.MARK, builds=True)
REMOVE = Plan((Step.REMOVE,), Then.GONE)
REST, MISSING, STALE = Plan((), Then.REST), Plan((), Then.MISSING), Plan((), Then.STALE)


def then_mark(*steps: Step) -> Plan:
    return Plan(steps, Then.MARK)


@pytest.mark.parametrize(
    ("because", "vm", "seen", "expected"),
    [
        ("nothing is there yet", wish(), None, BUILD),
        ("it is wanted stopped from the start", wish(STOPPED), None, DEFINE_ONLY),
        ("it had run and is gone", wish(may_build=False), None, MISSING),
        ("it had run, is gone, and is wanted stopped", wish(STOPPED, may_build=False), None, MISSING),
        ("absent leaves no files either", wish(ABSENT), None, REMOVE),
        ("absent, and running", wish(ABSENT), domain(ON), REMOVE),
        ("absent is obeyed whatever the journal's generation", wish(ABSENT), domain(ON, generation=9), REMOVE),
        ("absent under a new token removes a remnant", wish(ABSENT, token=6), domain(ON), REMOVE),
        ("absent of an old placement spares the new one", wish(ABSENT, token=4), domain(ON), STALE),
        ("a remnant goes first", wish(token=6), domain(ON), Plan((Step.REMOVE,), Then.AGAIN)),
        ("a remnant that may hold data is kept", wish(token=6, may_build=False), domain(ON), MISSING),
        ("an old placement's wish is void", wish(token=4), domain(ON), STALE),
        ("killed after define", wish(), domain(OFF, generation=0), BUILD),
        ("killed after start", wish(), domain(ON, generation=0), then_mark()),
        ("killed after define, wanted stopped", wish(STOPPED), domain(OFF, generation=0), DEFINE_ONLY),
        ("started before stopped was wanted", wish(STOPPED), domain(ON, generation=0), then_mark(Step.STOP)),
        ("rebooted while building", wish(restarts=1), domain(ON, generation=0), then_mark(Step.REBOOT)),
        ("nothing to do, running", wish(), domain(ON), REST),
        ("nothing to do, stopped", wish(STOPPED), domain(OFF, wanted=STOPPED), REST),
        ("off by itself stays off", wish(), domain(OFF), REST),
        ("a newer generation starts it again", wish(generation=2), domain(OFF), then_mark(Step.START)),
        ("a newer generation that runs already", wish(generation=2), domain(ON), then_mark()),
        ("stop", wish(STOPPED, generation=2), domain(ON), then_mark(Step.STOP)),
        ("stop what is off", wish(STOPPED, generation=2), domain(OFF), then_mark()),
        ("reboot", wish(generation=2, restarts=1), domain(ON), then_mark(Step.REBOOT)),
        ("reboot what is off", wish(generation=2, restarts=1), domain(OFF), then_mark(Step.START)),
        ("rebooted already", wish(generation=2, restarts=1), domain(ON, restarts=1), then_mark()),
        ("reboots count for nothing while stopped", wish(STOPPED, generation=2, restarts=1), domain(OFF), then_mark()),
        ("an older generation is void", wish(generation=1), domain(ON, generation=2), STALE),
        ("killed between stop and mark", wish(STOPPED, generation=2), domain(OFF, generation=1), then_mark()),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_is_next(because: str, vm: DesiredVm, seen: Domain | None, expected: Plan) -> None:
    assert plan(vm, seen) == expected


def test_what_this_worker_saw_running_is_not_built_again_even_when_the_command_allows_it() -> None:
    assert plan(wish(generation=2), None, had_run=True) == MISSING


def test_a_newer_placement_outranks_an_older_one_and_absent_is_final_within_a_placement() -> None:
    in_order = [
        wish(generation=1),
        wish(STOPPED, generation=2),
        wish(generation=9),
        wish(ABSENT, generation=3),
        wish(ABSENT, generation=10),
        wish(token=6, generation=1),
    ]
    assert sorted(in_order, key=rank) == in_order


@pytest.mark.parametrize(
    ("step", "was", "now", "pointless"),
    [
        (Step.IMAGE, wish(), wish(ABSENT, generation=2), True),
        (Step.DISPATCHED, wish(), wish(ABSENT, generation=2), True),
        (Step.IMAGE, wish(), wish(token=6), True),
        (Step.IMAGE, wish(), wish(STOPPED, generation=2), False),
        (Step.START, wish(), wish(ABSENT, generation=2), False),
        (Step.STOP, wish(STOPPED), wish(ABSENT, generation=2), True),
        (Step.STOP, wish(STOPPED), wish(STOPPED, generation=2, grace_s=0), True),
        (Step.STOP, wish(STOPPED), wish(STOPPED, generation=2, grace_s=90), False),
        (Step.STOP, wish(STOPPED), wish(RUNNING, generation=2), False),
        (Step.REMOVE, wish(ABSENT), wish(token=6), False),
    ],
)
def test_which_steps_a_newer_wish_breaks_off(step: Step, was: DesiredVm, now: DesiredVm, pointless: bool) -> None:
    assert is_pointless(step, was, now) is pointless


@pytest.mark.parametrize(
    ("seen", "observed"),
    [
        (domain(OFF, generation=0), Observed.BUILDING),
        (domain(ON, generation=0), Observed.BUILDING),
        (domain(ON), Observed.RUNNING),
        (domain(OFF), Observed.STOPPED),
    ],
)
def test_what_a_domain_counts_as(seen: Domain, observed: Observed) -> None:
    assert observe(seen) is observed


CRASH = Problem.of(Code.GUEST_CRASHED, "It crashed.")


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        (domain(ON), None),
        (domain(OFF, wanted=STOPPED), None),
        (domain(OFF, generation=0), None),
        (domain(OFF), Code.GUEST_SHUTDOWN),
        (domain(OFF, reason=CRASH), Code.GUEST_CRASHED),
        (domain(OFF, reason=CRASH, boot_id="an earlier boot"), Code.HOST_REBOOTED),
        (domain(OFF, wanted=STOPPED, boot_id="an earlier boot"), None),
    ],
)
def test_why_a_domain_is_off(seen: Domain, code: Code | None) -> None:
    problem = why_off(seen, "boot")
    assert (problem.code if problem else None) == code
