"""What libvirt shows of a domain, and what that means to Leveret."""

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from leveret.compute.driver import Domain, Inventory, Journal, Power
from leveret.compute.libvirt_driver.journal import Attachment, Memory, from_xml
from leveret.shared.documents import Endpoint
from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import Wanted

SSH_PORT = 22


class Off(StrEnum):
    """Why libvirt says a domain is off."""

    UNKNOWN = "unknown"
    SHUTDOWN = "shutdown"
    DESTROYED = "destroyed"
    CRASHED = "crashed"
    FAILED = "failed"
    DAEMON = "daemon"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Seen:
    """One domain. `metadata` is our element, None for a domain that is not ours."""

    vm_id: UUID
    metadata: str | None
    power: Power
    off: Off = Off.UNKNOWN
    io_error: bool = False


def memory_of(seen: Seen) -> Memory | None:
    """Our memory in a domain; None for a foreign one. A domain that carries another VM's journal, as a hand-made copy
    of one of ours does, is foreign too."""
    if seen.metadata is None:
        return None
    try:
        memory = from_xml(seen.metadata)
    except ValueError:
        return None
    return memory if memory.journal.vm_id == seen.vm_id else None


def domain_of(seen: Seen, memory: Memory, *, boot_id: str, advertise_host: str) -> Domain:
    why_off = why(seen.off, memory.journal, boot_id) if seen.power is Power.OFF else None
    return Domain(memory.journal, seen.power, why_off, endpoint(memory.attachment, advertise_host))


def inventory_of(everything: list[Seen], *, boot_id: str, advertise_host: str) -> Inventory:
    memories = [(seen, memory_of(seen)) for seen in everything]
    domains = (
        domain_of(seen, memory, boot_id=boot_id, advertise_host=advertise_host)
        for seen, memory in memories
        if memory is not None
    )
    return Inventory(tuple(domains), strangers=tuple(seen.vm_id for seen, memory in memories if memory is None))


def endpoint(attachment: Attachment | None, advertise_host: str) -> Endpoint | None:
    """Where the guest's ssh is reached."""
    if attachment is None:
        return None
    if attachment.mode == "nat":
        return Endpoint(host=attachment.address, port=SSH_PORT)
    return None if attachment.port is None else Endpoint(host=advertise_host, port=attachment.port)


def why(off: Off, journal: Journal, boot_id: str) -> Problem | None:
    """Why a domain is off that should run; None when it is off as wanted, or has never been started."""
    if journal.wanted is not Wanted.RUNNING:
        return None
    if journal.boot_id != boot_id:
        # libvirt itself remembers nothing across a reboot of the host.
        return Problem.of(Code.HOST_REBOOTED, "The host was rebooted.") if journal.generation else None
    if off is Off.UNKNOWN and not journal.generation:
        return None
    code, message = _WHY[off]
    return Problem.of(code, message)


_WHY = {
    Off.SHUTDOWN: (Code.GUEST_SHUTDOWN, "The guest switched itself off."),
    Off.CRASHED: (Code.GUEST_CRASHED, "The guest crashed, or its QEMU ended unexpectedly."),
    Off.FAILED: (Code.GUEST_CRASHED, "The guest's QEMU could not be started."),
    Off.DAEMON: (Code.GUEST_CRASHED, "libvirtd found the guest's QEMU ended, or out of reach, when it started."),
    Off.DESTROYED: (Code.GUEST_SHUTDOWN, "The guest was switched off on its host."),
    Off.OTHER: (Code.GUEST_SHUTDOWN, "The guest was stopped by other means on its host."),
    Off.UNKNOWN: (Code.GUEST_CRASHED, "The guest is off, and libvirt, started anew since, does not know why."),
}
