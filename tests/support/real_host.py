"""The real host below an installation: guests that do as they are told, and what it has of them, whoever says what."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from installation import Installation, installed
from invariants import broken_in, checked
from peers import eventually

from leveret.shared.checks import CheckReport
from leveret.shared.documents import CreateVm, ImageByName, VmView
from leveret.shared.lifecycle import State
from leveret.stack.layout import Options
from leveret.stack.libvirtd import Libvirtd, virsh

#: A disk of one sector. Its guest writes B to the serial port, then a dot with each tick of its clock (18 a second).
#: It does what it is told over the same port, after an echo: o switches it off, p lets it panic, w writes 32 KiB to
#: its disk.
OBEDIENT = (
    bytes(
        (
            *(0x31, 0xC0, 0x8E, 0xD8),  # xor ax, ax; mov ds, ax
            *(0xBA, 0xF8, 0x03, 0xB0, 0x42, 0xEE),  # mov dx, 0x3f8: the serial port; mov al, 'B'; out dx, al
            *(0xFB, 0xF4),  # sti; tick: hlt
            *(0xBA, 0xF8, 0x03, 0xB0, 0x2E, 0xEE),  # mov dx, 0x3f8; mov al, '.'; out dx, al
            *(0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x01, 0x74, 0xF1),  # mov dx, 0x3fd; in al, dx; test al, 1; jz tick
            *(0xBA, 0xF8, 0x03, 0xEC, 0xEE),  # mov dx, 0x3f8; in al, dx; out dx, al
            *(0x3C, 0x6F, 0x74, 0x10),  # cmp al, 'o'; je off
            *(0x3C, 0x77, 0x74, 0x14),  # cmp al, 'w'; je write
            *(0x3C, 0x70, 0x75, 0xE0),  # cmp al, 'p'; jne tick
            *(
                0xBA,
                0x05,
                0x05,
                0xB0,
                0x01,
                0xEE,
                0xEB,
                0xD8,
            ),  # mov dx, 0x505: a kernel's pvpanic; mov al, 1; out; jmp tick
            *(
                0xBA,
                0x04,
                0x06,
                0xB8,
                0x00,
                0x20,
                0xEF,
                0xF4,
            ),  # off: mov dx, 0x604: ACPI; mov ax, 0x2000; out dx, ax; hlt
            *(
                0xBE,
                0x4E,
                0x7C,
                0xB4,
                0x43,
                0x30,
                0xC0,
                0xB2,
                0x80,
            ),  # write: mov si, packet; mov ax, 0x4300; mov dl, 0x80
            *(0xCD, 0x13),  # int 0x13: extended write to the first disk
            *(0x66, 0x83, 0x06, 0x56, 0x7C, 0x40, 0xEB, 0xBD),  # add dword [packet + 8], 64; jmp tick
            *(0x10, 0x00, 0x40, 0x00, 0x00, 0x00, 0x00, 0x10),  # packet: its size, 64 sectors, from 1000:0000
            *(0x00, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00),  # to sector 2048
        )
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)


class RealHost:
    """The machine that an installation's real host runs on: what is there, and what can happen to it."""

    def __init__(self, house: Installation, pool: Path) -> None:
        self.house = house
        self.pool = pool
        #: Where it stands what is to go wrong in the worker.
        self.faults = house.layout.root / "faults"
        self.faults.mkdir()
        self.libvirtd = Libvirtd(house.layout.libvirt)

    # What is there.

    def domains(self) -> dict[UUID, str]:
        """Every domain of the hypervisor, `running` or `stopped`."""
        running = self._list()
        return {vm_id: "running" if vm_id in running else "stopped" for vm_id in self._list("--all")}

    def _list(self, *options: str) -> set[UUID]:
        return {UUID(line) for line in virsh(self.libvirtd.uri, "list", "--uuid", *options).split()}

    def files(self) -> set[str]:
        """What the pool holds beside images."""
        return {path.name for path in self.pool.iterdir() if path.name not in {"images", "dhcp", "lost+found"}}

    def qemu(self, vm_id: UUID) -> psutil.Process:
        """The guest's process; fails when it has none."""
        found = self._qemus(vm_id)
        assert len(found) == 1, f"{len(found)} QEMUs of {vm_id}"
        return found[0]

    def _qemus(self, vm_id: UUID) -> list[psutil.Process]:
        found = []
        for pid in self.libvirtd.processes():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if str(vm_id) in process.cmdline():
                    found.append(process)
        return found

    def boots(self, vm_id: UUID) -> int:
        """How often the guest has booted, ever, as its console says."""
        return self.console(vm_id).count(b"B")

    def ticks(self, vm_id: UUID) -> int:
        """How long the guest has been up in all its boots, in eighteenths of a second."""
        return self.console(vm_id).count(b".")

    def console(self, vm_id: UUID) -> bytes:
        return (self.pool / str(vm_id) / "console.log").read_bytes()

    # What can happen.

    def terminal(self, vm_id: UUID) -> Path:
        """Where the guest is told what to do, also while libvirtd is away."""
        return Path(virsh(self.libvirtd.uri, "ttyconsole", str(vm_id)).strip())

    def pull_the_plugs(self) -> None:
        """Every guest ends at once."""
        for pid in self.libvirtd.processes():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.name().startswith("qemu-system"):
                    process.kill()

    def freeze_libvirtd(self) -> None:
        assert self.libvirtd.pid is not None
        os.kill(self.libvirtd.pid, signal.SIGSTOP)

    def thaw_libvirtd(self) -> None:
        assert self.libvirtd.pid is not None
        os.kill(self.libvirtd.pid, signal.SIGCONT)

    def power_cut(self) -> None:
        """Everything on the host ends at once, and what its kernel kept in memory is gone."""
        self.house.kill("compute")
        for pid in self.libvirtd.processes():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        shutil.rmtree(self.house.layout.libvirt / "run")

    def boot(self) -> None:
        """The host comes up again, with another boot id; does not wait for its worker."""
        boot_id = self.house.layout.root / "boot_id"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        self.libvirtd.start()
        self.libvirtd.wait_ready()
        service, module = self.house.services["compute"], "leveret.compute.app"
        argv = ("other_boot", str(boot_id), module)
        env = {**service.env, "PYTHONPATH": str(Path(__file__).parent)}
        self.house.services["compute"] = replace(service, argv=argv, env=env)
        self.house.restart("compute")

    # What should be.

    async def heard_of(self) -> Any:
        """The host's row."""
        rows = await self.house.query("SELECT * FROM hosts WHERE virt_type <> 'simulated'")
        assert len(rows) == 1
        return rows[0]

    async def longest_silence_s(self, *, beats: int) -> float:
        """The longest time between heartbeats, while so many come."""
        last, longest_s = (await self.heard_of())["heartbeat_at"], 0.0

        async def another() -> Any:
            at = (await self.heard_of())["heartbeat_at"]
            return at if at > last else None

        for _ in range(beats):
            earlier, last = last, await eventually(another, within_s=30, what="another heartbeat")
            longest_s = max(longest_s, (last - earlier).total_seconds())
        return longest_s

    async def trouble(self) -> str | None:
        """The code of what the host says is wrong with it."""
        problem = (await self.heard_of())["problem"]
        return None if problem is None else str(json.loads(problem)["code"])

    async def is_well(self) -> bool:
        return await self.trouble() is None

    async def all_are(self, state: State, *ids: UUID, within_s: float = 60.0) -> list[VmView]:
        """These VMs, once each is in this state and nothing is to do for it any more."""

        async def there() -> bool:
            rows = await self.house.query(
                "SELECT FROM vms WHERE id = ANY($1) AND state = $2 AND deadline IS NULL", list(ids), state
            )
            return len(rows) == len(ids)

        await eventually(there, within_s=within_s, what=f"{len(ids)} VMs {state}")
        async with self.house.client() as client:
            return [await client.get(vm_id) for vm_id in ids]

    async def agrees(self, *, broken: set[str] = frozenset(), within_s: float = 60.0) -> CheckReport:  # type: ignore[assignment]
        """Everything is at rest, every rule was looked at and no other than these is broken."""
        await self.house.settle(within_s=within_s)
        async with self.house.client() as client:
            report = await checked(client)
        assert broken_in(report).keys() == broken, report
        return report


def tell(terminal: Path, key: str) -> None:
    """Press a key, and see it come back. QEMU looks once a second whether anybody has a terminal open."""
    fd = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(fd, key.encode())
        deadline = time.monotonic() + 60
        while key.encode() not in os.read(fd, 4096):
            assert time.monotonic() < deadline, "the guest does not listen"
    finally:
        os.close(fd)


@contextmanager
def real_house(
    directory: Path, settings: Mapping[str, str] | None = None, *, pool: Path | None = None, fake_hosts: int = 0
) -> Iterator[RealHost]:
    """An installation with one real host and the image `obedient`; the settings are those of its worker."""
    image = directory / "obedient.raw"
    image.write_bytes(OBEDIENT)
    options = Options(conductors=1, libvirt=True, virt_type="qemu", fake_hosts=fake_hosts, image_dir=str(directory))
    with installed(options) as house:
        asyncio.run(
            house.query(
                "INSERT INTO images VALUES ('obedient', $1, $2, 'raw')",
                image.as_uri(),
                hashlib.sha256(OBEDIENT).hexdigest(),
            )
        )
        host = RealHost(house, pool or house.layout.pool)
        usual = {"LEVERET_NETWORK_MODE": "user", "LEVERET_HEARTBEAT_S": "1", "LEVERET_POOL_DIR": str(host.pool)}
        usual["LEVERET_FAULTS"] = str(host.faults)
        house.reconfigure("compute", **(usual | dict(settings or {})))
        house.reconfigure("conductor-1", LEVERET_CHECK_CONFIRM_S="1")
        house.wait_ready()
        try:
            yield host
        finally:
            host.pull_the_plugs()


def guest(name: str | None = None, **more: Any) -> CreateVm:
    """The smallest guest that does as it is told."""
    return CreateVm(name=name, vcpus=1, memory_mib=64, disk_gib=1, image=ImageByName(name="obedient"), **more)
