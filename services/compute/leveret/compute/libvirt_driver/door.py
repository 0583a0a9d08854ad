"""The only module that imports libvirt: blocking verbs on one connection.

Whoever calls them does so from a thread with a time limit (see `connection`). libvirt's own event loop runs in one
daemon thread of the process, not on asyncio: `libvirtaio` schedules timers and watches descriptors from whatever
thread makes a call, which asyncio does not allow, and its keepalive would depend on our loop never being late.
"""

import atexit
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import libvirt

from leveret.compute.driver import Power
from leveret.compute.libvirt_driver.journal import NAMESPACE, PREFIX
from leveret.compute.libvirt_driver.seeing import Off, Seen
from leveret.shared.errors import Code, LeveretError, fail


@dataclass(frozen=True, slots=True)
class Node:
    """The machine, as libvirt counts it."""

    arch: str
    vcpus: int
    memory_mib: int


class NoDomainError(Exception):
    """There is no domain with this id."""


#: Called from libvirt's thread: with a domain's id when something happened to it, with None when the connection ended.
OnEvent = Callable[[UUID | None], None]

_event_loop_lock = threading.Lock()
_event_loop: threading.Thread | None = None
_leaving = threading.Event()
_LEAVING_S = 2.0


def _ensure_event_loop() -> None:
    """Start libvirt's event loop, once in a process and before any connection is opened."""
    global _event_loop  # noqa: PLW0603  (libvirt's registration is the process's, too)
    with _event_loop_lock:
        if _event_loop is not None:
            return
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # errors are raised; stderr is for our logs
        libvirt.virEventRegisterDefaultImpl()
        atexit.register(_end_event_loop)
        _event_loop = threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True)
        _event_loop.start()


def _run_event_loop() -> None:
    while not _leaving.is_set():
        libvirt.virEventRunDefaultImpl()


def _end_event_loop() -> None:
    """Before the interpreter is taken apart: a callback of libvirt's after that is a crash."""
    _leaving.set()
    libvirt.virEventAddTimeout(0, lambda *_: None, None)  # wakes it
    if _event_loop is not None:
        _event_loop.join(_LEAVING_S)


class Door:
    """A connection to libvirt, for one thread at a time.

    Every verb blocks, and raises libvirt's error or NoDomainError.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._callbacks: list[int] = []

    @classmethod
    def open(cls, uri: str, keepalive_interval_s: int, keepalive_count: int) -> "Door":
        """Connect. Blocks for as long as libvirtd does: the keepalive begins afterwards."""
        _ensure_event_loop()
        connection = libvirt.open(uri)
        try:
            connection.setKeepAlive(keepalive_interval_s, keepalive_count)
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def listen(self, on_event: OnEvent) -> None:
        """Register for everything that may change a domain, and for the end of the connection."""

        def about_domain(_connection: Any, domain: Any, *_details: Any) -> None:
            on_event(UUID(bytes=domain.UUID()))

        def ended(_connection: Any, _reason: int, _opaque: Any) -> None:
            on_event(None)

        self._connection.registerCloseCallback(ended, None)
        for event in _EVENTS:
            self._callbacks.append(self._connection.domainEventRegisterAny(None, event, about_domain, None))

    def close(self) -> None:
        """Disconnect. Callbacks hold on to a connection, so they go first; on a dead one that fails, and no matter."""
        with contextlib.suppress(libvirt.libvirtError):
            if self._callbacks:
                self._connection.unregisterCloseCallback()
        for callback in self._callbacks:
            with contextlib.suppress(libvirt.libvirtError):
                self._connection.domainEventDeregisterAny(callback)
        self._callbacks.clear()
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()

    def is_alive(self) -> bool:
        return bool(self._connection.isAlive())

    # The machine.

    def node(self) -> Node:
        """`getInfo` adds up NUMA cells, and misses memory that was plugged in later; `getMemoryStats` knows."""
        info = self._connection.getInfo()
        memory_kib = self._connection.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)["total"]
        return Node(arch=str(info[0]), vcpus=int(info[2]), memory_mib=int(memory_kib) // 1024)

    def domain_capabilities(self, arch: str, machine: str, virt_type: str) -> str | None:
        """libvirt's XML on what it can run, None when it cannot run such a machine."""
        try:
            return str(self._connection.getDomainCapabilities(None, arch, machine, virt_type))
        except libvirt.libvirtError as error:
            if error.get_error_code() in _CANNOT:
                return None
            raise

    # Domains.

    def see_all(self) -> list[Seen]:
        seen = []
        for domain in self._connection.listAllDomains(0):
            try:
                seen.append(_see(domain))
            except NoDomainError:  # gone since it was listed
                continue
        return seen

    def see(self, vm_id: UUID) -> Seen | None:
        try:
            return _see(self._domain(vm_id))
        except NoDomainError:
            return None

    def inactive_xml(self, vm_id: UUID) -> str:
        return str(self._domain(vm_id).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))

    def define(self, xml: str, *, validate: bool) -> None:
        """Define, and hold the XML against libvirt's schema if wanted, which takes longer than all the rest."""
        self._connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE if validate else 0)

    def start(self, vm_id: UUID) -> None:
        """Start it; a domain that runs already is left as it is."""
        domain = self._domain(vm_id)
        try:
            domain.create()
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID and domain.isActive():
                return
            raise

    def press_power_button(self, vm_id: UUID) -> None:
        self._unless_off(lambda domain: domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN), vm_id)

    def destroy(self, vm_id: UUID) -> None:
        """Switch it off; one that is off already, or gone, is left as it is."""
        with contextlib.suppress(NoDomainError):
            self._unless_off(lambda domain: domain.destroy(), vm_id)

    def reset(self, vm_id: UUID) -> bool:
        """Press the reset button. False when the domain was off."""
        return self._unless_off(lambda domain: domain.reset(0), vm_id)

    def resume(self, vm_id: UUID) -> None:
        self._unless_off(lambda domain: domain.resume(), vm_id)

    def undefine(self, vm_id: UUID) -> None:
        """Remove the definition with everything that libvirt itself keeps of the domain. One that has no definition
        is gone as soon as it is off."""
        with contextlib.suppress(NoDomainError):
            self._domain(vm_id).undefineFlags(_UNDEFINE)

    def set_metadata(self, vm_id: UUID, xml: str) -> None:
        """Write our element, into the running domain and into what it will be after a restart."""
        domain = self._domain(vm_id)
        kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if domain.isPersistent() else 0
        if domain.isActive():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        try:
            domain.setMetadata(kind, xml, PREFIX, NAMESPACE, flags)
        except libvirt.libvirtError as error:
            # It went off in between: then there is only the definition left to write to.
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or domain.isActive():
                raise
            domain.setMetadata(kind, xml, PREFIX, NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_CONFIG)

    def _domain(self, vm_id: UUID) -> Any:
        try:
            return self._connection.lookupByUUID(vm_id.bytes)
        except libvirt.libvirtError as error:
            _raise_if_missing(error)
            raise

    def _unless_off(self, verb: Callable[[Any], object], vm_id: UUID) -> bool:
        domain = self._domain(vm_id)
        try:
            verb(domain)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID and not domain.isActive():
                return False
            _raise_if_missing(error)
            raise
        return True

    # Networks.

    def network_xml(self, name: str) -> str | None:
        """A network's XML, None when there is none of this name."""
        network = self._network(name)
        return None if network is None else str(network.XMLDesc(0))

    def define_network(self, xml: str) -> None:
        self._connection.networkDefineXML(xml)

    def network_is_active(self, name: str) -> bool:
        network = self._network(name)
        return network is not None and bool(network.isActive())

    def start_network(self, name: str) -> None:
        """Start it now and with libvirtd; one that is started already is left as it is."""
        network = self._connection.networkLookupByName(name)
        try:
            if not network.isActive():
                network.create()
        except libvirt.libvirtError:
            if not network.isActive():
                raise
        if not network.autostart():
            network.setAutostart(1)

    def reload_dhcp(self, name: str) -> None:
        """Let the network's dnsmasq read its files again, when it runs.

        libvirt's verbs for DHCP entries take the network's firewall down and up again each time, half a second; an
        entry of the name server, put in or taken out, costs no more than the signal that is wanted.
        """
        network = self._network(name)
        if network is None:
            return
        for command in (libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST):
            try:
                network.update(
                    command, libvirt.VIR_NETWORK_SECTION_DNS_HOST, -1, _RELOAD, libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE
                )
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                    raise
            else:
                return

    def _network(self, name: str) -> Any:
        try:
            return self._connection.networkLookupByName(name)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
                return None
            raise


def _see(domain: Any) -> Seen:
    vm_id = UUID(bytes=domain.UUID())
    try:
        state, reason = domain.state()
        metadata = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_CURRENT)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            _raise_if_missing(error)
            raise
        metadata = None
    if state == libvirt.VIR_DOMAIN_SHUTOFF:
        return Seen(vm_id, metadata, Power.OFF, _OFF.get(reason, Off.OTHER))
    stopped_by_disk = (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)
    return Seen(vm_id, metadata, Power.RUNNING, io_error=stopped_by_disk)


def _raise_if_missing(error: Exception) -> None:
    """Raise NoDomainError if that is what libvirt says."""
    if isinstance(error, libvirt.libvirtError) and error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
        raise NoDomainError(str(error)) from error


def told(error: Exception, code: Code, doing: str, *, alive: bool) -> LeveretError:
    """The error for a user: what `code` says unless libvirt itself is the trouble, with libvirt's own words."""
    number = error.get_error_code() if isinstance(error, libvirt.libvirtError) else None
    if number == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        code = Code.HYPERVISOR_TIMEOUT
    elif not alive or number in _NOT_CONNECTED:
        code = Code.HYPERVISOR_UNAVAILABLE
    elif "No space left on device" in str(error):
        code = Code.DISK_FULL
    return fail(code, f"libvirt, while {doing}: {error}")


_EVENTS = (
    libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
    libvirt.VIR_DOMAIN_EVENT_ID_REBOOT,
    libvirt.VIR_DOMAIN_EVENT_ID_CONTROL_ERROR,
    libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
)
_OFF = {
    libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN: Off.UNKNOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: Off.SHUTDOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: Off.DESTROYED,
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: Off.CRASHED,
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: Off.FAILED,
    libvirt.VIR_DOMAIN_SHUTOFF_DAEMON: Off.DAEMON,
}
_UNDEFINE = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)
#: Means nothing: its address is one of those kept for documentation.
_RELOAD = "<host ip='192.0.2.1'><hostname>leveret-reload</hostname></host>"
_CANNOT = {libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_CONFIG_UNSUPPORTED, libvirt.VIR_ERR_NO_DOMAIN}
_NOT_CONNECTED = {
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_AUTH_FAILED,
}
