"""What this host's hypervisor can run: how guests are accelerated, on what machine, by which emulator."""

import asyncio
from typing import Literal
from xml.etree import ElementTree as ET

import structlog

from leveret.compute.libvirt_driver import kvm_probe
from leveret.compute.libvirt_driver.connection import Connection
from leveret.compute.libvirt_driver.domain_xml import Offer
from leveret.compute.libvirt_driver.door import Door
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, fail

log = structlog.get_logger()

VirtType = Literal["kvm", "qemu"]

#: The machines to ask for, best first.
MACHINES = {"x86_64": ("q35", "pc"), "aarch64": ("virt",)}


class Machine:
    """Knows the host's offer, once it has asked for it."""

    def __init__(self, connection: Connection, settings: LibvirtSettings, boot_id: str) -> None:
        self._connection = connection
        self._settings = settings
        self._boot_id = boot_id
        self._wanted: VirtType | None = None if settings.virt_type == "auto" else settings.virt_type
        self._offer: Offer | None = None
        self._asking = asyncio.Lock()

    @property
    def virt_type(self) -> VirtType:
        """What guests get; `qemu` until it is known."""
        return self._offer.virt_type if self._offer is not None else self._wanted or "qemu"

    async def probe(self) -> None:
        """Find out about KVM when that is left to us. Needs no libvirt."""
        if self._wanted is None:
            finding = await kvm_probe.find_out(self._settings.pool_dir, self._boot_id)
            log.info("kvm.probed", usable=finding.usable, reason=finding.reason)
            self._wanted = "kvm" if finding.usable else "qemu"

    async def offer(self) -> Offer:
        """What libvirt will run. Raises `define_failed` when it is not what the settings want.

        libvirt examines every emulator the first time it is asked, which takes seconds.
        """
        async with self._asking:
            if self._offer is None:
                await self.probe()
                self._offer = await self._connection.run(
                    self._ask,
                    code=Code.DEFINE_FAILED,
                    doing="asking what machines there are",
                    timeout_s=self._settings.start_timeout_s,
                )
                log.info("machine.offered", virt_type=self._offer.virt_type, machine=self._offer.machine)
            return self._offer

    def _ask(self, door: Door) -> Offer:
        arch = door.node().arch
        wanted = self._wanted or "qemu"
        tries: tuple[VirtType, ...] = (wanted,)
        if wanted == "kvm" and self._settings.virt_type == "auto":
            tries = ("kvm", "qemu")  # libvirt may be kept from a /dev/kvm that we can use
        for virt_type in tries:
            for machine in MACHINES.get(arch, ()):
                xml = door.domain_capabilities(arch, machine, virt_type)
                if xml is not None and (emulator := ET.fromstring(xml).findtext("path")):  # noqa: S314
                    return Offer(virt_type, arch, machine, emulator, self._settings.emulated_cpu)
        raise fail(Code.DEFINE_FAILED, f"libvirt has no machine for {wanted} guests on {arch}.")
