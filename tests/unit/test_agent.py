"""One host's agent, over a simulated hypervisor and with no broker: what it makes of commands, faults and changes."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from agent_world import VM_ID, AgentWorld, leaping, wish
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leveret.compute.agent import Limits
from leveret.compute.behaviour import Behaviour
from leveret.compute.driver import Power
from leveret.compute.heart import Heart, Registration, Share
from leveret.shared.errors import Code
from leveret.shared.lifecycle import Observed, Step, Wanted
from leveret.shared.messages import Capacity, DesiredVm, Heartbeat, ReadConsole, digest_of

pytestmark = pytest.mark.unit

RUNNING, STOPPED, ABSENT = Wanted.RUNNING, Wanted.STOPPED, Wanted.ABSENT
SLOW_IMAGE = Behaviour(latency_s={"fetch_image": 20.0})

Scene = Callable[[AgentWorld], Awaitable[None]]


def play(scene: Scene, **world: Any) -> None:
    """Run a scene on a fresh host, on a loop where waiting takes no time."""

    async def main() -> None:
        stage = AgentWorld(**world)
        await stage.open()
        try:
            await scene(stage)
        finally:
            await stage.agent.kill()

    leaping(main())


# Building


def test_a_build_ends_running_settled_and_costs_one_report_when_it_is_quick() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        (report,) = world.said()
        assert (report.observed, report.settled, report.generation, report.token) == (Observed.RUNNING, True, 1, 5)
        assert report.guest_ready
        assert [step.step for step in report.steps] == ["image", "disk", "config_drive", "define", "start"]
        domain = await world.domain()
        assert domain is not None
        assert (domain.journal.generation, domain.power) == (1, Power.RUNNING)

    play(scene)


def test_slow_steps_are_told_as_they_begin() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        assert [(r.step, r.settled) for r in world.said()] == [
            (Step.IMAGE, False),
            (Step.START, False),
            (None, True),
        ]
        seconds = {step.step: step.seconds for step in world.last().steps}
        assert seconds["image"] == pytest.approx(3, abs=0.2)
        assert seconds["start"] == pytest.approx(2, abs=0.2)

    play(scene, behaviour=Behaviour(latency_s={"fetch_image": 3.0, "start": 2.0}))


def test_a_vm_wanted_stopped_is_made_and_not_started() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(STOPPED))
        await world.idle()
        assert (world.last().observed, world.last().settled, world.last().problem) == (Observed.STOPPED, True, None)
        world.tell(wish(RUNNING, generation=2))
        await world.idle()
        assert (world.last().observed, world.last().generation) == (Observed.RUNNING, 2)

    play(scene)


def test_stopped_wanted_while_building_is_built_and_not_started() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.until(world.said)
        world.tell(wish(STOPPED, generation=2))
        await world.idle()
        assert (world.last().observed, world.last().generation) == (Observed.STOPPED, 2)
        domain = await world.domain()
        assert domain is not None
        assert domain.power is Power.OFF

    play(scene, behaviour=SLOW_IMAGE)


@pytest.mark.parametrize(
    ("verb", "step", "code"),
    [
        ("fetch_image", "image", Code.IMAGE_UNREACHABLE),
        ("make_disk", "disk", Code.DISK_FAILED),
        ("make_config_drive", "config_drive", Code.CONFIG_DRIVE_FAILED),
        ("define", "define", Code.DEFINE_FAILED),
        ("start", "start", Code.START_FAILED),
    ],
)
def test_a_failing_build_leaves_nothing_and_says_why(verb: str, step: str, code: Code) -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        report = world.last()
        assert (report.observed, report.settled) == (Observed.ABSENT, True)
        assert report.problem is not None
        assert (report.problem.code, report.problem.step, report.problem.host) == (code, step, "h1")
        assert await world.domain() is None
        assert await world.driver.files() == frozenset()

    play(scene, behaviour=Behaviour(failures={verb: 1.0}))


def test_a_build_that_outlives_its_deadline_fails_with_the_step_it_stood_in() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(deadline_s=10))
        await world.idle()
        problem = world.last().problem
        assert world.last().observed is Observed.ABSENT
        assert problem is not None
        assert (problem.code, problem.step) == (Code.BUILD_TIMEOUT, "image")
        assert await world.driver.files() == frozenset()

    play(scene, behaviour=SLOW_IMAGE)


def test_a_build_whose_time_is_up_on_arrival_is_not_begun() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(deadline_s=0))
        await world.idle()
        problem = world.last().problem
        assert problem is not None
        assert problem.code == Code.BUILD_TIMEOUT

    play(scene)


def test_a_build_waits_for_the_hypervisor_to_come_back() -> None:
    async def scene(world: AgentWorld) -> None:
        world.driver.go_away()
        world.tell(wish(deadline_s=60))
        await world.until(world.said)
        report = world.last()
        assert report.observed is Observed.BUILDING
        assert report.problem is not None
        assert report.problem.code == Code.HYPERVISOR_UNAVAILABLE
        await asyncio.sleep(20)
        world.driver.come_back()
        await world.idle(within_s=5)
        assert (world.last().observed, world.last().problem) == (Observed.RUNNING, None)

    play(scene)


def test_a_failed_build_is_not_called_gone_before_it_is() -> None:
    """The start fails for good, then the hypervisor is away for minutes: the VM is gone only when it said so."""

    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.until(lambda: world.said() and world.last().step is Step.CLEANUP)
        world.driver.go_away()
        await asyncio.sleep(300)
        report = world.last()
        assert report.observed is Observed.BUILDING
        assert not report.settled
        assert report.problem is not None
        assert (report.problem.code, report.problem.details["cleanup"]) == (
            Code.START_FAILED,
            "The simulated hypervisor is away.",
        )
        world.driver.come_back()
        await world.idle()
        assert (world.last().observed, world.last().settled) == (Observed.ABSENT, True)
        assert await world.driver.files() == frozenset()

    play(scene, behaviour=Behaviour(failures={"start": 1.0}, failures_after=0, latency_s={"remove": 1.0}))


def test_builds_are_bounded_and_a_burst_is_built_all_the_same() -> None:
    async def scene(world: AgentWorld) -> None:
        vms = [UUID(int=number) for number in range(1, 31)]
        began = asyncio.get_running_loop().time()
        world.tell(*(wish(vm_id=vm_id) for vm_id in vms))
        await world.idle()
        took_s = asyncio.get_running_loop().time() - began
        assert [world.last(vm_id).observed for vm_id in vms] == [Observed.RUNNING] * 30
        assert took_s == pytest.approx(30 / 3, rel=0.2)  # three at once, a second each

    play(scene, behaviour=Behaviour(latency_s={"define": 1.0}), limits=Limits(builds=3))


def test_an_image_server_that_hangs_delays_only_those_who_want_its_images() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(vm_id=UUID(int=100), sha256="a" * 64))
        await world.idle()
        world.driver.hanging_images |= {"b" * 64, "c" * 64}
        world.tell(
            wish(vm_id=UUID(int=101), sha256="b" * 64, deadline_s=500),
            wish(vm_id=UUID(int=102), sha256="c" * 64, deadline_s=500),
            wish(vm_id=UUID(int=103), sha256="a" * 64),
        )
        await world.until(lambda: world.said(UUID(int=103)) and world.last(UUID(int=103)).settled, within_s=1)
        assert world.last(UUID(int=101)).step is Step.IMAGE

    play(scene, limits=Limits(fetches=2))


# Wishes that change


@pytest.mark.parametrize("slow", ["fetch_image", "make_disk", "define", "start", "mark"])
def test_delete_during_a_build_leaves_nothing(slow: str) -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await asyncio.sleep(10)
        world.tell(wish(ABSENT, generation=2, may_build=False))
        await world.idle()
        report = world.last()
        assert (report.observed, report.settled, report.generation, report.problem) == (Observed.ABSENT, True, 2, None)
        assert await world.domain() is None
        assert await world.driver.files() == frozenset()

    play(scene, behaviour=Behaviour(latency_s={slow: 30.0}))


def test_delete_does_not_wait_for_the_image_or_for_the_guest_to_shut_down() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await asyncio.sleep(1)
        world.tell(wish(ABSENT, generation=2))
        await world.idle(within_s=1)
        world.tell(wish(vm_id=UUID(int=8), sha256="1" * 64))
        await world.idle()
        world.tell(wish(STOPPED, vm_id=UUID(int=8), generation=2, grace_s=600))
        await asyncio.sleep(1)
        assert world.last(UUID(int=8)).step is Step.STOP
        world.tell(wish(ABSENT, vm_id=UUID(int=8), generation=3))
        await world.idle(within_s=1)
        assert world.last(UUID(int=8)).observed is Observed.ABSENT

    play(scene, behaviour=Behaviour(latency_s={"fetch_image": 30.0}, shutdown_s=500.0))


def test_a_forced_stop_cuts_the_grace_of_the_one_before_short() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        world.tell(wish(STOPPED, generation=2, grace_s=600))
        await asyncio.sleep(1)
        world.tell(wish(STOPPED, generation=3, grace_s=0))
        await world.idle(within_s=1)
        assert (world.last().observed, world.last().generation) == (Observed.STOPPED, 3)

    play(scene, behaviour=Behaviour(shutdown_s=500.0))


def test_start_during_a_stop_lets_the_guest_go_off_and_starts_it_again() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        world.tell(wish(STOPPED, generation=2))
        await asyncio.sleep(1)
        world.tell(wish(RUNNING, generation=3))
        await world.idle()
        assert (world.last().observed, world.last().generation, world.last().problem) == (Observed.RUNNING, 3, None)
        assert [step.step for step in world.last().steps] == ["stop", "start"]

    play(scene, behaviour=Behaviour(shutdown_s=20.0))


def test_a_reboot_resets_once_and_readiness_is_asked_again() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.until(lambda: world.said() and world.last().guest_ready)
        world.tell(wish(generation=2, restarts=1))
        await world.until(lambda: world.last().generation == 2 and world.last().settled)
        assert not world.last().guest_ready
        await world.until(lambda: world.last().guest_ready)
        world.tell(wish(generation=3, restarts=1))
        await world.idle()
        assert world.metrics.registry.get_sample_value("leveret_host_step_seconds_count", {"step": "reboot"}) == 1

    play(scene, behaviour=Behaviour(ready_s=7.0))


def test_what_fails_for_an_existing_vm_is_told_and_tried_for_ever() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(STOPPED))
        await world.idle()
        world.driver.behaviour = Behaviour(failures={"start": 1.0}, failures_after=0)
        world.tell(wish(RUNNING, generation=2))
        await asyncio.sleep(3600)
        report = world.last()
        assert (report.observed, report.settled, report.generation) == (Observed.STOPPED, False, 2)
        assert report.problem is not None
        assert report.problem.code == Code.START_FAILED
        assert len(world.said()) < 10, "the same trouble is told once, not at every try"
        world.driver.behaviour = Behaviour()
        await world.until(lambda: world.last().settled, within_s=20)
        assert (world.last().observed, world.last().problem) == (Observed.RUNNING, None)

    play(scene)


def test_a_delete_that_fails_is_driven_again_at_once_when_it_is_asked_again() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        world.driver.behaviour = Behaviour(failures={"remove": 1.0}, failures_after=0)
        world.tell(wish(ABSENT, generation=2))
        await asyncio.sleep(600)
        problem = world.last().problem
        assert problem is not None
        assert problem.code == Code.DELETE_FAILED
        world.driver.behaviour = Behaviour()
        world.tell(wish(ABSENT, generation=2))
        await world.idle(within_s=0.5)
        assert world.last().observed is Observed.ABSENT

    play(scene)


# Commands that are old, doubled or meant for another


def test_a_command_for_another_incarnation_of_the_worker_does_nothing() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(epoch=2), wish(epoch=0))
        await world.idle()
        assert world.heard == []
        assert await world.driver.files() == frozenset()

    play(scene)


def test_older_tokens_and_generations_do_nothing() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(generation=3))
        await world.idle()
        heard = len(world.said())
        world.tell(
            wish(STOPPED, generation=2), wish(ABSENT, token=4, generation=9), wish(STOPPED, token=4, generation=9)
        )
        await world.idle()
        assert len(world.said()) == heard
        domain = await world.domain()
        assert domain is not None
        assert domain.power is Power.RUNNING

    play(scene)


def test_a_settled_generation_that_is_asked_for_again_is_reported_again() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        first = world.last()
        world.tell(wish())
        await world.idle()
        assert world.last().seq > first.seq
        assert world.last().model_copy(update={"seq": first.seq}) == first

    play(scene)


def test_a_late_build_after_the_delete_makes_nothing_and_is_answered_as_absent() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        world.tell(wish(ABSENT, generation=2))
        await world.idle()
        seq = world.last().seq
        world.tell(wish(), wish(generation=7))
        await world.idle()
        assert (world.last().observed, world.last().seq > seq) == (Observed.ABSENT, True)
        assert await world.driver.files() == frozenset()
        world.tell(wish(token=6))
        await world.idle()
        assert (world.last().observed, world.last().token) == (Observed.RUNNING, 6)

    play(scene)


def test_the_failure_of_a_build_is_told_again_when_its_command_comes_again() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        world.tell(wish())
        await world.idle()
        first, second = world.said()[-2:]
        assert first.problem == second.problem
        assert second.problem is not None
        assert second.problem.code == Code.DISK_FAILED

    play(scene, behaviour=Behaviour(failures={"make_disk": 1.0}))


def test_graves_are_few_and_a_build_older_than_a_forgotten_one_is_refused() -> None:
    async def scene(world: AgentWorld) -> None:
        for number in range(1, 8):
            world.tell(wish(vm_id=UUID(int=number), token=number))
            await world.idle()
            world.tell(wish(ABSENT, vm_id=UUID(int=number), token=number, generation=2))
            await world.idle()
        world.tell(wish(vm_id=UUID(int=1), token=1))
        await world.idle()
        problem = world.last(UUID(int=1)).problem
        assert problem is not None
        assert problem.code == Code.BUILD_FAILED
        assert await world.driver.files() == frozenset()

    play(scene, limits=Limits(graves=3))


def test_delete_of_what_was_never_here_is_confirmed() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(ABSENT, generation=2))
        await world.idle()
        assert (world.last().observed, world.last().settled, world.last().generation) == (Observed.ABSENT, True, 2)

    play(scene)


def test_a_newer_placement_removes_the_remnant_of_an_older_one_first() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        world.tell(wish(token=9))
        await world.idle()
        domain = await world.domain()
        assert domain is not None
        assert (domain.journal.token, world.last().token, world.last().observed) == (9, 9, Observed.RUNNING)

    play(scene)


def test_every_command_is_counted_by_what_became_of_it_and_every_build_by_its_outcome() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(generation=2))
        await world.idle()
        world.tell(wish(generation=2), wish(), wish(epoch=9), wish(ABSENT, generation=3))
        await world.idle()
        world.tell(wish())
        world.driver.behaviour = Behaviour(failures={"define": 1.0})
        world.tell(wish(vm_id=UUID(int=8)))
        await world.idle()
        value = world.metrics.registry.get_sample_value
        outcomes = ("newer", "same", "stale", "other_epoch", "late")
        assert [value("leveret_host_commands_total", {"outcome": outcome}) for outcome in outcomes] == [3, 1, 1, 1, 1]
        assert value("leveret_host_builds_total", {"outcome": "built"}) == 1
        assert value("leveret_host_builds_total", {"outcome": "define_failed"}) == 1
        assert value("leveret_host_step_seconds_count", {"step": "remove"}) == 1
        assert value("leveret_host_step_seconds_count", {"step": "cleanup"}) == 1

    play(scene)


# What happens by itself


def test_a_guest_that_goes_off_stays_off_and_is_told_with_the_reason() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        world.driver.crash(VM_ID)
        await world.idle()
        report = world.last()
        assert (report.observed, report.settled, report.generation) == (Observed.STOPPED, True, 1)
        assert report.problem is not None
        assert report.problem.code == Code.GUEST_CRASHED
        world.tell(wish())  # the sweeper's repetition is no wish to start it
        await world.idle()
        assert world.last().observed is Observed.STOPPED
        world.tell(wish(generation=2))
        await world.idle()
        assert (world.last().observed, world.last().problem) == (Observed.RUNNING, None)

    play(scene)


def test_a_vm_that_vanishes_is_told_missing_and_never_made_anew() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        world.driver.undefine(VM_ID)
        await world.idle()
        report = world.last()
        assert report.observed is Observed.ABSENT
        assert report.problem is not None
        assert report.problem.code == Code.DOMAIN_MISSING
        world.tell(wish(generation=2, may_build=False), wish(generation=3, may_build=True))
        await world.idle()
        assert (world.last().observed, world.last().generation) == (Observed.ABSENT, 3)
        assert await world.domain() is None
        assert await world.driver.files() == {VM_ID}, "its disk may hold a guest's data"
        world.tell(wish(ABSENT, generation=4))
        await world.idle()
        assert (world.last().observed, world.last().problem) == (Observed.ABSENT, None)
        assert await world.driver.files() == frozenset()

    play(scene)


def test_after_a_host_reboot_everything_is_told_and_the_next_generation_starts_it() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(), wish(STOPPED, vm_id=UUID(int=8)))
        await world.idle()
        await world.restart()
        world.driver.reboot()
        await world.idle()
        complete = world.heard[-1]
        assert complete.complete
        seen = {vm.vm_id: vm.problem and vm.problem.code for vm in complete.vms}
        assert seen == {VM_ID: Code.HOST_REBOOTED, UUID(int=8): None}
        world.tell(wish(epoch=2, generation=2, may_build=False))
        await world.idle()
        assert (world.last().observed, world.last().problem) == (Observed.RUNNING, None)

    play(scene)


def test_readiness_is_told_once_and_asked_again_after_a_restart_of_the_worker() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await asyncio.sleep(6)
        assert [r.guest_ready for r in world.said()] == [False, True]
        await asyncio.sleep(60)
        assert len(world.said()) == 2
        await world.restart()
        world.agent.on_list()
        await world.until(lambda: world.heard[-1].epoch == 2 and world.last().guest_ready)

    play(scene, behaviour=Behaviour(ready_s=5.0))


# Lists, digests and the heart


def test_a_complete_report_lists_what_there_is_and_what_is_being_made() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(), wish(vm_id=UUID(int=8)))
        await world.idle()
        world.tell(wish(ABSENT, vm_id=UUID(int=8), generation=2))
        await world.idle()
        world.driver.behaviour = SLOW_IMAGE
        world.tell(wish(vm_id=UUID(int=9)))
        world.agent.on_list()
        await world.until(lambda: any(report.complete for report in world.heard))
        report = next(report for report in world.heard if report.complete)
        assert {vm.vm_id: vm.observed for vm in report.vms} == {
            VM_ID: Observed.RUNNING,
            UUID(int=9): Observed.BUILDING,
        }
        assert report.seq > max(vm.seq for vm in report.vms)

    play(scene)


def test_what_changed_while_the_hypervisor_was_asked_is_not_undone_by_its_answer() -> None:
    """The inventory is taken, then a VM is deleted and another built, and only then does the answer arrive."""

    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        answer, ask = await world.driver.inventory(), asyncio.Event()

        async def late_inventory() -> Any:
            await ask.wait()
            return answer

        world.driver.inventory = late_inventory  # type: ignore[method-assign]
        world.agent.on_list()
        await asyncio.sleep(0.1)
        world.tell(wish(ABSENT, generation=2), wish(vm_id=UUID(int=8)))
        await world.until(lambda: world.said(UUID(int=8)) and world.last(UUID(int=8)).settled)
        ask.set()
        await world.idle()
        complete = next(report for report in world.heard if report.complete)
        assert {vm.vm_id: vm.observed for vm in complete.vms} == {UUID(int=8): Observed.RUNNING}
        assert world.last().observed is Observed.ABSENT

    play(scene)


def test_nothing_is_listed_as_complete_before_the_hypervisor_has_answered() -> None:
    async def scene(world: AgentWorld) -> None:
        world.driver.available = False
        world.agent.on_list()
        await asyncio.sleep(30)
        assert world.heard == []
        assert world.agent.problem is not None
        world.driver.come_back()
        await world.idle(within_s=2)
        assert [report.complete for report in world.heard] == [True]
        assert world.agent.problem is None

    play(scene)


def test_files_without_a_domain_are_reported_nowhere_and_kept_until_absence_is_commanded() -> None:
    async def scene(world: AgentWorld) -> None:
        await world.driver.fetch_image(wish())
        await world.driver.make_disk(wish())
        world.agent.on_list()
        await world.idle()
        assert world.heard[-1].complete
        assert world.heard[-1].vms == ()
        assert await world.driver.files() == {VM_ID}
        world.tell(wish(ABSENT))
        await world.idle()
        assert await world.driver.files() == frozenset()

    play(scene)


def test_the_digest_is_the_one_the_conductor_reckons_from_its_rows() -> None:
    async def scene(world: AgentWorld) -> None:
        assert world.agent.digest() == digest_of([])
        world.tell(wish(), wish(STOPPED, vm_id=UUID(int=8), token=6))
        await world.idle()
        assert world.agent.digest() == digest_of([(VM_ID, 5, 1, "running"), (UUID(int=8), 6, 1, "stopped")])
        await world.restart()
        assert world.agent.digest() == digest_of([])
        world.agent.on_list()
        await world.idle()
        assert world.agent.digest() == digest_of([(VM_ID, 5, 1, "running"), (UUID(int=8), 6, 1, "stopped")])

    play(scene)


def test_the_heart_beats_with_the_last_known_capacity_while_the_hypervisor_hangs() -> None:
    async def scene(world: AgentWorld) -> None:
        beats: list[Heartbeat] = []

        async def post(beat: Heartbeat) -> None:
            beats.append(beat)

        share = Share(reserve=Capacity(vcpus=2, memory_mib=1024, disk_gib=50), vcpu_ratio=1.5)
        registration = Registration(UUID(int=1), 1, "h1", "z1", "0", {"disk": "ssd"}, share)
        heart = Heart(registration, world.driver, world.agent, post, every_s=5.0)
        world.driver.add_foreign(UUID(int=50))
        world.driver.add_foreign(UUID(int=51))
        world.agent.on_list()
        await world.idle()
        await heart.beat()
        assert beats[0].placeable == Capacity(vcpus=93, memory_mib=261_120, disk_gib=4046)
        assert (beats[0].problem, beats[0].foreign) == (None, 2)
        world.driver.behaviour = Behaviour(latency_s={"capacity": 1e6})
        for _ in range(3):
            await heart.beat()
        assert beats[3].total == beats[0].total
        assert beats[3].problem is not None
        assert beats[3].problem.code == Code.HYPERVISOR_TIMEOUT
        await heart.stop()

    play(scene)


def test_the_heart_says_who_is_taken_and_which_images_are_there_used_last_first_and_64_at_most() -> None:
    async def scene(world: AgentWorld) -> None:
        beats: list[Heartbeat] = []

        async def post(beat: Heartbeat) -> None:
            beats.append(beat)

        registration = Registration(UUID(int=1), 1, "h1", "z1", "0", taints={"dedicated": "team-a"}, vms_max=3)
        heart = Heart(registration, world.driver, world.agent, post, every_s=5.0, pool_every_s=15.0)
        await heart.beat()
        assert (beats[0].taints, beats[0].vms_max, beats[0].images) == ({"dedicated": "team-a"}, 3, ())
        for number in (*range(70), 3):
            await world.driver.fetch_image(wish(sha256=f"{number:064}"))
        await heart.beat()
        assert beats[1].images == (), "they are not listed at every beat"
        await asyncio.sleep(15)
        await heart.beat()
        assert beats[2].images == tuple(f"{number:064}" for number in (3, *range(69, 6, -1)))
        world.driver.behaviour = Behaviour(latency_s={"cached_images": 1e6})
        for _ in range(3):
            await asyncio.sleep(15)
            await heart.beat()
            assert (beats[-1].images, beats[-1].problem) == (beats[2].images, None), "what is not said stands"
        await heart.stop()

    play(scene)


def test_a_host_says_that_its_pool_fails_until_it_was_tried_with_success() -> None:
    async def scene(world: AgentWorld) -> None:
        beats: list[Heartbeat] = []

        async def post(beat: Heartbeat) -> None:
            beats.append(beat)

        registration = Registration(UUID(int=1), 1, "h1", "z1", "0")
        heart = Heart(registration, world.driver, world.agent, post, every_s=5.0, pool_every_s=15.0)
        world.driver.behaviour = Behaviour(failures={"check_pool": 1.0})
        await heart.beat()
        assert beats[0].problem is not None
        assert (beats[0].problem.code, beats[0].problem.host) == (Code.DISK_FAILED, "h1")
        assert beats[0].placeable.vcpus == 256, "what it has is known all the same"
        world.driver.behaviour = Behaviour(latency_s={"check_pool": 20.0})
        for expected in (Code.DISK_FAILED, Code.DISK_FAILED, None):
            await asyncio.sleep(15)
            began = asyncio.get_running_loop().time()
            await heart.beat()
            assert asyncio.get_running_loop().time() - began < 3, "the heart waits for no pool"
            assert (beats[-1].problem.code if beats[-1].problem else None) == expected
        await heart.stop()

    play(scene)


def test_a_small_host_has_nothing_to_place_rather_than_less_than_nothing() -> None:
    share = Share(reserve=Capacity(vcpus=4, memory_mib=4096, disk_gib=100))
    assert share.of(Capacity(vcpus=2, memory_mib=2048, disk_gib=20)) == Capacity(vcpus=0, memory_mib=0, disk_gib=0)


def test_a_console_is_read_from_its_end() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await world.idle()
        tail = await world.agent.on_console(ReadConsole(vm_id=VM_ID))
        assert (tail.text, tail.truncated, tail.problem) == ("simulated guest vm-7 is up\r\n", False, None)
        tail = await world.agent.on_console(ReadConsole(vm_id=VM_ID, max_bytes=4))
        assert (tail.text, tail.truncated) == ("up\r\n", True)
        world.driver.available = False
        tail = await world.agent.on_console(ReadConsole(vm_id=VM_ID))
        assert tail.problem is not None
        assert tail.problem.code == Code.HYPERVISOR_UNAVAILABLE

    play(scene)


# The broker is away


def test_while_the_broker_is_away_only_the_newest_of_each_vm_is_kept_and_told_after() -> None:
    async def scene(world: AgentWorld) -> None:
        world.away = True
        world.tell(wish())
        await asyncio.sleep(30)
        world.tell(wish(STOPPED, generation=2))
        await asyncio.sleep(30)
        world.away = False
        world.agent.on_connected()
        await world.idle()
        assert {(r.observed, r.generation) for r in world.said()} == {(Observed.STOPPED, 2)}
        seqs = [vm.seq for report in world.heard for vm in report.vms]
        assert seqs == sorted(seqs)

    play(scene)


# The worker is killed, or closed


STEPS = ["fetch_image", "make_disk", "make_config_drive", "define", "start", "mark"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("verb", STEPS)
def test_killed_at_a_step_of_a_build_it_converges_to_one_domain(verb: str, after: bool, tmp_path: Path) -> None:
    async def scene(world: AgentWorld) -> None:
        await killed_at(world, verb, after, wish())
        world.tell(wish(epoch=2))
        await world.idle()
        assert (world.last().observed, world.last().settled) == (Observed.RUNNING, True)
        inventory = await world.driver.inventory()
        assert [d.journal.generation for d in inventory.domains] == [1]
        assert await world.driver.files() == {VM_ID}

    play(scene, ledger=tmp_path / "ledger")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("verb", [*STEPS, "remove"])
def test_killed_at_any_step_a_delete_leaves_nothing(verb: str, after: bool, tmp_path: Path) -> None:
    async def scene(world: AgentWorld) -> None:
        if verb == "remove":
            world.tell(wish())
            await world.idle()
            await killed_at(world, verb, after, wish(ABSENT, generation=2))
        else:
            await killed_at(world, verb, after, wish())
        world.tell(wish(ABSENT, generation=2, epoch=2))
        await world.idle()
        assert (world.last().observed, world.last().settled) == (Observed.ABSENT, True)
        assert await world.driver.inventory() == type(await world.driver.inventory())(())
        assert await world.driver.files() == frozenset()

    play(scene, ledger=tmp_path / "ledger")


async def killed_at(world: AgentWorld, verb: str, after: bool, command: DesiredVm) -> None:
    """Kill the worker just before or just after a verb took effect; another one starts."""
    reached = asyncio.Event()
    real = getattr(world.driver, verb)

    async def stuck(*arguments: Any) -> None:
        if after:
            await real(*arguments)
        reached.set()
        await asyncio.Event().wait()

    setattr(world.driver, verb, stuck)
    world.renew()
    world.tell(command)
    await reached.wait()
    delattr(world.driver, verb)
    await world.restart()


def test_closing_finishes_the_step_under_way_reports_and_leaves_guests_alone() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish(vm_id=UUID(int=8)))
        await world.idle()
        world.driver.behaviour = Behaviour(latency_s={"define": 4.0, "start": 4.0})
        world.tell(wish())
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        await world.agent.close(drain_s=10)
        assert asyncio.get_running_loop().time() - began < 5
        domain, other = await world.domain(), await world.domain(UUID(int=8))
        assert domain is not None
        assert other is not None
        assert (domain.power, domain.journal.generation, other.power) == (Power.OFF, 0, Power.RUNNING)
        assert world.agent.reporter.pending == 0

    play(scene)


def test_closing_does_not_wait_longer_than_it_was_told_to() -> None:
    async def scene(world: AgentWorld) -> None:
        world.tell(wish())
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        await world.agent.close(drain_s=10)
        assert asyncio.get_running_loop().time() - began < 11

    play(scene, behaviour=SLOW_IMAGE)


# Any order, any number of times

COMMANDS = st.lists(
    st.tuples(
        st.integers(1, 3),  # token
        st.integers(1, 5),  # generation
        st.sampled_from([RUNNING, RUNNING, STOPPED, ABSENT]),
        st.floats(0, 3),  # then wait
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(commands=COMMANDS, seed=st.integers(0, 2**32), kills=st.sets(st.integers(0, 11), max_size=2))
def test_whatever_was_said_before_the_newest_wish_comes_true(
    commands: list[tuple[int, int, Wanted, float]], seed: int, kills: set[int]
) -> None:
    """Doubled, reordered and dropped commands, failing verbs and killed workers, then the newest wish once more."""

    async def scene(world: AgentWorld) -> None:
        for number, (token, generation, wanted, pause_s) in enumerate(commands):
            world.tell(wish(wanted, token=token, generation=generation, epoch=world.epoch, deadline_s=30))
            await asyncio.sleep(pause_s)
            if number in kills:
                await world.restart()
        world.driver.behaviour = Behaviour()
        for wanted, generation in ((RUNNING, 1), (STOPPED, 2), (RUNNING, 3), (ABSENT, 4)):
            newest = wish(wanted, token=4, generation=generation, epoch=world.epoch)
            world.tell(newest, newest)
            await world.idle()
            domain, report = await world.domain(), world.last()
            assert (report.settled, report.token, report.generation) == (True, 4, generation)
            if wanted is ABSENT:
                assert domain is None
                assert report.observed is Observed.ABSENT
                assert await world.driver.files() == frozenset()
            else:
                assert domain is not None
                assert domain.journal.generation == generation
                assert (domain.power is Power.RUNNING) == (wanted is RUNNING)

    behaviour = Behaviour(
        latency_s=dict.fromkeys((*STEPS, "remove", "find", "stop"), (0.0, 1.0)),
        failures=dict.fromkeys((*STEPS, "remove", "find", "stop", "reset"), 0.15),
        shutdown_s=(0.0, 5.0),
        ready_s=(0.0, 2.0),
    )
    play(scene, behaviour=behaviour, seed=seed)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(commands=COMMANDS, order=st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(commands: list[tuple[int, int, Wanted, float]], order: Any) -> None:
    """Of everything that is said at once, the wish of the highest rank comes true, whatever comes last."""

    async def scene(world: AgentWorld) -> None:
        said = [wish(wanted, token=token, generation=generation) for token, generation, wanted, _ in commands]
        # Two different wishes with one rank are never sent: the generation is bumped with every change.
        said = list({(vm.token, vm.generation): vm for vm in said}.values())
        shuffled = said + said
        order.shuffle(shuffled)
        world.tell(*shuffled)
        await world.idle()
        highest = max(said, key=lambda vm: (vm.token, vm.wanted is ABSENT, vm.generation))
        domain = await world.domain()
        if highest.wanted is ABSENT:
            assert domain is None
        else:
            assert domain is not None
            assert (domain.power is Power.RUNNING) == (highest.wanted is RUNNING)
            assert (domain.journal.token, domain.journal.generation) == (highest.token, highest.generation)

    play(scene)
