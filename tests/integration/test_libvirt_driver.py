"""What only real guests show: networks, hangs, consoles, crashes, and a libvirtd that dies or freezes."""

import asyncio
import base64
import gc
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID
from xml.etree import ElementTree as ET

import psutil
import pytest
from peers import eventually

from leveret.compute.driver import Power, build_verbs
from leveret.compute.libvirt_driver import LibvirtDriver, LibvirtSettings, kvm_probe
from leveret.compute.libvirt_driver.door import Door, NoDomainError
from leveret.shared.errors import Code, LeveretError
from leveret.shared.ids import mac_for, new_id
from leveret.shared.lifecycle import Wanted
from leveret.shared.messages import DesiredVm, Image, Nic
from leveret.stack.errors import StackError
from leveret.stack.libvirtd import Libvirtd, virsh

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="a private libvirtd needs root"),
]

ROOT = Path(__file__).parents[2]
BOOT_S = 120  # a guest without KVM on a busy machine
SSH_FAILED = 255
IDLE_THREADS = 4  # ours, libvirt's events, and room for what the test's own tools need
NETWORK = {"network": "default", "prefix": 24, "gateway": "10.80.7.1"}


@pytest.fixture(scope="module")
def appliance() -> Image:
    printed = subprocess.run([ROOT / "script/guest-images"], stdout=subprocess.PIPE, text=True, check=True).stdout
    _, path, sha256 = next(line.split() for line in printed.splitlines() if line.startswith("appliance "))
    return Image(url=f"file://{path}", sha256=sha256, format="qcow2")


@pytest.fixture(scope="module")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirtd]:
    """The host's network is this machine's: for guests in user mode."""
    server = Libvirtd(tmp_path_factory.mktemp("libvirt"))
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.destroy()


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirtd]:
    """A host with a network of its own, for NAT: bridges and addresses of this machine are not touched."""
    server = Libvirtd(tmp_path_factory.mktemp("apart"), network_namespace=f"lvt-{os.getpid()}")
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.destroy()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


class Host:
    """An open driver, and what tests do with it and behind its back."""

    def __init__(self, settings: LibvirtSettings, server: Libvirtd, image: Image, key: Path) -> None:
        self.settings = settings
        self.driver = LibvirtDriver(settings)
        self.changes: list[UUID | None] = []
        self._server = server
        self._image = image
        self._key = key

    def vm(self, *, user_data: bytes | None = None, last: int = 9, **more: Any) -> DesiredVm:
        vm_id = more.pop("vm_id", None) or new_id()
        facts: dict[str, Any] = {
            "host_epoch": 1,
            "project": "demo",
            "name": "web-1",
            "generation": 1,
            "token": 1,
            "wanted": Wanted.RUNNING,
            "may_build": True,
            "restarts": 0,
            "grace_s": 10,
            "vcpus": 1,
            "memory_mib": 128,
            "disk_gib": 1,
            "image": self._image,
            "ssh_keys": (self._key.with_suffix(".pub").read_text().strip(),),
            "user_data_base64": None if user_data is None else base64.b64encode(user_data).decode(),
            "nic": Nic(mac=mac_for(vm_id), address=f"10.80.7.{last}", **NETWORK),
            "deadline_s": 60,
        }
        return DesiredVm(vm_id=vm_id, **(facts | more))

    async def build(self, vm: DesiredVm) -> None:
        for verb in build_verbs(self.driver).values():
            await verb(vm)
        await self.driver.mark(vm)

    async def boot(self, vm: DesiredVm) -> None:
        await self.build(vm)
        await self.wait_ready(vm)

    async def wait_ready(self, vm: DesiredVm) -> None:
        try:
            await eventually(lambda: self.driver.guest_ready(vm.vm_id), within_s=BOOT_S, what="the guest is up")
        except AssertionError:
            print((await self.driver.console_tail(vm.vm_id, 4000)).decode(errors="replace"))
            raise

    async def ssh(self, vm: DesiredVm, command: str) -> str:
        """Run a command in the guest. Its ssh server may come up a moment after it has said that it is ready."""
        domain = await self.driver.find(vm.vm_id)
        assert domain is not None
        assert domain.ssh is not None
        namespace = self._server.network_namespace
        through = ("ip", "netns", "exec", namespace) if namespace else ()
        options = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR"}
        options |= {"ConnectTimeout": "20", "BatchMode": "yes"}
        pairs = [f"-o{name}={value}" for name, value in options.items()]
        where = ("-i", self._key, "-p", str(domain.ssh.port), f"root@{domain.ssh.host}")
        deadline = time.monotonic() + 60
        while True:
            process = await asyncio.create_subprocess_exec(
                *through, "ssh", *pairs, *where, command, stdout=asyncio.subprocess.PIPE
            )
            output, _ = await process.communicate()
            if process.returncode != SSH_FAILED or time.monotonic() > deadline:
                break
        assert process.returncode == 0, f"ssh ended with {process.returncode}"
        return output.decode()

    async def power(self, vm: DesiredVm) -> Power | None:
        domain = await self.driver.find(vm.vm_id)
        return domain.power if domain else None

    async def why_off(self, vm: DesiredVm, *, within_s: float = 30) -> str | None:
        async def off() -> bool:
            return await self.power(vm) is Power.OFF

        await eventually(off, within_s=within_s, what="the guest is off")
        domain = await self.driver.find(vm.vm_id)
        assert domain is not None
        return domain.why_off.code if domain.why_off else None

    def qemu(self, vm: DesiredVm) -> psutil.Process:
        for pid in self._server.processes():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if str(vm.vm_id) in process.cmdline():
                    return process
        raise AssertionError("it has no QEMU")

    def virsh(self, *args: str) -> str:
        return virsh(self._server.uri, *args)

    def xml(self, vm: DesiredVm, *flags: str) -> ET.Element:
        return ET.fromstring(self.virsh("dumpxml", str(vm.vm_id), *flags))

    def dhcp_hosts(self) -> set[str]:
        """What the network's dnsmasq is told: MAC and address."""
        files = (self.settings.pool_dir / "dhcp" / "default").glob("*")
        return {path.read_text().strip().rpartition(",")[0] for path in files}


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that dnsmasq reaches, which is nobody."""
    directory = Path(tempfile.mkdtemp(prefix="leveret-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@asynccontextmanager
async def hosting(directory: Path, server: Libvirtd, image: Image, key: Path, **settings: Any) -> AsyncIterator[Host]:
    facts: dict[str, Any] = {
        "pool_dir": directory / "pool",
        "uri": server.uri,
        "virt_type": "qemu",
        "network_mode": "user",
        "ports": range(23500, 24000),
        "image_dirs": (Path(image.url.removeprefix("file://")).parent,),
        "disk_reserve_gib": 0,
    }
    host = Host(LibvirtSettings(**(facts | settings)), server, image, key)
    await host.driver.open(host.changes.append)
    try:
        yield host
    finally:
        with suppress(LeveretError):
            for vm_id in await host.driver.files():
                await host.driver.remove(vm_id)
        await host.driver.close()


@pytest.fixture
async def host(tmp_path: Path, libvirtd: Libvirtd, appliance: Image, key: Path) -> AsyncIterator[Host]:
    async with hosting(tmp_path, libvirtd, appliance, key) as host:
        yield host


@pytest.fixture
async def nat_host(open_directory: Path, apart: Libvirtd, appliance: Image, key: Path) -> AsyncIterator[Host]:
    async with hosting(open_directory, apart, appliance, key, network_mode="nat") as host:
        yield host
    with suppress(StackError):
        host.virsh("net-destroy", "leveret-default")


# A guest's life.


async def test_a_guest_in_user_mode_is_who_it_should_be_and_keeps_its_disk(host: Host) -> None:
    vm = host.vm(user_data=b"#!/bin/sh\necho made by user-data >/data/made\n")
    await host.boot(vm)

    told = await host.ssh(vm, "hostname; cat /run/leveret/instance-id; cat /data/made; echo kept >/data/kept; sync")
    assert told.split("\n")[:3] == ["web-1", str(vm.vm_id), "made by user-data"]

    await host.driver.stop(vm.vm_id, 60)
    assert await host.power(vm) is Power.OFF
    await host.driver.start(vm)
    await host.wait_ready(vm)
    assert await host.ssh(vm, "cat /data/kept") == "kept\n"

    host.changes.clear()
    await host.ssh(vm, "poweroff")
    assert await host.why_off(vm) is Code.GUEST_SHUTDOWN
    assert vm.vm_id in host.changes


async def test_a_guest_behind_nat_has_its_address_and_gateway_also_by_dhcp(nat_host: Host) -> None:
    former, vm = nat_host.vm(memory_mib=64), nat_host.vm()
    await nat_host.build(former)
    await nat_host.driver.remove(former.vm_id)
    await nat_host.boot(vm)  # at the same address, with another MAC

    domain = await nat_host.driver.find(vm.vm_id)
    assert domain is not None
    assert domain.ssh is not None
    assert (domain.ssh.host, domain.ssh.port) == ("10.80.7.9", 22)
    told = await nat_host.ssh(vm, "ip -4 -o addr show scope global; ip route; ping -c 1 -W 5 10.80.7.1")
    assert "10.80.7.9/24" in told
    assert "default via 10.80.7.1" in told
    leased = await nat_host.ssh(vm, "udhcpc -i eth0 -n -q -f -s /bin/true 2>&1")
    assert "lease of 10.80.7.9 obtained" in leased


def one_sector(directory: Path, *code: int) -> Image:
    """A disk image that is one boot sector: a guest that does one thing, and at once."""
    content = bytes(code).ljust(510, b"\0") + b"\x55\xaa"
    path = directory / "sector.raw"
    path.write_bytes(content)
    return Image(url=f"file://{path}", sha256=hashlib.sha256(content).hexdigest(), format="raw")


async def test_a_guest_that_panics_has_crashed(tmp_path: Path, libvirtd: Libvirtd, key: Path) -> None:
    panicking = one_sector(
        tmp_path,
        *(0xBA, 0x05, 0x05),  # mov dx, 0x505: where a kernel's pvpanic driver reports
        *(0xB0, 0x01),  # mov al, 1: panicked
        0xEE,  # out dx, al
        *(0xF4, 0xEB, 0xFD),  # hlt, again and again
    )
    async with hosting(tmp_path, libvirtd, panicking, key) as host:
        vm = host.vm(memory_mib=64)
        await host.build(vm)

        assert await host.why_off(vm) is Code.GUEST_CRASHED
        assert vm.vm_id in host.changes


async def test_a_talkative_guest_cannot_fill_the_disk(tmp_path: Path, libvirtd: Libvirtd, key: Path) -> None:
    talkative = one_sector(
        tmp_path,
        *(0xBA, 0xF8, 0x03),  # mov dx, 0x3f8: the serial port
        *(0xB0, 0x78),  # mov al, 'x'
        0xEE,  # out dx, al
        *(0xEB, 0xFD),  # and again
    )
    async with hosting(tmp_path, libvirtd, talkative, key) as host:
        vm = host.vm(memory_mib=64)
        await host.build(vm)
        directory = host.settings.pool_dir / str(vm.vm_id)
        most_bytes, rotations, last = 0, 0, 0

        async with asyncio.timeout(120):
            while rotations < 5:
                with suppress(FileNotFoundError):  # being rotated just now
                    most_bytes = max(most_bytes, sum(path.stat().st_size for path in directory.glob("console.log*")))
                    size_bytes = (directory / "console.log").stat().st_size
                    rotations, last = rotations + (size_bytes < last), size_bytes
                assert not await host.driver.guest_ready(vm.vm_id)
                await asyncio.sleep(0.01)

        assert most_bytes <= 3 * 1024 * 1024
        assert await host.driver.console_tail(vm.vm_id, 100_000) == b"x" * 100_000
        await host.driver.remove(vm.vm_id)
        assert not directory.exists()


@pytest.fixture
def small(open_directory: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    directory = open_directory / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "leveret-test", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
def beside(small: Path, tmp_path: Path) -> Iterator[Libvirtd]:
    """A libvirtd that was started after the small file system was mounted: it sees only what was there before."""
    assert small.is_mount()
    server = Libvirtd(tmp_path / "beside")
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.destroy()


async def test_a_guest_that_was_paused_by_a_full_disk_goes_on_when_there_is_room(
    small: Path, beside: Libvirtd, tmp_path: Path, key: Path
) -> None:
    writing = one_sector(
        tmp_path,
        *(0x31, 0xC0, 0x8E, 0xD8),  # xor ax, ax; mov ds, ax
        *(0xBE, 0x17, 0x7C),  # again: mov si, packet
        *(0xB4, 0x43, 0x30, 0xC0),  # mov ah, 0x43: extended write; xor al, al
        *(0xB2, 0x80, 0xCD, 0x13),  # mov dl, 0x80: the first disk; int 0x13
        *(0x66, 0x83, 0x06, 0x1F, 0x7C, 0x40),  # add dword [packet + 8], 64
        *(0xEB, 0xED),  # jmp again
        *(0x10, 0x00, 0x40, 0x00),  # packet, at 0x7c17: its size, 64 sectors
        *(0x00, 0x00, 0x00, 0x10),  # from 1000:0000
        *(0x00, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00),  # to sector 2048
    )
    limits = {"resume_every_s": 0.2, "resume_free_bytes": 16 * 1024 * 1024}
    ballast = small / "ballast"
    ballast.write_bytes(bytes(32 * 1024 * 1024))
    async with hosting(small, beside, writing, key, **limits) as host:
        vm = host.vm(memory_mib=64)
        await host.build(vm)
        disk = host.settings.pool_dir / str(vm.vm_id) / "disk.qcow2"

        def paused() -> bool:
            return "I/O error" in host.virsh("domstate", "--reason", str(vm.vm_id))

        await eventually(paused, within_s=60, what="the guest is paused")
        assert await host.power(vm) is Power.RUNNING
        assert vm.vm_id in host.changes
        full_bytes = disk.stat().st_size

        ballast.unlink()

        await eventually(lambda: disk.stat().st_size > full_bytes, within_s=60, what="the guest writes again")


# What the hypervisor keeps.


async def test_the_journal_stands_in_the_running_domain_and_in_its_definition(host: Host) -> None:
    vm = host.vm(generation=7, restarts=2)
    await host.build(vm)

    for flags in ((), ("--inactive",)):
        element = host.xml(vm, *flags).find("metadata/{urn:leveret:domain:1}vm")
        assert element is not None
        assert (element.get("generation"), element.get("restarts"), element.get("name")) == ("7", "2", "web-1")
        assert element.find("{urn:leveret:domain:1}nic") is not None


async def test_what_was_marked_outlives_a_sigkill_of_libvirtd(host: Host, libvirtd: Libvirtd) -> None:
    vm = host.vm(generation=3)
    await host.build(vm)
    before = await host.driver.find(vm.vm_id)
    host.changes.clear()

    libvirtd.kill()
    libvirtd.start()
    libvirtd.wait_ready()

    await eventually(lambda: None in host.changes, within_s=20, what="the return is told")
    assert await host.driver.find(vm.vm_id) == before
    host.virsh("dommemstat", str(vm.vm_id))  # waits until libvirtd has its guest in hand again
    host.changes.clear()
    host.qemu(vm).kill()
    await eventually(lambda: vm.vm_id in host.changes, what="events come again")
    assert await host.why_off(vm) is Code.GUEST_CRASHED


async def test_a_guest_that_died_while_libvirtd_was_away_is_found_dead(host: Host, libvirtd: Libvirtd) -> None:
    vm = host.vm()
    await host.build(vm)
    qemu = host.qemu(vm)
    libvirtd.kill()
    qemu.kill()
    libvirtd.start()
    libvirtd.wait_ready()

    await eventually(lambda: None in host.changes[1:], within_s=20)
    assert await host.why_off(vm) is Code.GUEST_CRASHED


async def test_what_libvirt_tells_nobody_is_looked_for(
    tmp_path: Path, libvirtd: Libvirtd, appliance: Image, key: Path
) -> None:
    async with hosting(tmp_path, libvirtd, appliance, key, look_again_s=0.3) as host:
        for _ in range(3):
            host.changes.clear()
            await eventually(lambda: None in host.changes, what="anything may have changed")


async def test_defining_again_keeps_the_journal_of_a_vm_that_has_run(host: Host) -> None:
    vm = host.vm(generation=3)
    await host.build(vm)
    before = host.xml(vm, "--inactive")

    await host.driver.define(vm.model_copy(update={"generation": 4, "memory_mib": 256}))

    assert ET.tostring(host.xml(vm, "--inactive")) == ET.tostring(before)
    domain = await host.driver.find(vm.vm_id)
    assert domain is not None
    assert domain.journal.generation == 3


async def test_a_hand_made_copy_of_a_domain_is_foreign(host: Host) -> None:
    vm = host.vm()
    await host.build(vm)
    copy = host.xml(vm, "--inactive")
    other = new_id()
    for tag, text in (("uuid", str(other)), ("name", f"copy-{other}")):
        element = copy.find(tag)
        assert element is not None
        element.text = text
    path = host.settings.pool_dir / "copy.xml"
    path.write_text(ET.tostring(copy, encoding="unicode"))
    host.virsh("define", str(path))
    try:
        inventory = await host.driver.inventory()
        assert [domain.journal.vm_id for domain in inventory.domains] == [vm.vm_id]
        assert inventory.foreign == 1
    finally:
        host.virsh("undefine", str(other))


async def test_a_domain_that_was_undefined_while_it_runs_is_still_ours_and_can_be_removed(host: Host) -> None:
    vm = host.vm()
    await host.build(vm)
    host.virsh("undefine", str(vm.vm_id))

    domain = await host.driver.find(vm.vm_id)
    assert domain is not None
    assert domain.power is Power.RUNNING
    await host.driver.mark(vm.model_copy(update={"generation": 2}))
    domain = await host.driver.find(vm.vm_id)
    assert domain is not None
    assert domain.journal.generation == 2

    await host.driver.remove(vm.vm_id)
    assert await host.driver.find(vm.vm_id) is None
    assert await host.driver.files() == frozenset()


async def test_a_domain_that_was_removed_by_hand_leaves_only_files_that_remove_takes(nat_host: Host) -> None:
    vm = nat_host.vm()
    await nat_host.build(vm)
    nat_host.virsh("destroy", str(vm.vm_id))
    nat_host.virsh("undefine", str(vm.vm_id))
    assert vm.nic is not None
    assert nat_host.dhcp_hosts() == {f"{vm.nic.mac},10.80.7.9"}

    await nat_host.driver.remove(vm.vm_id)

    assert await nat_host.driver.files() == frozenset()
    assert nat_host.dhcp_hosts() == set()


async def test_a_saved_image_of_a_domain_does_not_keep_it_from_being_removed(host: Host) -> None:
    vm = host.vm()
    await host.build(vm)
    host.virsh("managedsave", str(vm.vm_id))

    await host.driver.remove(vm.vm_id)

    assert await host.driver.find(vm.vm_id) is None


# Networks.


async def test_dhcp_entries_come_and_go_with_their_vms(nat_host: Host) -> None:
    vms = [nat_host.vm(last=last, memory_mib=64) for last in (20, 21)]
    entries = {f"{vm.nic.mac},{vm.nic.address}" for vm in vms if vm.nic}
    for vm in vms:
        for verb in list(build_verbs(nat_host.driver).values())[:-1]:
            await verb(vm)
    assert nat_host.dhcp_hosts() == entries
    for vm in vms:
        await nat_host.driver.define(vm)
    assert nat_host.dhcp_hosts() == entries

    for vm in vms:
        await nat_host.driver.remove(vm.vm_id)

    assert nat_host.dhcp_hosts() == set()


async def test_a_network_that_was_stopped_is_started_again_with_the_guest(nat_host: Host) -> None:
    vm = nat_host.vm(memory_mib=64)
    await nat_host.build(vm)
    await nat_host.driver.stop(vm.vm_id, 0)
    nat_host.virsh("net-destroy", "leveret-default")

    await nat_host.driver.start(vm)

    assert await nat_host.power(vm) is Power.RUNNING


async def test_a_network_of_another_shape_is_changed_only_while_nothing_can_hang_on_it(nat_host: Host) -> None:
    vm = nat_host.vm(memory_mib=64)
    for verb in list(build_verbs(nat_host.driver).values())[:-1]:
        await verb(vm)
    nic = Nic(network="default", mac=mac_for(new_id()), address="10.81.0.9", prefix=16, gateway="10.81.0.1")
    other = nat_host.vm(nic=nic, memory_mib=64)

    with pytest.raises(LeveretError, match=r"10\.80\.7\.1/24") as caught:
        await nat_host.driver.define(other)
    assert caught.value.problem.code is Code.NETWORK_FAILED

    nat_host.virsh("net-destroy", "leveret-default")
    for verb in build_verbs(nat_host.driver).values():
        await verb(other)
    assert "10.81.0.1" in nat_host.virsh("net-dumpxml", "leveret-default")


async def test_auto_uses_nat_where_it_works_and_user_mode_where_it_does_not(
    tmp_path: Path, apart: Libvirtd, appliance: Image, key: Path
) -> None:
    async with hosting(tmp_path, apart, appliance, key, network_mode="auto") as host:
        vm = host.vm(memory_mib=64)
        for verb in list(build_verbs(host.driver).values())[:-1]:
            await verb(vm)
        # The same addresses as the first network has: libvirt refuses to start it.
        impossible = host.vm(nic=Nic(mac=mac_for(new_id()), address="10.80.7.9", **(NETWORK | {"network": "twin"})))
        async with hosting(tmp_path / "twin", apart, appliance, key, network_mode="auto") as twin:
            for verb in list(build_verbs(twin.driver).values())[:-1]:
                await verb(impossible)
            domains = {d.journal.vm_id: d for d in (await host.driver.inventory()).domains}

            nat, user = domains[vm.vm_id].ssh, domains[impossible.vm_id].ssh
            assert nat is not None
            assert user is not None
            assert (nat.host, nat.port) == ("10.80.7.9", 22)
            assert user.host == "127.0.0.1"
        host.virsh("net-undefine", "leveret-twin")
        host.virsh("net-destroy", "leveret-default")


async def test_a_port_that_was_taken_meanwhile_is_exchanged(host: Host) -> None:
    vm = host.vm(memory_mib=64)
    for verb in list(build_verbs(host.driver).values())[:-1]:
        await verb(vm)
    domain = await host.driver.find(vm.vm_id)
    assert domain is not None
    assert domain.ssh is not None
    port = domain.ssh.port

    with socket.create_server(("127.0.0.1", port)):
        await host.driver.start(vm)

        domain = await host.driver.find(vm.vm_id)
        assert domain is not None
        assert domain.power is Power.RUNNING
        assert domain.ssh is not None
        assert domain.ssh.port != port
        assert {connection.laddr.port for connection in host.qemu(vm).net_connections()} == {domain.ssh.port}


async def test_vms_get_ports_of_their_own(host: Host) -> None:
    vms = [host.vm(memory_mib=64, vm_id=UUID(int=(n << 64) * 500 + 7)) for n in range(1, 4)]
    for vm in vms:
        await host.build(vm)

    domains = (await host.driver.inventory()).domains
    assert len({domain.ssh.port for domain in domains if domain.ssh}) == len(vms)


async def test_a_vm_without_an_interface_runs(host: Host) -> None:
    vm = host.vm(nic=None, memory_mib=64)
    await host.build(vm)

    domain = await host.driver.find(vm.vm_id)
    assert domain is not None
    assert (domain.power, domain.ssh) == (Power.RUNNING, None)


# Hangs.


async def test_a_hanging_libvirtd_fails_calls_in_time_and_blocks_nothing(
    tmp_path: Path, libvirtd: Libvirtd, appliance: Image, key: Path
) -> None:
    limits = {"call_timeout_s": 1.0, "keepalive_interval_s": 1, "keepalive_count": 2}
    async with hosting(tmp_path, libvirtd, appliance, key, **limits) as host:
        vm = host.vm(memory_mib=64)
        await host.build(vm)
        await eventually(lambda: threading.active_count() <= IDLE_THREADS, what="everything is at rest")
        assert libvirtd.pid is not None
        os.kill(libvirtd.pid, signal.SIGSTOP)
        try:
            finding = asyncio.gather(*(host.driver.find(vm.vm_id) for _ in range(20)), return_exceptions=True)
            assert await longest_pause_during(finding) < 0.5
            assert all(isinstance(result, LeveretError) for result in await finding)
            codes = {await refused(host.driver.inventory()) for _ in range(50)}
            assert codes <= {Code.HYPERVISOR_TIMEOUT, Code.HYPERVISOR_UNAVAILABLE}
            assert len(await host.driver.files()) == 1
            assert threading.active_count() <= IDLE_THREADS + host.settings.calls_at_once + 2
        finally:
            host.changes.clear()
            os.kill(libvirtd.pid, signal.SIGCONT)
        await eventually(lambda: None in host.changes, within_s=20, what="the return is told")
        assert await host.power(vm) is Power.RUNNING
        await eventually(lambda: threading.active_count() <= IDLE_THREADS, within_s=20, what="threads are free again")
        host.changes.clear()
        host.qemu(vm).kill()
        await eventually(lambda: vm.vm_id in host.changes, what="events come again")


async def test_an_error_that_is_kept_keeps_no_domain_and_so_no_connection(host: Host) -> None:
    """libvirt closes a connection when the last of its domains is dropped: that must not be on the event loop."""
    vm = host.vm(memory_mib=64)
    await host.build(vm)
    domains = []

    def fail_with_a_domain_in_hand(door: Door) -> None:
        domain = door._domain(vm.vm_id)
        domains.append(weakref.ref(domain))
        raise NoDomainError(str(domain))

    gc.disable()
    try:
        with pytest.raises(LeveretError) as caught:
            await host.driver._connection.call(fail_with_a_domain_in_hand)
        assert caught.value.__cause__ is not None
        assert [domain() for domain in domains] == [None]
    finally:
        gc.enable()


async def test_a_connection_that_the_keepalive_ended_frees_the_calls_on_it(
    tmp_path: Path, libvirtd: Libvirtd, appliance: Image, key: Path
) -> None:
    """With several calls on one connection libvirt's client leaves threads behind, or crashes: each has its own."""
    limits = {"call_timeout_s": 30.0, "keepalive_interval_s": 1, "keepalive_count": 2}
    async with hosting(tmp_path, libvirtd, appliance, key, **limits) as host:
        nobody = new_id()
        everybody = threading.Barrier(host.settings.calls_at_once)

        def wait_for_the_others(_door: object) -> None:
            everybody.wait(10)

        together = (host.driver._connection.call(wait_for_the_others) for _ in range(host.settings.calls_at_once))
        await asyncio.gather(*together)  # so that there are as many connections
        assert libvirtd.pid is not None
        os.kill(libvirtd.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(20):
                results = await asyncio.gather(*(host.driver.find(nobody) for _ in range(8)), return_exceptions=True)
            assert all(isinstance(result, LeveretError) for result in results)
        finally:
            os.kill(libvirtd.pid, signal.SIGCONT)

        async def works() -> bool:
            with suppress(LeveretError):
                return await host.driver.find(nobody) is None
            return False

        await eventually(works, within_s=20, what="it works again")


async def test_a_guest_that_was_being_started_when_libvirtd_was_killed_can_be_started_again(
    host: Host, libvirtd: Libvirtd
) -> None:
    vm = host.vm(memory_mib=64)
    await host.build(vm)
    status = libvirtd.directory.path / "run" / "qemu" / f"{host.virsh('domname', str(vm.vm_id)).strip()}.xml"
    qemu = host.qemu(vm)
    libvirtd.kill()
    qemu.kill()
    # What libvirt writes just before it makes the process.
    begun, count = re.subn(
        r"state='running' reason='\w+' pid='\d+'", "state='paused' reason='starting up' pid='0'", status.read_text()
    )
    assert count == 1
    status.write_text(begun)
    libvirtd.start()
    await asyncio.to_thread(libvirtd.wait_ready)

    async def is_off() -> bool:
        with suppress(LeveretError):
            return await host.power(vm) is Power.OFF
        return False

    await eventually(is_off, within_s=30, what="the guest is off")
    await host.driver.start(vm)
    await host.driver.mark(vm.model_copy(update={"generation": 2}))
    assert await host.power(vm) is Power.RUNNING


async def longest_pause_during(work: "asyncio.Future[Any]") -> float:
    """The longest time that the loop did not come round while this was under way."""
    longest_s, last = 0.0, time.monotonic()
    while not work.done():
        await asyncio.sleep(0.01)
        now = time.monotonic()
        longest_s, last = max(longest_s, now - last), now
    return longest_s


async def refused(work: Awaitable[object]) -> str:
    with pytest.raises(LeveretError) as caught:
        await work
    return caught.value.problem.code


async def test_a_guest_whose_qemu_hangs_is_stopped_all_the_same_and_holds_up_nobody(
    tmp_path: Path, libvirtd: Libvirtd, appliance: Image, key: Path
) -> None:
    async with hosting(tmp_path, libvirtd, appliance, key, button_timeout_s=1.0) as host:
        hanging, other = host.vm(memory_mib=64), host.vm(memory_mib=64, last=10)
        await host.build(hanging)
        host.qemu(hanging).suspend()

        stopping = asyncio.create_task(host.driver.stop(hanging.vm_id, 60))
        await host.build(other)
        assert await host.power(other) is Power.RUNNING
        await stopping

        assert await host.power(hanging) is Power.OFF
        assert await host.power(other) is Power.RUNNING


async def test_a_guest_whose_qemu_hangs_can_be_reset(
    tmp_path: Path, libvirtd: Libvirtd, appliance: Image, key: Path
) -> None:
    async with hosting(tmp_path, libvirtd, appliance, key, button_timeout_s=1.0) as host:
        vm = host.vm(memory_mib=64)
        await host.build(vm)
        qemu = host.qemu(vm)
        qemu.suspend()

        await host.driver.reset(vm.vm_id)

        assert await host.power(vm) is Power.RUNNING
        assert host.qemu(vm).pid != qemu.pid


async def test_a_guest_whose_qemu_hangs_can_be_removed(host: Host) -> None:
    vm = host.vm(memory_mib=64)
    await host.build(vm)
    host.qemu(vm).suspend()

    await host.driver.remove(vm.vm_id)

    assert await host.driver.find(vm.vm_id) is None
    assert await host.driver.files() == frozenset()


async def test_a_guest_that_ignores_the_button_is_switched_off_after_its_grace(host: Host) -> None:
    vm = host.vm(memory_mib=64)
    await host.build(vm)
    began = time.monotonic()

    await host.driver.stop(vm.vm_id, 2)

    assert time.monotonic() - began >= 2
    assert await host.power(vm) is Power.OFF


async def test_waiting_for_a_guest_to_shut_down_can_be_broken_off(host: Host) -> None:
    vm = host.vm(memory_mib=64)
    await host.build(vm)
    stopping = asyncio.create_task(host.driver.stop(vm.vm_id, 600))
    await asyncio.sleep(0.2)
    stopping.cancel()

    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await host.power(vm) is Power.RUNNING


# Trouble while building.


async def test_files_and_their_modes(host: Host) -> None:
    vm = host.vm(user_data=b"secret")
    await host.build(vm)

    directory = host.settings.pool_dir / str(vm.vm_id)
    modes = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert modes["config.iso"] == modes["disk.qcow2"] == 0o600
    assert modes["console.log"] & 0o077 == 0
    assert set(modes) <= {"config.iso", "disk.qcow2", "console.log", "console.mark"}
    assert directory.stat().st_mode & 0o777 == 0o711


async def test_an_existing_disk_is_kept_and_an_unfinished_one_made_anew(host: Host) -> None:
    vm = host.vm()
    disk = host.settings.pool_dir / str(vm.vm_id) / "disk.qcow2"
    await host.driver.make_disk(vm)
    disk.with_name("disk.qcow2.tmp").write_bytes(b"unfinished")
    identity = disk.stat().st_ino
    await host.driver.make_disk(vm)
    assert disk.stat().st_ino == identity

    disk.unlink()
    await host.driver.make_disk(vm)

    assert [path.name for path in disk.parent.iterdir()] == ["disk.qcow2"]


async def test_the_reserve_is_not_touched_by_new_disks(
    tmp_path: Path, libvirtd: Libvirtd, appliance: Image, key: Path
) -> None:
    async with hosting(tmp_path, libvirtd, appliance, key) as host:
        vm = host.vm()
        await host.driver.fetch_image(vm)
        greedy = LibvirtDriver(replace(host.settings, disk_reserve_gib=10**9))

        assert await refused(greedy.make_disk(vm)) is Code.DISK_FULL


@pytest.mark.parametrize("mac", ["0a:00:00:00:00:01,romfile=/etc/passwd", "", "x"])
async def test_what_libvirt_cannot_have_is_refused_with_the_reason(host: Host, mac: str) -> None:
    vm = host.vm(nic=Nic(mac=mac, address="10.80.7.9", **NETWORK))

    assert await refused(host.driver.define(vm)) is Code.DEFINE_FAILED


# The host itself.


async def test_the_tiny_guest_of_the_kvm_probe_runs(tmp_path: Path) -> None:
    found = await kvm_probe.run_guest("tcg", timeout_s=30)

    assert found.usable, found.reason


async def test_a_probe_that_hangs_is_killed_and_means_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = tmp_path / "qemu"
    hanging.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 600\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(kvm_probe, "EMULATOR", str(hanging))

    found = await kvm_probe.run_guest("kvm", timeout_s=0.5)

    assert not found.usable
    assert "hangs" in found.reason
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_a_probe_whose_guest_did_something_else_means_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm_probe, "EMULATOR", "true")

    assert not (await kvm_probe.run_guest("kvm")).usable


async def test_the_finding_is_remembered_for_one_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [kvm_probe.Finding(usable=False, reason="first"), kvm_probe.Finding(usable=True, reason="second")]

    async def probe() -> kvm_probe.Finding:
        return findings.pop(0)

    monkeypatch.setattr(kvm_probe, "probe", probe)

    assert (await kvm_probe.find_out(tmp_path, "boot 1")).reason == "first"
    assert (await kvm_probe.find_out(tmp_path, "boot 1")).reason == "first"
    assert (await kvm_probe.find_out(tmp_path, "boot 2")).reason == "second"
    (tmp_path / "kvm-probe.json").write_text("{")
    findings.append(kvm_probe.Finding(usable=False, reason="third"))
    assert (await kvm_probe.find_out(tmp_path, "boot 2")).reason == "third"
