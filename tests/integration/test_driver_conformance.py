"""One suite for both drivers: whatever the agent relies on, a real hypervisor and the simulated one do alike."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid4

import psutil
import pytest
from peers import eventually

from leveret.compute.behaviour import Behaviour
from leveret.compute.driver import Driver, Power, build_verbs
from leveret.compute.ledger import Ledger
from leveret.compute.libvirt_driver import LibvirtDriver, LibvirtSettings
from leveret.compute.simulated import SimulatedDriver
from leveret.shared.errors import Code, LeveretError
from leveret.shared.ids import mac_for
from leveret.shared.lifecycle import Wanted
from leveret.shared.messages import DesiredVm, Image, Nic
from leveret.stack.libvirtd import Libvirtd, virsh

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
AWAY = {Code.HYPERVISOR_UNAVAILABLE, Code.HYPERVISOR_TIMEOUT}
BOOT_S = 90  # a guest without KVM on a busy machine


class Machine(Protocol):
    """A host under test, and what can happen to it behind the driver's back."""

    image: Image

    def driver(self) -> Driver:
        """A new driver, as after a restart of the worker."""

    def crash(self, vm_id: UUID) -> None:
        """The guest's process is killed."""

    def shut_down(self, vm_id: UUID) -> None:
        """The guest switches itself off; it must be up."""

    def reboot(self) -> None:
        """Everything stops, and the kernel has another boot id; drivers made from now on see it."""

    def go_away(self) -> None:
        """The hypervisor dies; guests go on."""

    def come_back(self) -> None: ...

    def add_foreign(self) -> UUID: ...

    def litter(self, name: str) -> None:
        """Somebody puts a file into the pool."""


class SimulatedMachine:
    def __init__(self, directory: Path) -> None:
        self.image = Image(url="file:///images/tiny.qcow2", sha256="0" * 64, format="qcow2")
        self._ledger = Ledger(directory / "ledger.jsonl")
        self._host_id = uuid4()
        self._behaviour = Behaviour(latency_s={"start": 0.01, "make_disk": 0.01}, ready_s=0.1, shutdown_s=0.1)
        self._last: SimulatedDriver | None = None

    def driver(self) -> Driver:
        self._last = SimulatedDriver(self._host_id, self._behaviour, ledger=self._ledger)
        return self._last

    @property
    def last(self) -> SimulatedDriver:
        assert self._last is not None
        return self._last

    def crash(self, vm_id: UUID) -> None:
        self.last.crash(vm_id)

    def shut_down(self, vm_id: UUID) -> None:
        self.last.shut_down(vm_id)

    def reboot(self) -> None:
        self.last.reboot()

    def go_away(self) -> None:
        self.last.go_away()

    def come_back(self) -> None:
        self.last.come_back()

    def add_foreign(self) -> UUID:
        vm_id = uuid4()
        self.last.add_foreign(vm_id)
        return vm_id

    def litter(self, name: str) -> None:
        self.last.litter(name)


class LibvirtMachine:
    def __init__(self, directory: Path, libvirtd: Libvirtd, appliance: Image) -> None:
        self.image = appliance
        self._directory = directory
        self._libvirtd = libvirtd
        self._boot_id_path = directory / "boot_id"
        self._boot_id_path.write_text("first boot\n")

    def driver(self) -> Driver:
        return LibvirtDriver(
            LibvirtSettings(
                pool_dir=self._directory / "pool",
                uri=self._libvirtd.uri,
                virt_type="qemu",
                network_mode="user",
                ports=range(23000, 23500),
                image_dirs=(Path(self.image.url.removeprefix("file://")).parent,),
                disk_reserve_gib=0,
                boot_id_path=self._boot_id_path,
            )
        )

    def crash(self, vm_id: UUID) -> None:
        for pid in self._libvirtd.processes():
            with suppress(psutil.NoSuchProcess):
                if str(vm_id) in psutil.Process(pid).cmdline():
                    psutil.Process(pid).kill()

    def shut_down(self, vm_id: UUID) -> None:
        virsh(self._libvirtd.uri, "shutdown", str(vm_id), "--mode", "acpi")

    def reboot(self) -> None:
        for vm_id in virsh(self._libvirtd.uri, "list", "--uuid").split():
            virsh(self._libvirtd.uri, "destroy", vm_id)
        self._boot_id_path.write_text("second boot\n")

    def go_away(self) -> None:
        self._libvirtd.kill()

    def come_back(self) -> None:
        self._libvirtd.start()
        self._libvirtd.wait_ready()

    def add_foreign(self) -> UUID:
        vm_id = uuid4()
        path = self._directory / f"{vm_id}.xml"
        path.write_text(
            f"<domain type='qemu'><name>foreign-{vm_id}</name><uuid>{vm_id}</uuid><memory unit='MiB'>32</memory>"
            "<os><type arch='x86_64'>hvm</type></os></domain>"
        )
        virsh(self._libvirtd.uri, "define", str(path))
        return vm_id

    def litter(self, name: str) -> None:
        (self._directory / "pool" / name).write_text("Who put this here?\n")

    def clean(self) -> None:
        """Leave no domain to the next test."""
        for vm_id in virsh(self._libvirtd.uri, "list", "--uuid").split():
            virsh(self._libvirtd.uri, "destroy", vm_id)
        for vm_id in virsh(self._libvirtd.uri, "list", "--uuid", "--all").split():
            virsh(self._libvirtd.uri, "undefine", vm_id)


@pytest.fixture(scope="module")
def appliance() -> Image:
    """The small guest image that script/guest-images builds."""
    printed = subprocess.run([ROOT / "script/guest-images"], stdout=subprocess.PIPE, text=True, check=True).stdout
    _, path, sha256 = next(line.split() for line in printed.splitlines() if line.startswith("appliance "))
    return Image(url=f"file://{path}", sha256=sha256, format="qcow2")


@pytest.fixture(scope="module")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirtd]:
    server = Libvirtd(tmp_path_factory.mktemp("libvirt"))
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.destroy()


@pytest.fixture(params=["simulated", "libvirt"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    if request.param == "simulated":
        yield SimulatedMachine(tmp_path)
        return
    if os.geteuid() != 0:
        pytest.skip("a private libvirtd needs root")
    libvirt = LibvirtMachine(tmp_path, request.getfixturevalue("libvirtd"), request.getfixturevalue("appliance"))
    yield libvirt
    libvirt.clean()


@dataclass
class Bench:
    """A driver that is open, on a machine."""

    machine: Machine
    driver: Driver
    changes: list[UUID | None]

    def vm(self, vm_id: UUID | None = None, **more: Any) -> DesiredVm:
        vm_id = vm_id or uuid4()
        facts: dict[str, Any] = {
            "host_epoch": 1,
            "project": "default",
            "name": f"vm-{vm_id.hex[:8]}",
            "generation": 1,
            "token": 5,
            "wanted": Wanted.RUNNING,
            "may_build": True,
            "restarts": 0,
            "grace_s": 30,
            "vcpus": 1,
            "memory_mib": 64,
            "disk_gib": 1,
            "image": self.machine.image,
            "nic": Nic(network="default", mac=mac_for(vm_id), address="10.80.0.9", prefix=20, gateway="10.80.0.1"),
            "deadline_s": 60,
        }
        return DesiredVm(vm_id=vm_id, **(facts | more))

    async def build(self, vm: DesiredVm) -> None:
        for verb in build_verbs(self.driver).values():
            await verb(vm)
        await self.driver.mark(vm)

    async def power(self, vm: DesiredVm) -> Power | None:
        domain = await self.driver.find(vm.vm_id)
        return domain.power if domain else None

    async def assert_nothing_left(self, vm: DesiredVm) -> None:
        assert await self.driver.find(vm.vm_id) is None
        assert vm.vm_id not in await self.driver.files()
        assert vm.vm_id not in [domain.journal.vm_id for domain in (await self.driver.inventory()).domains]

    async def renew(self) -> None:
        """The worker is replaced by another."""
        await self.driver.close()
        self.driver = self.machine.driver()
        self.changes.clear()
        await self.driver.open(self.changes.append)


@asynccontextmanager
async def opened(machine: Machine) -> AsyncIterator[Bench]:
    changes: list[UUID | None] = []
    driver = machine.driver()
    bench = Bench(machine, driver, changes)
    await driver.open(changes.append)
    try:
        yield bench
    finally:
        await bench.driver.close()


@pytest.fixture
async def bench(machine: Machine) -> AsyncIterator[Bench]:
    async with opened(machine) as bench:
        yield bench


async def refused(doing: Callable[[], Any]) -> str:
    """The code with which it was refused."""
    with pytest.raises(LeveretError) as caught:
        await doing()
    return caught.value.problem.code


async def test_of_a_vm_that_is_not_there_nothing_is_known_and_everything_is_removed(bench: Bench) -> None:
    driver, vm = bench.driver, bench.vm()
    assert await driver.find(vm.vm_id) is None
    assert (await driver.inventory()).domains == ()
    assert await driver.files() == frozenset()
    assert await driver.console_tail(vm.vm_id, 100) == b""
    assert await driver.guest_ready(vm.vm_id) is False
    await driver.remove(vm.vm_id)
    capacity = await driver.capacity()
    assert min(capacity.vcpus, capacity.memory_mib, capacity.disk_gib) > 0
    assert driver.boot_id
    assert await driver.cached_images() == ()
    await driver.check_pool()
    assert await refused(lambda: driver.start(vm)) == Code.START_FAILED
    assert await refused(lambda: driver.stop(vm.vm_id, 0)) == Code.STOP_FAILED
    assert await refused(lambda: driver.reset(vm.vm_id)) == Code.START_FAILED
    assert await refused(lambda: driver.mark(vm)) == Code.DEFINE_FAILED
    await bench.assert_nothing_left(vm)


async def test_every_step_of_a_build_may_be_taken_twice_and_the_journal_outlives_the_worker(bench: Bench) -> None:
    driver, vm = bench.driver, bench.vm(restarts=3, generation=4)
    for verb in (driver.fetch_image, driver.make_disk, driver.make_config_drive):
        await verb(vm)
        await verb(vm)
        assert await driver.find(vm.vm_id) is None
    assert await driver.files() == {vm.vm_id}

    for _ in range(2):
        await driver.define(vm)
        domain = await driver.find(vm.vm_id)
        assert domain is not None
        assert (domain.journal.generation, domain.power, domain.why_off) == (0, Power.OFF, None)

    for _ in range(2):
        await driver.start(vm)
        domain = await driver.find(vm.vm_id)
        assert domain is not None
        assert (domain.journal.generation, domain.power, domain.why_off) == (0, Power.RUNNING, None)

    await driver.mark(vm)
    await driver.mark(vm)
    await bench.renew()
    found = await bench.driver.find(vm.vm_id)
    assert found is not None
    assert (await bench.driver.inventory()).domains == (found,)
    journal = found.journal
    assert (journal.vm_id, journal.project, journal.name) == (vm.vm_id, vm.project, vm.name)
    assert (journal.token, journal.generation, journal.wanted, journal.restarts) == (5, 4, Wanted.RUNNING, 3)
    assert journal.boot_id == bench.driver.boot_id
    assert (found.power, found.why_off) == (Power.RUNNING, None)

    for step in build_verbs(bench.driver).values():  # a build that is resumed harms no running guest
        await step(vm)
    assert await bench.driver.find(vm.vm_id) == found

    for _ in range(2):
        await bench.driver.remove(vm.vm_id)
        await bench.assert_nothing_left(vm)


async def test_an_image_is_in_the_cache_once_it_was_fetched_and_stays_when_its_vm_is_gone(bench: Bench) -> None:
    driver, vm = bench.driver, bench.vm()
    for _ in range(2):
        await driver.fetch_image(vm)
        assert await driver.cached_images() == (vm.image.sha256,)
    await bench.build(vm)
    await driver.remove(vm.vm_id)
    assert await driver.cached_images() == (vm.image.sha256,)


async def test_a_pool_that_is_tried_again_and_again_is_left_as_it_was(bench: Bench) -> None:
    vm = bench.vm()
    await bench.build(vm)
    for _ in range(3):
        await bench.driver.check_pool()
    assert await bench.driver.leftovers() == ()
    assert await bench.driver.files() == {vm.vm_id}
    await bench.driver.remove(vm.vm_id)


async def test_remove_leaves_nothing_after_any_step_of_a_build(bench: Bench) -> None:
    verbs = [*build_verbs(bench.driver).values(), bench.driver.mark]
    for steps in range(len(verbs) + 1):
        vm = bench.vm()
        for verb in verbs[:steps]:
            await verb(vm)
        await bench.driver.remove(vm.vm_id)
        await bench.assert_nothing_left(vm)
        await bench.driver.remove(vm.vm_id)


async def test_a_build_that_is_broken_off_in_any_step_is_finished_or_removed_all_the_same(bench: Bench) -> None:
    driver = bench.driver
    verbs = list(build_verbs(driver).values())
    for broken in range(len(verbs)):
        vm = bench.vm()
        for verb in verbs[:broken]:
            await verb(vm)
        await break_off(verbs[broken](vm))
        if broken % 2:
            await bench.build(vm)
            assert await bench.power(vm) is Power.RUNNING
        await driver.remove(vm.vm_id)
        await bench.assert_nothing_left(vm)


async def break_off(step: Any) -> None:
    """Cancel a step that is under way. When this returns, what it had begun has ended."""
    task = asyncio.ensure_future(step)
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_stop_start_reset_and_mark_change_what_they_say_and_may_be_done_twice(bench: Bench) -> None:
    driver, vm = bench.driver, bench.vm()
    await bench.build(vm)
    stopped = vm.model_copy(update={"wanted": Wanted.STOPPED, "generation": 2})
    for _ in range(2):
        await driver.stop(vm.vm_id, 0)
        assert await bench.power(vm) is Power.OFF
    await driver.mark(stopped)
    domain = await driver.find(vm.vm_id)
    assert domain is not None
    assert (domain.journal.generation, domain.journal.wanted, domain.why_off) == (2, Wanted.STOPPED, None)
    assert await driver.guest_ready(vm.vm_id) is False

    for _ in range(2):
        await driver.reset(vm.vm_id)
        assert await bench.power(vm) is Power.RUNNING
    await driver.stop(vm.vm_id, 0)
    await driver.start(vm)
    assert await bench.power(vm) is Power.RUNNING
    await driver.remove(vm.vm_id)
    await bench.assert_nothing_left(vm)


async def test_a_guest_that_is_killed_is_told_and_off_with_the_reason(bench: Bench) -> None:
    vm = bench.vm()
    await bench.build(vm)
    bench.changes.clear()
    bench.machine.crash(vm.vm_id)
    await eventually(lambda: vm.vm_id in bench.changes, what="a change is told")

    async def off() -> bool:
        return await bench.power(vm) is Power.OFF

    await eventually(off)
    domain = await bench.driver.find(vm.vm_id)
    assert domain is not None
    assert domain.why_off is not None
    assert domain.why_off.code == Code.GUEST_CRASHED
    await bench.driver.start(vm)
    domain = await bench.driver.find(vm.vm_id)
    assert domain is not None
    assert (domain.power, domain.why_off) == (Power.RUNNING, None)
    await bench.driver.remove(vm.vm_id)


async def test_a_guest_announces_itself_and_shuts_down_when_asked_or_by_itself(bench: Bench) -> None:
    driver, vm = bench.driver, bench.vm(memory_mib=128)
    await bench.build(vm)
    await eventually(lambda: driver.guest_ready(vm.vm_id), within_s=BOOT_S, what="the guest is up")
    tail = await driver.console_tail(vm.vm_id, 65536)
    assert tail
    assert await driver.console_tail(vm.vm_id, 5) == tail[-5:]

    await driver.stop(vm.vm_id, 60)
    assert await bench.power(vm) is Power.OFF
    await driver.start(vm)
    assert await driver.guest_ready(vm.vm_id) is False, "what it said before it was stopped does not count"
    await eventually(lambda: driver.guest_ready(vm.vm_id), within_s=BOOT_S, what="the guest is up again")

    bench.changes.clear()
    bench.machine.shut_down(vm.vm_id)

    async def told_off() -> bool:
        return vm.vm_id in bench.changes and await bench.power(vm) is Power.OFF

    await eventually(told_off, within_s=30)
    domain = await driver.find(vm.vm_id)
    assert domain is not None
    assert domain.why_off is not None
    assert domain.why_off.code == Code.GUEST_SHUTDOWN
    await driver.remove(vm.vm_id)
    await bench.assert_nothing_left(vm)


async def test_after_a_reboot_of_the_host_what_ran_is_off_and_says_so(bench: Bench) -> None:
    running, stopped, made = bench.vm(), bench.vm(wanted=Wanted.STOPPED), bench.vm()
    await bench.build(running)
    for vm in (stopped, made):
        for verb in list(build_verbs(bench.driver).values())[:-1]:
            await verb(vm)
    await bench.driver.mark(stopped)
    before = bench.driver.boot_id
    bench.machine.reboot()
    await bench.renew()
    assert bench.driver.boot_id != before
    inventory = await bench.driver.inventory()
    seen = {domain.journal.vm_id: domain for domain in inventory.domains}
    assert {domain.power for domain in seen.values()} == {Power.OFF}
    problem = seen[running.vm_id].why_off
    assert problem is not None
    assert problem.code == Code.HOST_REBOOTED
    assert (seen[stopped.vm_id].why_off, seen[made.vm_id].why_off) == (None, None)
    await bench.driver.start(running)
    await bench.driver.mark(running)
    domain = await bench.driver.find(running.vm_id)
    assert domain is not None
    assert (domain.power, domain.journal.boot_id) == (Power.RUNNING, bench.driver.boot_id)
    for vm in (running, stopped, made):
        await bench.driver.remove(vm.vm_id)
        await bench.assert_nothing_left(vm)


async def test_foreign_domains_are_counted_and_never_touched(bench: Bench) -> None:
    driver, foreign, vm = bench.driver, bench.machine.add_foreign(), bench.vm()
    await bench.build(vm)
    inventory = await driver.inventory()
    assert inventory.strangers == (foreign,)
    assert inventory.foreign == 1
    assert [domain.journal.vm_id for domain in inventory.domains] == [vm.vm_id]
    assert await driver.find(foreign) is None
    assert await refused(lambda: driver.remove(foreign)) == Code.DELETE_FAILED
    usurper = bench.vm(foreign)
    for verb in (driver.fetch_image, driver.make_disk, driver.make_config_drive):
        await verb(usurper)
    assert await refused(lambda: driver.define(usurper)) == Code.DEFINE_FAILED
    assert await refused(lambda: driver.start(usurper)) == Code.START_FAILED
    assert await refused(lambda: driver.stop(foreign, 0)) == Code.STOP_FAILED
    assert await refused(lambda: driver.mark(usurper)) == Code.DEFINE_FAILED
    await driver.remove(vm.vm_id)
    assert (await driver.inventory()).foreign == 1


async def test_what_lies_in_the_pool_and_belongs_to_nothing_is_told(bench: Bench) -> None:
    driver, vm = bench.driver, bench.vm()
    await bench.build(vm)
    assert await driver.leftovers() == ()
    bench.machine.litter("notes.txt")
    assert await driver.leftovers() == ("notes.txt",)
    assert await driver.files() == {vm.vm_id}
    await driver.remove(vm.vm_id)
    assert await driver.leftovers() == ("notes.txt",)


async def test_guests_outlive_the_hypervisor_daemon_and_its_absence_is_told_by_every_verb(bench: Bench) -> None:
    driver, vm, other = bench.driver, bench.vm(), bench.vm()
    await bench.build(vm)
    found = await driver.find(vm.vm_id)
    bench.machine.go_away()
    verbs: list[Callable[[], Any]] = [
        driver.inventory,
        lambda: driver.find(vm.vm_id),
        lambda: driver.start(vm),
        lambda: driver.stop(vm.vm_id, 0),
        lambda: driver.reset(vm.vm_id),
        lambda: driver.mark(vm),
        lambda: driver.remove(vm.vm_id),
    ]
    for verb in verbs:
        assert await refused(verb) in AWAY
    bench.changes.clear()
    bench.machine.come_back()
    await eventually(lambda: None in bench.changes, within_s=20, what="the return is told")
    assert await driver.find(vm.vm_id) == found
    await bench.build(other)
    for one in (vm, other):
        await driver.remove(one.vm_id)
        await bench.assert_nothing_left(one)


async def test_a_driver_opens_while_the_hypervisor_is_away_and_finds_it_later(machine: Machine) -> None:
    if isinstance(machine, SimulatedMachine):
        machine.driver()
    machine.go_away()
    try:
        async with opened(machine) as bench:
            if isinstance(machine, SimulatedMachine):
                machine.go_away()
            assert await refused(bench.driver.inventory) in AWAY
            bench.changes.clear()
            machine.come_back()
            await eventually(lambda: None in bench.changes, within_s=20, what="the return is told")
            assert (await bench.driver.inventory()).domains == ()
    finally:
        machine.come_back()


async def test_several_vms_are_built_and_removed_side_by_side(bench: Bench) -> None:
    vms = [bench.vm() for _ in range(4)]
    await asyncio.gather(*(bench.build(vm) for vm in vms))
    inventory = await bench.driver.inventory()
    assert {(d.journal.vm_id, d.power) for d in inventory.domains} == {(vm.vm_id, Power.RUNNING) for vm in vms}
    await asyncio.gather(*(bench.driver.remove(vm.vm_id) for vm in vms))
    assert await bench.driver.files() == frozenset()
    assert (await bench.driver.inventory()).domains == ()
