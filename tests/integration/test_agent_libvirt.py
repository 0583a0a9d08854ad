"""The agent over real guests: what it makes of kills, hangs and crashes of everything below it."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest
from peers import eventually

from leveret.compute.agent import Agent
from leveret.compute.driver import Power
from leveret.compute.heart import Heart, Registration
from leveret.compute.libvirt_driver import LibvirtDriver, LibvirtSettings
from leveret.compute.metrics import Metrics
from leveret.shared.errors import Code
from leveret.shared.ids import mac_for
from leveret.shared.lifecycle import Observed, Wanted
from leveret.shared.messages import DesiredVm, Heartbeat, HostReport, Image, Nic, VmReport
from leveret.stack.libvirtd import Libvirtd

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
HOST_ID = UUID(int=1)


@pytest.fixture(scope="module")
def image() -> Image:
    printed = subprocess.run([ROOT / "script/guest-images"], stdout=subprocess.PIPE, text=True, check=True).stdout
    _, path, sha256 = next(line.split() for line in printed.splitlines() if line.startswith("appliance "))
    return Image(url=f"file://{path}", sha256=sha256, format="qcow2")


@pytest.fixture(scope="module")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirtd]:
    if os.geteuid() != 0:
        pytest.skip("a private libvirtd needs root")
    server = Libvirtd(tmp_path_factory.mktemp("libvirt"))
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.destroy()


class Host:
    """One real host's worker, without a bus."""

    def __init__(self, directory: Path, libvirtd: Libvirtd, image: Image) -> None:
        self.libvirtd = libvirtd
        self.image = image
        self.heard: list[HostReport] = []
        self.epoch = 0
        self._settings = LibvirtSettings(
            pool_dir=directory / "pool",
            uri=libvirtd.uri,
            virt_type="qemu",
            network_mode="user",
            ports=range(24000, 24500),
            image_dirs=(Path(image.url.removeprefix("file://")).parent,),
            disk_reserve_gib=0,
            call_timeout_s=3,
        )

    async def start(self) -> None:
        """A worker, in the next epoch."""
        self.epoch += 1
        self.driver = LibvirtDriver(self._settings)
        self.agent = Agent(self.driver, HOST_ID, self.epoch, name="h1", publish=self._publish, metrics=Metrics())
        await self.driver.open(self.agent.on_change)

    async def kill(self) -> None:
        await self.agent.kill()
        await self.driver.close()

    async def _publish(self, report: HostReport) -> None:
        self.heard.append(report)

    def wish(self, wanted: Wanted = Wanted.RUNNING, *, vm_id: UUID, generation: int = 1) -> DesiredVm:
        return DesiredVm(
            vm_id=vm_id,
            host_epoch=self.epoch,
            project="default",
            name=f"vm-{vm_id.hex[:8]}",
            generation=generation,
            token=5,
            wanted=wanted,
            may_build=generation == 1,
            restarts=0,
            grace_s=0,
            vcpus=1,
            memory_mib=64,
            disk_gib=1,
            image=self.image,
            nic=Nic(network="default", mac=mac_for(vm_id), address="10.80.0.9", prefix=20, gateway="10.80.0.1"),
            deadline_s=60,
        )

    def last(self, vm_id: UUID) -> VmReport | None:
        said = [(r.epoch, vm.seq, vm) for r in self.heard for vm in r.vms if vm.vm_id == vm_id]
        return max(said, key=lambda one: one[:2])[2] if said else None

    async def until(self, vm_id: UUID, observed: Observed, *, generation: int = 1, within_s: float = 30) -> VmReport:
        def there() -> VmReport | None:
            last = self.last(vm_id)
            good = last and last.settled and last.observed is observed and last.generation == generation
            return last if good else None

        report: VmReport = await eventually(there, within_s=within_s, what=f"{vm_id} {observed}")
        return report


@pytest.fixture
async def host(libvirtd: Libvirtd, image: Image, tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path, libvirtd, image)
    await host.start()
    yield host
    for domain in (await host.driver.inventory()).domains:
        await host.driver.remove(domain.journal.vm_id)
    await host.kill()


async def test_a_vm_lives_its_life(host: Host) -> None:
    vm_id = uuid4()
    host.agent.on_command(host.wish(vm_id=vm_id))
    report = await host.until(vm_id, Observed.RUNNING)
    assert [step.step for step in report.steps] == ["image", "disk", "config_drive", "define", "start"]
    assert report.ssh is not None
    assert report.ssh.port in range(24000, 24500)
    host.agent.on_command(host.wish(Wanted.STOPPED, vm_id=vm_id, generation=2))
    assert (await host.until(vm_id, Observed.STOPPED, generation=2)).problem is None
    host.agent.on_command(host.wish(vm_id=vm_id, generation=3))
    await host.until(vm_id, Observed.RUNNING, generation=3)
    host.agent.on_command(host.wish(Wanted.ABSENT, vm_id=vm_id, generation=4))
    await host.until(vm_id, Observed.ABSENT, generation=4)
    assert await host.driver.files() == frozenset()
    assert (await host.driver.inventory()).domains == ()


async def test_a_worker_killed_at_any_moment_of_a_build_is_followed_by_one_that_finishes_it(host: Host) -> None:
    for pause_s in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        vm_id = uuid4()
        host.agent.on_command(host.wish(vm_id=vm_id))
        await asyncio.sleep(pause_s)
        await host.kill()
        await host.start()
        host.agent.on_list()
        host.agent.on_command(host.wish(vm_id=vm_id))
        await host.until(vm_id, Observed.RUNNING)
        assert [domain.journal.vm_id for domain in (await host.driver.inventory()).domains] == [vm_id]
        host.agent.on_command(host.wish(Wanted.ABSENT, vm_id=vm_id, generation=2))
        await host.until(vm_id, Observed.ABSENT, generation=2)
        assert await host.driver.files() == frozenset()


async def test_a_delete_at_any_moment_of_a_build_leaves_nothing(host: Host) -> None:
    for pause_s in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        vm_id = uuid4()
        host.agent.on_command(host.wish(vm_id=vm_id))
        await asyncio.sleep(pause_s)
        host.agent.on_command(host.wish(Wanted.ABSENT, vm_id=vm_id, generation=2))
        await host.until(vm_id, Observed.ABSENT, generation=2)
        assert await host.driver.files() == frozenset()
        assert (await host.driver.inventory()).domains == ()


async def test_a_libvirtd_killed_during_builds_is_waited_for_and_running_guests_live(host: Host) -> None:
    first, others = uuid4(), [uuid4() for _ in range(3)]
    host.agent.on_command(host.wish(vm_id=first))
    await host.until(first, Observed.RUNNING)
    for vm_id in others:
        host.agent.on_command(host.wish(vm_id=vm_id))
    await asyncio.sleep(0.3)
    host.libvirtd.kill()
    await asyncio.sleep(2)
    host.libvirtd.start()
    await asyncio.to_thread(host.libvirtd.wait_ready)
    for vm_id in (first, *others):
        await host.until(vm_id, Observed.RUNNING)
    powers = {domain.journal.vm_id: domain.power for domain in (await host.driver.inventory()).domains}
    assert powers == dict.fromkeys((first, *others), Power.RUNNING)


async def test_while_libvirtd_hangs_the_heart_beats_and_says_so(host: Host) -> None:
    beats: list[Heartbeat] = []

    async def post(beat: Heartbeat) -> None:
        beats.append(beat)

    vm_id = uuid4()
    heart = Heart(Registration(HOST_ID, 1, "h1", "z1", "0"), host.driver, host.agent, post, every_s=0.5)
    await heart.beat()
    assert beats[0].problem is None
    assert host.libvirtd.pid is not None
    os.kill(host.libvirtd.pid, signal.SIGSTOP)
    try:
        heart.loop.start()
        host.agent.on_command(host.wish(vm_id=vm_id))
        await eventually(lambda: beats[-1].problem is not None and len(beats) > 2, within_s=15)
        problem = beats[-1].problem
        assert problem is not None
        assert problem.code in {Code.HYPERVISOR_TIMEOUT, Code.HYPERVISOR_UNAVAILABLE}
        assert beats[-1].total == beats[0].total
    finally:
        os.kill(host.libvirtd.pid, signal.SIGCONT)
    await host.until(vm_id, Observed.RUNNING)
    await eventually(lambda: beats[-1].problem is None, within_s=15)
    await heart.stop()


async def test_a_guest_whose_qemu_is_killed_is_told_with_the_reason(host: Host) -> None:
    vm_id = uuid4()
    host.agent.on_command(host.wish(vm_id=vm_id))
    await host.until(vm_id, Observed.RUNNING)
    for pid in host.libvirtd.processes():
        with suppress(psutil.NoSuchProcess):
            if str(vm_id) in psutil.Process(pid).cmdline():
                psutil.Process(pid).kill()
    report = await host.until(vm_id, Observed.STOPPED, within_s=5)
    assert report.problem is not None
    assert report.problem.code == Code.GUEST_CRASHED
