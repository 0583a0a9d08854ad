"""The driver of real guests: the contract's verbs, each put together from the parts beside this module."""

import asyncio
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import structlog

from leveret.compute.driver import CACHED_MAX, LEFTOVERS_MAX, Domain, Inventory, OnChange, Power
from leveret.compute.libvirt_driver import config_drive, console, pool_probe, qemu_img, seeing
from leveret.compute.libvirt_driver.connection import Connection
from leveret.compute.libvirt_driver.definition import Definition, journal_of
from leveret.compute.libvirt_driver.door import Door
from leveret.compute.libvirt_driver.images import GIB, Images, disk_errors
from leveret.compute.libvirt_driver.journal import Memory, to_xml
from leveret.compute.libvirt_driver.lane import Lane, NoAnswer
from leveret.compute.libvirt_driver.machine import Machine
from leveret.compute.libvirt_driver.network import Networks
from leveret.compute.libvirt_driver.paths import PROBE, Pool, fsync_directory, make_directory
from leveret.compute.libvirt_driver.seeing import Seen
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.compute.libvirt_driver.shutdown import Shutdown
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.loop import Loop
from leveret.shared.messages import Capacity, DesiredVm

log = structlog.get_logger()

T = TypeVar("T")

#: How long `open` waits for libvirt before it leaves the rest to the background.
OPEN_WAIT_S = 5.0
#: Room for an overlay's tables, a config drive and a log; guests' own growth is what the reserve is for.
NEW_VM_BYTES = 16 * 1024 * 1024
MAX_HUNG_FILE_CALLS = 16


class LibvirtDriver:
    """One host's guests, through libvirt. Keeps nothing of them in memory that the host itself does not have."""

    def __init__(self, settings: LibvirtSettings) -> None:
        self._settings = settings
        self._boot_id = settings.boot_id_path.read_text().strip()
        self._pool = Pool(settings.pool_dir.absolute())
        self._files = Lane("files", width=8, max_hung=MAX_HUNG_FILE_CALLS, timeout_code=Code.DISK_FAILED)
        self._connection = Connection(settings, on_event=self._heard, on_open=self._connected)
        self._machine = Machine(self._connection, settings, self._boot_id)
        self._networks = Networks(self._connection, settings, self._pool.dhcp, self._files)
        self._definition = Definition(
            self._connection, self._machine, self._networks, self._pool, settings, self._boot_id
        )
        self.images = Images(self._pool, settings, self._files)
        self._readiness = console.Readiness()
        self._on_change: OnChange = _nobody_listens
        self._shutdown = Shutdown(self._connection, settings)
        self._paused: set[UUID] = set()
        self._preparing: asyncio.Task[None] | None = None
        self._loops = (
            Loop("look-again", self.look_again, every_s=settings.look_again_s),
            Loop("resume-paused", self.resume_paused, every_s=settings.resume_every_s),
            Loop("collect-images", partial(self.images.collect, settings.image_keep_s), every_s=3600.0),
        )

    @property
    def virt_type(self) -> str:
        return self._machine.virt_type

    @property
    def boot_id(self) -> str:
        return self._boot_id

    # Opening and closing.

    async def open(self, on_change: OnChange) -> None:
        self._on_change = on_change
        with disk_errors("opening the pool"):
            await self._in_thread(self._pool.make, doing="opening the pool")
            await self.images.sweep()
            await self._machine.probe()
        await self._connection.open(wait_s=OPEN_WAIT_S)
        if self._preparing is not None:
            await asyncio.wait((self._preparing,), timeout=OPEN_WAIT_S)
        for loop in self._loops:
            loop.start()

    async def close(self) -> None:
        self._on_change = _nobody_listens
        for loop in self._loops:
            await loop.stop()
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.gather(self._preparing, return_exceptions=True)
        await self._connection.close()

    def _connected(self) -> None:
        """A connection is there, the first one or a new one: anything may have changed meanwhile."""
        self._networks.connected()
        self._preparing = asyncio.create_task(self._prepare(), name="libvirt-prepare")
        self._shutdown.heard(None)
        self._on_change(None)

    async def _prepare(self) -> None:
        """Ask early what takes libvirt long to find out."""
        try:
            await self._machine.offer()
        except LeveretError as error:
            log.warning("machine.unknown", why=error.problem.message)

    def _heard(self, vm_id: UUID) -> None:
        self._shutdown.heard(vm_id)
        self._on_change(vm_id)

    # What there is.

    async def capacity(self) -> Capacity:
        node = await self._connection.call(Door.node)
        stat = await self._ask_pool(os.statvfs, self._pool.root, doing="measuring the pool")
        return Capacity(vcpus=node.vcpus, memory_mib=node.memory_mib, disk_gib=stat.f_blocks * stat.f_frsize // GIB)

    async def check_pool(self) -> None:
        limit_s = self._settings.pool_slow_s
        try:
            doing = "trying the pool with a small file"
            await self._ask_pool(pool_probe.probe, self._pool.root / PROBE, doing=doing, timeout_s=limit_s)
        except NoAnswer as error:
            slow = f"The pool is slow, or hangs: a small file was not written to it within {limit_s:g} s."
            raise fail(Code.DISK_FAILED, slow) from error
        with disk_errors("measuring the pool"):
            await self.images.check_space(NEW_VM_BYTES)

    async def cached_images(self) -> tuple[str, ...]:
        return await self._ask_pool(self._pool.cached, CACHED_MAX, doing="listing the image cache")

    async def _ask_pool(self, call: Callable[..., T], *args: Any, doing: str, timeout_s: float | None = None) -> T:
        """Ask the pool's file system something, again and again; but as long as it hangs over this, only once."""
        if self._files.hangs(doing):
            raise fail(Code.DISK_FAILED, f"The pool's file system does not answer: it hangs while {doing}.")
        limit_s = timeout_s or self._settings.file_timeout_s
        with disk_errors(doing):
            return await self._files.run(call, *args, timeout_s=limit_s, doing=doing, of=doing)

    async def inventory(self) -> Inventory:
        everything = await self._connection.call(Door.see_all)
        self._paused = {seen.vm_id for seen in everything if seen.io_error and seeing.memory_of(seen)}
        return seeing.inventory_of(everything, boot_id=self._boot_id, advertise_host=self._settings.advertise_host)

    async def find(self, vm_id: UUID) -> Domain | None:
        seen = await self._connection.call(Door.see, vm_id)
        memory = None if seen is None else seeing.memory_of(seen)
        if seen is None or memory is None:
            return None
        if seen.io_error:
            self._paused.add(vm_id)
        return seeing.domain_of(seen, memory, boot_id=self._boot_id, advertise_host=self._settings.advertise_host)

    async def files(self) -> frozenset[UUID]:
        with disk_errors("listing the pool"):
            return await self._in_thread(self._pool.vms, doing="listing the pool")

    async def leftovers(self) -> tuple[str, ...]:
        with disk_errors("listing the pool"):
            return await self._in_thread(self._pool.leftovers, LEFTOVERS_MAX, doing="listing the pool")

    # The steps of a build.

    async def fetch_image(self, vm: DesiredVm) -> None:
        async with self.images.using(vm.image, vm.disk_gib):
            return

    async def make_disk(self, vm: DesiredVm) -> None:
        disk = self._pool.vm(vm.vm_id).disk
        with disk_errors("making the disk"):
            if await self._in_thread(disk.exists, doing="looking for the disk"):
                return
            await self.images.check_space(NEW_VM_BYTES)
            await self._in_thread(make_directory, disk.parent, doing="making the VM's directory", of=vm.vm_id)
            async with self.images.using(vm.image, vm.disk_gib) as base:
                await self._make_overlay(disk, base, vm)

    async def _make_overlay(self, disk: Path, base: Path, vm: DesiredVm) -> None:
        temporary = disk.with_name(disk.name + ".tmp")
        await self._in_thread(temporary.unlink, True, doing="removing an unfinished disk", of=vm.vm_id)
        limit_s = self._settings.qemu_img_timeout_s
        await qemu_img.create_overlay(temporary, base, vm.image.format, vm.disk_gib, timeout_s=limit_s)
        await self._in_thread(_finish_disk, temporary, disk, doing="finishing the disk", of=vm.vm_id)

    async def make_config_drive(self, vm: DesiredVm) -> None:
        path = self._pool.vm(vm.vm_id).config_drive
        try:
            with disk_errors("making the config drive"):
                name_servers = await self._networks.name_servers(vm.nic) if vm.nic is not None else ()
                doing = "making the config drive"
                await self._in_thread(config_drive.write, path, vm, name_servers, doing=doing, of=vm.vm_id)
        except config_drive.CANNOT as error:
            raise fail(
                Code.CONFIG_DRIVE_FAILED, f"No config drive can be made of this: {type(error).__name__}."
            ) from error
        except LeveretError as error:
            if error.problem.code is Code.DISK_FULL:
                raise
            raise fail(Code.CONFIG_DRIVE_FAILED, error.problem.message) from error

    async def define(self, vm: DesiredVm) -> None:
        await self._definition.define(vm)

    async def start(self, vm: DesiredVm) -> None:
        await self._start(vm.vm_id, await self._ours(vm.vm_id, Code.START_FAILED, "starting it"))

    async def _start(self, vm_id: UUID, found: tuple[Seen, Memory]) -> None:
        seen, memory = found
        if seen.power is Power.RUNNING:
            return
        await self._note_console(vm_id)
        await self._definition.start(vm_id, memory)

    async def _note_console(self, vm_id: UUID) -> None:
        doing = "noting where the console stands"
        with disk_errors(doing):
            await self._in_thread(self._readiness.started, self._pool.vm(vm_id), doing=doing, of=vm_id)

    # The rest of a life.

    async def stop(self, vm_id: UUID, grace_s: float) -> None:
        seen, _ = await self._ours(vm_id, Code.STOP_FAILED, "stopping it")
        if seen.power is Power.OFF:
            return
        if grace_s > 0 and await self._shutdown.ask(vm_id, grace_s):
            return
        await self._switch_off(vm_id, Code.STOP_FAILED)

    async def _switch_off(self, vm_id: UUID, code: Code) -> None:
        """Kill its QEMU, which works on one that hangs, too."""
        limit_s = self._settings.start_timeout_s
        await self._connection.run(
            lambda door: door.destroy(vm_id), code=code, doing="switching it off", timeout_s=limit_s
        )

    async def reset(self, vm_id: UUID) -> None:
        seen, _ = await self._ours(vm_id, Code.START_FAILED, "resetting it")
        if seen.power is Power.RUNNING and not await self._reset(vm_id):
            await self._switch_off(vm_id, Code.START_FAILED)
        await self._start(vm_id, await self._ours(vm_id, Code.START_FAILED, "resetting it"))

    async def _reset(self, vm_id: UUID) -> bool:
        """Press the reset button. False when the guest's QEMU does not answer, or is off by now."""
        await self._note_console(vm_id)
        try:
            return await self._connection.run(
                lambda door: door.reset(vm_id),
                code=Code.START_FAILED,
                doing="resetting it",
                timeout_s=self._settings.button_timeout_s,
            )
        except LeveretError as error:
            if error.problem.code is not Code.HYPERVISOR_TIMEOUT:
                raise
            return not await self._connection.wait_open(OPEN_WAIT_S)

    async def mark(self, vm: DesiredVm) -> None:
        _, memory = await self._ours(vm.vm_id, Code.DEFINE_FAILED, "writing its journal")
        journal = journal_of(vm, generation=vm.generation, boot_id=self._boot_id)
        xml = to_xml(Memory(journal, memory.attachment))
        await self._connection.run(
            lambda door: door.set_metadata(vm.vm_id, xml), code=Code.DEFINE_FAILED, doing="writing its journal"
        )

    async def remove(self, vm_id: UUID) -> None:
        seen = await self._connection.call(Door.see, vm_id)
        if seen is not None:
            memory = seeing.memory_of(seen)
            if memory is None:
                raise fail(
                    Code.DELETE_FAILED,
                    f"The host has a domain {vm_id} that is not Leveret's; it is left alone.",
                    hint="Rename or remove that domain by hand.",
                )
            await self._switch_off(vm_id, Code.DELETE_FAILED)
            await self._connection.run(
                lambda door: door.undefine(vm_id), code=Code.DELETE_FAILED, doing="removing its definition"
            )
        await self._networks.remove_host(vm_id)
        paths = self._pool.vm(vm_id)
        self._readiness.forget(paths)
        self._paused.discard(vm_id)
        with disk_errors("removing its files"):
            await self._in_thread(_remove_tree, paths.directory, doing="removing its files", of=vm_id)
        if self._files.hangs(vm_id):
            raise fail(Code.DISK_FAILED, "A call that hangs in the pool's file system may still make files of it.")

    async def console_tail(self, vm_id: UUID, max_bytes: int) -> bytes:
        wanted = min(max_bytes, self._settings.console_max_bytes)
        path = self._pool.vm(vm_id).console
        with disk_errors("reading the console"):
            return await self._in_thread(console.tail, path, wanted, doing="reading the console")

    async def guest_ready(self, vm_id: UUID) -> bool:
        paths = self._pool.vm(vm_id)
        with disk_errors("reading the console"):
            return await self._in_thread(self._readiness.is_ready, paths, doing="reading the console")

    # Beside the contract.

    async def look_again(self) -> None:
        """Say that anything may have changed. libvirt tells of no event when a guest ends while libvirtd starts."""
        if self._connection.is_open:
            self._on_change(None)

    async def resume_paused(self) -> None:
        """Let guests go on that QEMU paused because the disk was full, once there is room again."""
        if not self._paused or not self._connection.is_open:
            return
        stat = await self._in_thread(os.statvfs, self._pool.root, doing="measuring the pool")
        if stat.f_bavail * stat.f_frsize < self._settings.resume_free_bytes:
            return
        for vm_id in tuple(self._paused):
            self._paused.discard(vm_id)
            seen = await self._connection.call(Door.see, vm_id)
            if seen is not None and seen.io_error and seeing.memory_of(seen) is not None:
                await self._connection.call(Door.resume, vm_id)
                log.info("guest.resumed", vm_id=str(vm_id))

    async def _ours(self, vm_id: UUID, code: Code, doing: str) -> tuple[Seen, Memory]:
        seen = await self._connection.call(Door.see, vm_id)
        memory = None if seen is None else seeing.memory_of(seen)
        if seen is None or memory is None:
            raise fail(code, f"There is no domain {vm_id}, found while {doing}.")
        return seen, memory

    async def _in_thread(self, call: Callable[..., T], *args: Any, doing: str, of: UUID | Path | None = None) -> T:
        return await self._files.run(call, *args, timeout_s=self._settings.file_timeout_s, doing=doing, of=of)


def _nobody_listens(_vm_id: UUID | None) -> None:
    return


def _finish_disk(temporary: Path, disk: Path) -> None:
    temporary.chmod(0o600)
    fd = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(disk)
    fsync_directory(disk.parent)


def _remove_tree(directory: Path) -> None:
    if not directory.exists():
        return
    while directory.exists():
        with suppress(FileNotFoundError):  # another call that hung until now is at it, too
            shutil.rmtree(directory)
    fsync_directory(directory.parent)
