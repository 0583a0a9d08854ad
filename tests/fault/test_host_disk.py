"""Row 17 of the fault table: a host's disk is full, or hangs. Real guests in a pool on a file system of its own."""

import asyncio
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from uuid import UUID

import pytest
from peers import eventually
from real_host import OBEDIENT, RealHost, guest, real_house, tell

from leveret.client import Leveret
from leveret.compute.driver import build_verbs
from leveret.compute.libvirt_driver import LibvirtDriver, LibvirtSettings
from leveret.shared.documents import ImageByName, VmView
from leveret.shared.errors import Code, LeveretError
from leveret.shared.ids import mac_for, new_id
from leveret.shared.lifecycle import BUILD_STEPS, State, Step, Wanted
from leveret.shared.messages import DesiredVm, Image, Nic
from leveret.stack.libvirtd import virsh

pytestmark = [
    pytest.mark.fault,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="a private libvirtd needs root"),
]

MIB = 1024**2
POOL_MIB = 4096
RESERVE_MIB = 1024
#: The simulated host is small, so that the scheduler prefers the real one.
SMALL = {
    "LEVERET_SIMULATE_VCPUS": "4",
    "LEVERET_VCPU_RATIO": "1",
    "LEVERET_SIMULATE_MEMORY_MIB": "1024",
    "LEVERET_SIMULATE_DISK_GIB": "8",
}
#: The pool is tried as often as the host beats, or once when its worker starts.
TRIED_OFTEN = {"LEVERET_POOL_CHECK_S": "1", "LEVERET_POOL_SLOW_S": "3"}
TRIED_ONCE = {"LEVERET_POOL_CHECK_S": "3600"}


class Disk:
    """A file system that can be filled and frozen."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ballast = root / "lost+found" / "ballast"
        self._inodes = root / "lost+found" / "inodes"

    def fill(self, *, but_mib: float) -> None:
        """Take all space but so much."""
        free_bytes = self._free_bytes()
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free_bytes - int(but_mib * MIB))

    def fill_inodes(self, *, but: int) -> None:
        """Leave room for so many files, however large."""
        self._inodes.mkdir()
        count = 0
        with suppress_errno(errno.ENOSPC):
            while True:
                (self._inodes / str(count)).touch()
                count += 1
        for number in range(count - but, count):
            (self._inodes / str(number)).unlink()

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)
        for file in self._inodes.glob("*"):
            file.unlink()
        if self._inodes.exists():
            self._inodes.rmdir()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        subprocess.run(["fsfreeze", "--freeze", self.root], check=True)
        try:
            yield
        finally:
            self.thaw()

    def thaw(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", self.root], check=False, stderr=subprocess.DEVNULL)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """As the kernel leaves a file system in which it found an error."""
        subprocess.run(["mount", "-o", "remount,ro", self.root], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", self.root], check=True)

    def _free_bytes(self) -> int:
        stat = os.statvfs(self.root)
        return stat.f_bavail * stat.f_frsize


@contextmanager
def suppress_errno(number: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    directory = Path(tempfile.mkdtemp(prefix="leveret-test-"))
    directory.chmod(0o755)
    root, file = directory / "pool", directory / "disk"
    root.mkdir()
    file.touch()
    os.truncate(file, POOL_MIB * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-N", "512", "-O", "^has_journal", file], check=True)
    subprocess.run(["mount", "-o", "loop", file, root], check=True)
    disk = Disk(root)
    try:
        yield disk
    finally:
        disk.thaw()
        subprocess.run(["umount", "--lazy", root], check=True)
        file.unlink()
        root.rmdir()
        directory.rmdir()


@pytest.fixture(scope="module")
def host(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealHost]:
    """One real host, and a simulated one to go to."""
    settings = {
        "LEVERET_RESERVE_DISK_GIB": str(RESERVE_MIB // 1024),
        "LEVERET_DISK_RATIO": "10",
        "LEVERET_FILE_TIMEOUT_S": "3",
        **TRIED_OFTEN,
    }
    with real_house(tmp_path_factory.mktemp("images"), settings, pool=disk.root, fake_hosts=1) as host:
        host.house.reconfigure("fake-hosts", **SMALL, LEVERET_HEARTBEAT_S="1")
        host.house.reconfigure("conductor-1", LEVERET_CORDON_AFTER_FAILURES="100")
        host.house.wait_ready()
        yield host


@pytest.fixture
async def client(host: RealHost, disk: Disk) -> AsyncIterator[Leveret]:
    """Afterwards nothing is left of any VM, and every rule holds."""
    async with host.house.client() as client:
        await eventually(lambda: has_small_host(host), within_s=30, what="a small host beside the real one")
        await eventually(host.is_well, within_s=30, what="a host without a problem")
        yield client
        disk.thaw()
        disk.empty()
        ids = [row["id"] for row in await host.house.query("SELECT id FROM vms WHERE state <> 'deleted'")]
        await asyncio.gather(*(client.delete(vm_id) for vm_id in ids))
    await host.all_are(State.DELETED, *ids)
    await host.agrees()
    assert host.domains() == {}
    assert host.files() == set()


async def has_small_host(host: RealHost) -> bool:
    rows = await host.house.query("SELECT FROM hosts WHERE virt_type = 'simulated' AND vcpus = 4 AND state = 'up'")
    return len(rows) == 1


@asynccontextmanager
async def unsuspecting(host: RealHost) -> AsyncIterator[None]:
    """The host does not try its pool meanwhile: what becomes of it comes between two tries, and builds run into it."""
    await restarted(host, TRIED_ONCE)
    try:
        yield
    finally:
        await restarted(host, TRIED_OFTEN)


async def restarted(host: RealHost, settings: dict[str, str]) -> None:
    epoch = (await host.heard_of())["epoch"]
    host.house.reconfigure("compute", **settings)

    async def is_back() -> bool:
        return bool((await host.heard_of())["epoch"] > epoch) and await host.is_well()

    await eventually(is_back, within_s=60, what="another incarnation of the worker")


async def made(host: RealHost, client: Leveret, *, image: str = "obedient", within_s: float = 60) -> VmView:
    vm_id = new_id()
    await client.create(guest().model_copy(update={"image": ImageByName(name=image)}), vm_id=vm_id)
    (vm,) = await host.all_are(State.RUNNING, vm_id, within_s=within_s)
    return vm


async def why_not_here(host: RealHost, vm_id: UUID) -> list[tuple[str, str]]:
    """Code and step of each build of a VM that failed."""
    rows = await host.house.query(
        """SELECT data->'problem'->>'code' AS code, data->'problem'->>'step' AS step FROM events
        WHERE vm_id = $1 AND type = 'build_failed' ORDER BY id""",
        vm_id,
    )
    return [(row["code"], row["step"]) for row in rows]


async def lives(host: RealHost, vm_id: UUID) -> None:
    """The guest goes on."""
    ticks = host.ticks(vm_id)
    await eventually(lambda: host.ticks(vm_id) > ticks, within_s=30, what="a guest that lives")


# A full disk.


async def test_a_pool_that_is_down_to_its_reserve_takes_no_new_vm(host: RealHost, client: Leveret, disk: Disk) -> None:
    before = await made(host, client)
    assert host.domains() == {before.id: "running"}
    disk.fill(but_mib=RESERVE_MIB + 8)
    await eventually(lambda: says(host, Code.DISK_FULL), within_s=30, what="a heartbeat that says so")

    elsewhere = await made(host, client)
    assert elsewhere.attempts == 1
    assert host.files() == {str(before.id)}
    await lives(host, before.id)
    await host.agrees()

    disk.empty()
    await eventually(host.is_well, within_s=30, what="a heartbeat without a problem")
    after = await made(host, client)
    assert host.domains() == {before.id: "running", after.id: "running"}


async def test_a_build_that_finds_the_pool_down_to_its_reserve_is_made_elsewhere(
    host: RealHost, client: Leveret, disk: Disk
) -> None:
    async with unsuspecting(host):
        disk.fill(but_mib=RESERVE_MIB + 8)
        refused = await made(host, client)
        assert await why_not_here(host, refused.id) == [(Code.DISK_FULL, "disk")]
        assert refused.attempts == 2
        assert host.files() == set()
        await host.agrees()
        disk.empty()


async def test_a_build_that_finds_no_space_at_any_step_is_made_elsewhere_and_leaves_no_file(
    host: RealHost, client: Leveret, disk: Disk, tmp_path: Path
) -> None:
    content = OBEDIENT.ljust(64 * 1024, b"\0")
    image = Path(host.house.layout.image_dir(host.house.options)) / "other.raw"
    image.write_bytes(content)
    await host.house.query(
        "INSERT INTO images VALUES ('other', $1, $2, 'raw')", image.as_uri(), hashlib.sha256(content).hexdigest()
    )
    before = await made(host, client)
    failed_at = []
    async with unsuspecting(host):
        for files in range(10):
            disk.fill_inodes(but=files)
            vm = await made(host, client, image="other")
            disk.empty()
            failures = await why_not_here(host, vm.id)
            if not failures:
                break
            ((code, step),) = failures
            assert code == Code.DISK_FULL
            failed_at.append(step)
            assert host.files() == {str(before.id)}
            assert host.domains() == {before.id: "running"}
            await client.delete(vm.id)
            await host.all_are(State.DELETED, vm.id)
    assert host.domains() == {before.id: "running", vm.id: "running"}
    assert list(dict.fromkeys(failed_at)) == ["image", "disk", "config_drive", "start"]
    assert (await host.heard_of())["state"] == "up"
    await host.agrees()


async def test_a_guest_that_fills_the_disk_waits_until_there_is_room_and_keeps_nobody_from_running(
    host: RealHost, client: Leveret, disk: Disk
) -> None:
    writing, other = await made(host, client), await made(host, client)
    await eventually(lambda: host.ticks(writing.id) and host.ticks(other.id), within_s=60, what="both have booted")
    disk.fill(but_mib=1)
    terminal = os.open(host.terminal(writing.id), os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        os.write(terminal, b"w" * 400)

        def is_paused() -> bool:
            with suppress(BlockingIOError):
                os.read(terminal, 4096)
            return "I/O error" in virsh(host.libvirtd.uri, "domstate", "--reason", str(writing.id))

        await eventually(is_paused, within_s=60, what="a guest that waits for room")
        await lives(host, other.id)
        assert (await client.get(writing.id)).state is State.RUNNING
        await host.agrees()
        disk.empty()
        await eventually(lambda: not is_paused(), within_s=60, what="a guest that goes on")
    finally:
        os.close(terminal)
    await lives(host, writing.id)
    assert host.boots(writing.id) == 1


# A disk that hangs.


async def test_a_pool_that_hangs_holds_up_nobody_and_everything_is_as_wished_when_it_goes_on(
    host: RealHost, client: Leveret, disk: Disk, record_property: Callable[[str, object], None]
) -> None:
    running, stopping, leaving = [(await made(host, client)).id for _ in range(3)]
    assert set(host.domains()) == {running, stopping, leaving}
    await eventually(lambda: host.ticks(running), within_s=60, what="a guest that has booted")
    pid, terminal = host.qemu(running).pid, host.terminal(running)
    with disk.frozen():
        hit = new_id()
        await client.create(guest(), vm_id=hit)
        await eventually(lambda: says(host, Code.DISK_FAILED), within_s=30, what="a heartbeat that says so")
        await asyncio.gather(client.stop(stopping, grace_s=0), client.delete(leaving))
        assert await host.longest_silence_s(beats=4) < 10
        await host.all_are(State.RUNNING, hit)
        assert set(await why_not_here(host, hit)) <= {(Code.DISK_FAILED, "image")}
        spared = await made(host, client)
        assert spared.attempts == 1
        tell(terminal, "x")  # the guest is there, and answers
    began = time.monotonic()
    await host.all_are(State.DELETED, leaving)
    await host.all_are(State.STOPPED, stopping)
    await eventually(host.is_well, within_s=60, what="a heartbeat without a problem")
    record_property("recovery_s", round(time.monotonic() - began, 1))
    assert host.qemu(running).pid == pid
    assert host.files() == {str(running), str(stopping)}
    assert host.domains() == {running: "running", stopping: "stopped"}
    again = await made(host, client)
    assert host.domains()[again.id] == "running"
    await host.agrees()


async def test_a_pool_that_grows_has_more_the_next_time_it_is_asked(
    host: RealHost, appliance: Path, tmp_path: Path
) -> None:
    image = Image(url=appliance.as_uri(), sha256="0" * 64, format="qcow2")
    with memory_disk(tmp_path) as grow_to:
        async with driving(host, Disk(tmp_path), image) as (driver, _vm):
            assert (await driver.capacity()).disk_gib == 1
            grow_to(3)
            assert (await driver.capacity()).disk_gib == 3


@contextmanager
def memory_disk(root: Path) -> Iterator[Callable[[int], None]]:
    """A file system of one GiB that can be made larger while it is in use: to so many GiB."""

    def grow_to(gib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={gib}g", root], check=True)

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "pool", root], check=True)
    try:
        (root / "lost+found").mkdir()
        yield grow_to
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


async def says(host: RealHost, code: Code) -> bool:
    return await host.trouble() == code


async def test_a_pool_is_found_full_failed_or_slow_and_well_again_as_soon_as_it_is(
    host: RealHost, disk: Disk, appliance: Path
) -> None:
    image = Image(url=appliance.as_uri(), sha256="0" * 64, format="qcow2")
    async with driving(host, disk, image) as (driver, _vm):
        await driver.check_pool()
        disk.fill(but_mib=8)
        assert await complaint(driver) == Code.DISK_FULL
        disk.empty()
        await driver.check_pool()
        disk.fill_inodes(but=0)
        assert await complaint(driver) == Code.DISK_FULL
        disk.empty()
        await driver.check_pool()
        with disk.read_only():
            assert await complaint(driver) == Code.DISK_FAILED
        await driver.check_pool()
        with disk.frozen():
            began = time.monotonic()
            assert [await complaint(driver) for _ in range(50)] == [Code.DISK_FAILED] * 50
            assert time.monotonic() - began < 5, "what hangs is tried once"
            assert driver._files.hung == 1
            assert (await driver.capacity()).disk_gib > 0
            assert await driver.cached_images() == ()
        await eventually(lambda: not driver._files.hung, within_s=30, what="a try that has come back")
        await driver.check_pool()
        assert await driver.leftovers() == ()


async def complaint(driver: LibvirtDriver) -> str | None:
    try:
        await driver.check_pool()
    except LeveretError as error:
        return error.problem.code
    return None


@pytest.mark.parametrize("step", BUILD_STEPS)
async def test_what_is_removed_from_a_pool_that_hung_in_a_build_does_not_come_back(
    step: Step, host: RealHost, disk: Disk, appliance: Path
) -> None:
    """Calls that hang are given up, and take effect when the file system goes on."""
    content = appliance.read_bytes()  # noqa: ASYNC240
    image = Image(url=appliance.as_uri(), sha256=hashlib.sha256(content).hexdigest(), format="qcow2")
    async with driving(host, disk, image) as (driver, vm):
        for earlier, verb in build_verbs(driver).items():
            if earlier == step:
                break
            await verb(vm)
        with disk.frozen():
            with suppress(LeveretError):
                await build_verbs(driver)[step](vm)
            confirmed = await removed(driver, vm)
        if not confirmed:
            await eventually(lambda: removed(driver, vm), within_s=30, what="a removal that is confirmed")
        await eventually(lambda: not driver._files.hung, within_s=30, what="calls that have come back")
        assert await driver.find(vm.vm_id) is None
        assert await driver.files() == frozenset()
        assert await driver.leftovers() == ()
        assert not list((disk.root / "lost+found" / "pool" / "images").glob(".*"))


async def removed(driver: LibvirtDriver, vm: DesiredVm) -> bool:
    try:
        await driver.remove(vm.vm_id)
    except LeveretError:
        return False
    return True


@asynccontextmanager
async def driving(host: RealHost, disk: Disk, image: Image) -> AsyncIterator[tuple[LibvirtDriver, DesiredVm]]:
    """A driver with a pool of its own on this disk, and a VM to build."""
    pool = disk.root / "lost+found" / "pool"
    settings = LibvirtSettings(
        pool_dir=pool,
        uri=host.libvirtd.uri,
        virt_type="qemu",
        network_mode="user",
        image_dirs=(Path(image.url.removeprefix("file://")).parent,),
        disk_reserve_gib=0,
        file_timeout_s=1,
        pool_slow_s=1,
        qemu_img_timeout_s=2,
    )
    vm_id = new_id()
    vm = DesiredVm(
        vm_id=vm_id,
        host_epoch=1,
        project="default",
        name="hangs",
        generation=1,
        token=1,
        wanted=Wanted.RUNNING,
        may_build=True,
        restarts=0,
        grace_s=0,
        vcpus=1,
        memory_mib=64,
        disk_gib=1,
        image=image,
        nic=Nic(network="default", mac=mac_for(vm_id), address="10.80.0.9", prefix=20, gateway="10.80.0.1"),
        deadline_s=60,
    )
    driver = LibvirtDriver(settings)
    await driver.open(lambda _vm_id: None)
    try:
        yield driver, vm
    finally:
        disk.thaw()
        await driver.close()
        shutil.rmtree(pool)
