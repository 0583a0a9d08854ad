"""Makes a domain of a wish, and starts it: the two places where a wish, the network and libvirt's XML meet."""

import asyncio
from typing import Any
from uuid import UUID

from leveret.compute.driver import Journal
from leveret.compute.libvirt_driver import domain_xml, network, seeing
from leveret.compute.libvirt_driver.connection import Connection
from leveret.compute.libvirt_driver.door import Door
from leveret.compute.libvirt_driver.journal import Attachment, Memory, NetworkMode
from leveret.compute.libvirt_driver.machine import Machine
from leveret.compute.libvirt_driver.network import Networks
from leveret.compute.libvirt_driver.paths import Pool
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.messages import DesiredVm

START_ATTEMPTS = 5
_PORT_TAKEN = "Could not set up host forwarding rule"


def journal_of(vm: DesiredVm, *, generation: int, boot_id: str) -> Journal:
    return Journal(vm.vm_id, vm.project, vm.name, vm.token, generation, vm.wanted, vm.restarts, boot_id)


class Definition:
    """Defines and starts domains."""

    def __init__(
        self,
        connection: Connection,
        machine: Machine,
        networks: Networks,
        pool: Pool,
        settings: LibvirtSettings,
        boot_id: str,
    ) -> None:
        self._connection = connection
        self._machine = machine
        self._networks = networks
        self._pool = pool
        self._settings = settings
        self._boot_id = boot_id
        self._validated: set[NetworkMode | None] = set()

    async def define(self, vm: DesiredVm) -> None:
        """The domain exists; one that has run keeps its journal and its definition."""
        seen = await self._connection.call(Door.see, vm.vm_id)
        known = None if seen is None else seeing.memory_of(seen)
        if seen is not None and known is None:
            raise fail(
                Code.DEFINE_FAILED,
                f"The host has a domain {vm.vm_id} that is not Leveret's.",
                hint="Rename or remove that domain by hand.",
            )
        if known is None or not known.journal.generation:
            attachment = await self._attachment(vm, known.attachment if known else None)
            journal = journal_of(vm, generation=0, boot_id=self._boot_id)
            known = Memory(journal, attachment)
            await self._define(_build(await self._spec(vm, known)), attachment.mode if attachment else None)
        if (nic := known.attachment) is not None and nic.mode == "nat":
            await self._networks.add_host(vm.vm_id, nic)

    async def _define(self, xml: str, mode: NetworkMode | None) -> None:
        """Define a domain; the first one of each shape is validated, the others have the same elements."""
        validate = mode not in self._validated
        await self._connection.run(
            lambda door: door.define(xml, validate=validate), code=Code.DEFINE_FAILED, doing="defining the domain"
        )
        self._validated.add(mode)

    async def start(self, vm_id: UUID, memory: Memory) -> None:
        """The domain runs. A network that is down is started; a port that is taken is exchanged for another."""
        nic = memory.attachment
        if nic is not None and nic.mode == "nat":
            await self._networks.start(nic.network)
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                await self._connection.run(
                    lambda door: door.start(vm_id),
                    code=Code.START_FAILED,
                    doing="starting the domain",
                    timeout_s=self._settings.start_timeout_s,
                )
            except LeveretError as error:
                if _PORT_TAKEN not in error.problem.message or attempt == START_ATTEMPTS:
                    raise
                memory = await self._exchange_port(vm_id, memory)
            else:
                return

    async def _attachment(self, vm: DesiredVm, former: Attachment | None) -> Attachment | None:
        if (nic := vm.nic) is None:
            return None
        mode = former.mode if former is not None else await self._networks.mode_for(nic)
        if mode == "nat":
            await self._networks.ensure(nic)
            return Attachment("nat", nic.network, nic.mac, nic.address)
        port = former.port if former is not None else None
        if port is None:
            port = await self._free_port(vm.vm_id)
        return Attachment("user", nic.network, nic.mac, nic.address, port)

    async def _free_port(self, vm_id: UUID, *, after: int | None = None) -> int:
        try:
            return await asyncio.to_thread(network.free_port, self._settings, vm_id, after=after)
        except OSError as error:
            raise fail(
                Code.NETWORK_FAILED, f"No port can be forwarded from {self._settings.bind_address}: {error}."
            ) from error

    async def _exchange_port(self, vm_id: UUID, memory: Memory) -> Memory:
        taken = memory.attachment.port if memory.attachment is not None else None
        port = await self._free_port(vm_id, after=taken)
        changed = memory.with_port(port)

        def redefine(door: Door) -> None:
            door.define(domain_xml.with_port(door.inactive_xml(vm_id), changed), validate=False)

        await self._connection.run(redefine, code=Code.START_FAILED, doing="changing its forwarded port")
        return changed

    async def _spec(self, vm: DesiredVm, memory: Memory) -> domain_xml.DomainSpec:
        paths = self._pool.vm(vm.vm_id)
        network_of: dict[str, Any] = {}
        if vm.nic is not None and memory.attachment is not None:
            if memory.attachment.mode == "nat":
                network_of["bridge_network"] = network.PREFIX + vm.nic.network
            else:
                bind = self._settings.bind_address
                network_of["subnet"] = domain_xml.Subnet(vm.nic.gateway, vm.nic.prefix, bind)
        return domain_xml.DomainSpec(
            memory=memory,
            vcpus=vm.vcpus,
            memory_mib=vm.memory_mib,
            disk=paths.disk,
            base=self._pool.image(vm.image.sha256, vm.image.format),
            base_format=vm.image.format,
            config_drive=paths.config_drive,
            console=paths.console,
            offer=await self._machine.offer(),
            **network_of,
        )


def _build(spec: domain_xml.DomainSpec) -> str:
    try:
        return domain_xml.build(spec)
    except ValueError as error:
        raise fail(Code.DEFINE_FAILED, f"No domain can be made of this: {error}.") from error
