"""What a host says, how often, and what becomes of it while nobody takes it."""

import asyncio
from collections.abc import Awaitable, Callable
from uuid import UUID

import pytest
from agent_world import HOST_ID, leaping

from leveret.compute.reporter import BATCH_MAX, Reporter
from leveret.compute.status import Status
from leveret.shared.errors import Code, fail
from leveret.shared.lifecycle import Observed
from leveret.shared.messages import HostReport

pytestmark = pytest.mark.unit


class World:
    def __init__(self) -> None:
        self.statuses: dict[UUID, Status] = {}
        self.heard: list[HostReport] = []
        self.tries = 0
        self.under_way = 0
        self.away = False
        self.publish_s = 0.0
        self.reporter = Reporter(
            HOST_ID, 3, self._publish, status_of=self.statuses.get, present=lambda: list(self.statuses.values())
        )

    async def _publish(self, report: HostReport) -> None:
        self.tries += 1
        assert self.under_way == 0, "at most one report is under way"
        self.under_way += 1
        try:
            await asyncio.sleep(self.publish_s)
        finally:
            self.under_way -= 1
        if self.away:
            raise fail(Code.UNAVAILABLE, "The broker is away.")
        self.heard.append(report)

    def change(self, number: int, generation: int, *, urgent: bool = True) -> None:
        vm_id = UUID(int=number)
        self.statuses[vm_id] = Status(vm_id, 1, generation, Observed.RUNNING, settled=True)
        self.reporter.add(vm_id, urgent=urgent)

    def generations(self) -> list[dict[int, int]]:
        return [{vm.vm_id.int: vm.generation for vm in report.vms} for report in self.heard]


def play(scene: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        await scene(world)
        await world.reporter.stop()

    leaping(main())


def test_while_a_report_is_under_way_the_next_one_gathers_and_the_newest_wins() -> None:
    async def scene(world: World) -> None:
        world.publish_s = 1.0
        world.change(1, 1)
        await asyncio.sleep(0.5)
        for generation in range(2, 10):
            world.change(1, generation)
            world.change(2, generation)
        await asyncio.sleep(5)
        assert world.generations() == [{1: 1}, {1: 9, 2: 9}]

    play(scene)


def test_progress_lingers_and_goes_along_with_what_is_urgent() -> None:
    async def scene(world: World) -> None:
        world.change(1, 1, urgent=False)
        await asyncio.sleep(0.005)
        assert world.heard == []
        world.change(2, 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        assert world.generations() == [{1: 1, 2: 1}]
        world.change(1, 2, urgent=False)
        await asyncio.sleep(1)
        assert world.generations()[1:] == [{1: 2}]

    play(scene)


def test_sequence_numbers_only_grow_and_a_complete_report_stands_after_all_it_lists() -> None:
    async def scene(world: World) -> None:
        for number in range(1, 5):
            world.change(number, 1)
        await asyncio.sleep(1)
        world.reporter.add_complete()
        world.change(9, 1)
        await asyncio.sleep(1)
        assert [report.complete for report in world.heard] == [False, True]
        seqs = [vm.seq for report in world.heard for vm in report.vms]
        assert seqs == sorted(set(seqs))
        assert world.heard[-1].seq > seqs[-1]
        assert {report.epoch for report in world.heard} == {3}

    play(scene)


def test_an_outage_costs_one_entry_a_vm_and_everything_is_told_after_it() -> None:
    async def scene(world: World) -> None:
        world.away = True
        for generation in range(1, 50):
            for number in range(300):
                world.change(number, generation)
            await asyncio.sleep(1)
        world.reporter.add_complete()
        assert world.reporter.pending == 301
        assert world.tries < 60
        world.away = False
        world.reporter.poke()
        await asyncio.sleep(0.01)
        told = {vm.vm_id.int: vm.generation for report in world.heard for vm in report.vms}
        assert told == dict.fromkeys(range(300), 49)
        assert world.reporter.pending == 0

    play(scene)


def test_many_changes_at_once_are_told_in_batches() -> None:
    async def scene(world: World) -> None:
        for number in range(2 * BATCH_MAX + 1):
            world.change(number, 1)
        await asyncio.sleep(1)
        assert [len(report.vms) for report in world.heard] == [BATCH_MAX, BATCH_MAX, 1]

    play(scene)


def test_draining_tells_what_lingers_and_says_when_it_could_not() -> None:
    async def scene(world: World) -> None:
        world.change(1, 1, urgent=False)
        assert await world.reporter.drain(1)
        assert world.generations() == [{1: 1}]
        world.away = True
        world.change(1, 2)
        assert not await world.reporter.drain(1)

    play(scene)


def test_a_vm_of_which_nothing_is_known_any_more_is_not_told() -> None:
    async def scene(world: World) -> None:
        world.reporter.add(UUID(int=77), urgent=True)
        await asyncio.sleep(1)
        assert (world.tries, world.reporter.pending) == (0, 0)

    play(scene)
