"""The simulated hypervisor beyond the contract that the conformance suite holds it to."""

import asyncio
from pathlib import Path
from uuid import UUID

import pytest
from agent_world import HOST_ID, VM_ID, LeapingLoop, leaping, wish

from leveret.compute.behaviour import Behaviour
from leveret.compute.driver import Power, build_verbs
from leveret.compute.ledger import Ledger
from leveret.compute.simulated import SimulatedDriver
from leveret.shared.errors import Code, LeveretError
from leveret.shared.lifecycle import Wanted
from leveret.shared.messages import DesiredVm

pytestmark = pytest.mark.unit

OTHER_HOST = UUID(int=2)


async def build(driver: SimulatedDriver, vm: DesiredVm) -> None:
    for verb in build_verbs(driver).values():
        await verb(vm)
    await driver.mark(vm)


def test_a_killed_worker_finds_its_domains_again_and_only_those_of_its_host(tmp_path: Path) -> None:
    async def scene() -> None:
        ledger = Ledger(tmp_path / "ledger")
        before, other = SimulatedDriver(HOST_ID, ledger=ledger), SimulatedDriver(OTHER_HOST, ledger=ledger)
        await build(before, wish())
        await build(before, wish(vm_id=UUID(int=8)))
        await before.remove(UUID(int=8))
        await other.fetch_image(wish(vm_id=UUID(int=9)))
        await other.make_disk(wish(vm_id=UUID(int=9)))

        ledger = Ledger(tmp_path / "ledger")  # the first one was never closed: its process was killed
        after, other = SimulatedDriver(HOST_ID, ledger=ledger), SimulatedDriver(OTHER_HOST, ledger=ledger)
        assert await after.inventory() == await before.inventory()
        assert await after.files() == {VM_ID}
        assert await after.guest_ready(VM_ID)
        assert await other.files() == {UUID(int=9)}
        assert (await other.inventory()).domains == ()

    leaping(scene())


def test_reboots_and_crashes_are_remembered_too(tmp_path: Path) -> None:
    async def scene() -> None:
        driver = SimulatedDriver(HOST_ID, ledger=Ledger(tmp_path / "ledger"))
        await build(driver, wish())
        driver.crash(VM_ID)
        again = SimulatedDriver(HOST_ID, ledger=Ledger(tmp_path / "ledger"))
        domain = await again.find(VM_ID)
        assert domain is not None
        assert domain.why_off is not None
        assert domain.why_off.code is Code.GUEST_CRASHED
        again.reboot()
        third = SimulatedDriver(HOST_ID, ledger=Ledger(tmp_path / "ledger"))
        assert third.boot_id == again.boot_id != driver.boot_id

    leaping(scene())


@pytest.mark.parametrize("torn", range(1, 60, 7))
def test_a_torn_last_line_costs_that_line_alone_and_is_not_written_after(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    ledger.put("h1", "a", {"n": 1})
    ledger.put("h1", "b", {"n": 2, "text": "x" * 60})
    ledger.close()
    path.write_bytes(path.read_bytes()[:-torn])
    torn_ledger = Ledger(path)
    assert torn_ledger.of("h1")["a"] == {"n": 1}
    assert torn == 1 or "b" not in torn_ledger.of("h1")
    torn_ledger.put("h1", "c", {"n": 3})
    assert Ledger(path).of("h1")["c"] == {"n": 3}


def test_the_ledger_is_compacted_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    for number in range(1000):
        ledger.put("h1", "a", {"n": number})
        ledger.put("h1", "b", {"n": number})
    ledger.put("h1", "b", None)
    assert Ledger(path).of("h1") == {"a": {"n": 999}}
    assert path.read_bytes().count(b"\n") == 1


def test_verbs_take_the_time_they_are_told_to_and_none_when_they_are_told_none() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        driver = SimulatedDriver(HOST_ID, Behaviour(latency_s={"start": 2.0, "define": (1.0, 3.0)}), seed=1)
        began = loop.time()
        await build(driver, wish())
        assert 3.0 <= loop.time() - began <= 5.1

        quick = SimulatedDriver(HOST_ID)
        with pytest.raises(StopIteration):  # a coroutine that ends at its first step never waited
            build(quick, wish()).send(None)

    leaping(scene())


def test_failures_come_as_often_as_asked_and_alike_for_the_same_seed() -> None:
    async def outcomes(seed: int) -> list[str | None]:
        driver = SimulatedDriver(HOST_ID, Behaviour(failures={"fetch_image": 0.3}), seed=seed)
        failed: list[str | None] = []
        for _ in range(500):
            try:
                await driver.fetch_image(wish())
                failed.append(None)
            except LeveretError as error:
                failed.append(error.problem.code)
        return failed

    first = leaping(outcomes(1))
    assert set(first) == {None, Code.IMAGE_UNREACHABLE}
    assert 100 < first.count(Code.IMAGE_UNREACHABLE) < 200
    assert leaping(outcomes(1)) == first
    assert leaping(outcomes(2)) != first


def test_a_failure_may_come_after_the_deed() -> None:
    async def scene() -> None:
        driver = SimulatedDriver(HOST_ID, Behaviour(failures={"make_disk": 1.0}, failures_after=1.0))
        await driver.fetch_image(wish())
        with pytest.raises(LeveretError):
            await driver.make_disk(wish())
        assert await driver.files() == {VM_ID}

    leaping(scene())


def test_a_stop_takes_what_the_guest_takes_but_no_longer_than_the_grace() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        driver = SimulatedDriver(HOST_ID, Behaviour(shutdown_s=30.0))
        for grace_s, expected_s in ((600.0, 30.0), (10.0, 10.0), (0.0, 0.0)):
            await build(driver, wish(Wanted.RUNNING))
            began = loop.time()
            await driver.stop(VM_ID, grace_s)
            assert loop.time() - began == pytest.approx(expected_s, abs=0.1)
            domain = await driver.find(VM_ID)
            assert domain is not None
            assert (domain.power, domain.why_off) == (Power.OFF, None)

    leaping(scene())


def test_idle_vms_cost_neither_a_task_nor_a_timer() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, LeapingLoop)
        driver = SimulatedDriver(HOST_ID, Behaviour(ready_s=3600.0))
        for number in range(100):
            await build(driver, wish(vm_id=UUID(int=number)))
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert loop.timers == 0

    leaping(scene())
