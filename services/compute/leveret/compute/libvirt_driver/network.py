"""How a VM hangs on its network: libvirt's NAT bridge with a fixed lease, or QEMU's user mode with a forwarded port."""

import errno
import socket
from collections.abc import Iterator
from ipaddress import ip_interface
from uuid import UUID, uuid5
from xml.etree import ElementTree as ET

import structlog

from leveret.compute.libvirt_driver.connection import Connection
from leveret.compute.libvirt_driver.door import Door
from leveret.compute.libvirt_driver.journal import Attachment, NetworkMode
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.messages import Nic

log = structlog.get_logger()

PREFIX = "leveret-"
#: So that a host always gives the same network the same identity.
_NAMESPACE = UUID("9d1f6a4e-6c7a-5f0e-8d53-6c6576657265")


class Networks:
    """The networks of one host."""

    def __init__(self, connection: Connection, settings: LibvirtSettings) -> None:
        self._connection = connection
        self._settings = settings
        self._nat_works: bool | None = None

    def connected(self) -> None:
        """Try again what did not work on the last connection."""
        self._nat_works = None

    async def mode_for(self, nic: Nic) -> NetworkMode:
        """How a new domain shall hang on this network. `auto` finds out once a connection whether NAT works."""
        if self._settings.network_mode != "auto":
            return self._settings.network_mode
        if self._nat_works is None:
            self._nat_works = self._settings.uri.partition("?")[0].endswith("/system") and await self._try_nat(nic)
        return "nat" if self._nat_works else "user"

    async def _try_nat(self, nic: Nic) -> bool:
        try:
            await self.ensure(nic)
        except LeveretError as error:
            if error.problem.code is not Code.NETWORK_FAILED:
                raise
            log.warning("network.user_mode", network=nic.network, why=error.problem.message)
            return False
        return True

    async def ensure(self, nic: Nic) -> None:
        """The libvirt network exists as wanted, runs, and starts with libvirtd."""
        await self._connection.run(
            lambda door: _ensure(door, nic), code=Code.NETWORK_FAILED, doing=f"starting network {nic.network}"
        )

    async def start(self, network: str) -> None:
        """Start a network that a domain was defined with, should it be down."""
        name = PREFIX + network
        await self._connection.run(
            lambda door: door.start_network(name), code=Code.NETWORK_FAILED, doing=f"starting network {network}"
        )

    async def add_host(self, attachment: Attachment) -> None:
        """DHCP gives this MAC its address, and nobody else."""
        await self._connection.run(
            lambda door: _add_host(door, attachment),
            code=Code.NETWORK_FAILED,
            doing=f"adding {attachment.address} to network {attachment.network}",
        )

    async def remove_host(self, mac: str, network: str | None = None) -> None:
        """Forget a MAC in its network, or, when that is not known, in every network of ours."""
        await self._connection.run(
            lambda door: _remove_mac(door, mac, network), code=Code.NETWORK_FAILED, doing=f"removing {mac} from DHCP"
        )


def network_xml(nic: Nic) -> str:
    """The libvirt network behind a Leveret network.

    There is no range to hand out: everybody who may be here has a fixed entry. The bridge gets its name from libvirt,
    and no spanning tree, whose learning delay would cost the first guest its first DHCP requests.
    """
    root = ET.Element("network")
    _text(root, "name", PREFIX + nic.network)
    _text(root, "uuid", str(uuid5(_NAMESPACE, nic.network)))
    ET.SubElement(root, "forward", mode="nat")
    ET.SubElement(root, "bridge", stp="off", delay="0")
    ip = ET.SubElement(root, "ip", address=nic.gateway, prefix=str(nic.prefix))
    ET.SubElement(ip, "dhcp")
    return ET.tostring(root, encoding="unicode")


def _ensure(door: Door, nic: Nic) -> None:
    name = PREFIX + nic.network
    present = door.network_xml(name)
    if present is None:
        if ip_interface(f"{nic.address}/{nic.prefix}").version != 4:
            raise fail(Code.NETWORK_FAILED, f"Network {nic.network} is not an IPv4 network.")
        try:
            door.define_network(network_xml(nic))
        except Exception:
            present = door.network_xml(name)  # another task was faster
            if present is None:
                raise
    if present is not None:
        _check_same(present, nic)
    door.start_network(name)


def _check_same(xml: str, nic: Nic) -> None:
    """A network that guests hang on is never changed under them."""
    ip = ET.fromstring(xml).find("ip")  # noqa: S314  (libvirt's own)
    found = None if ip is None else ip_interface(f"{ip.get('address')}/{ip.get('prefix') or ip.get('netmask')}")
    wanted = ip_interface(f"{nic.gateway}/{nic.prefix}")
    if found != wanted:
        raise fail(
            Code.NETWORK_FAILED,
            f"The host's network {PREFIX}{nic.network} has gateway {found}, but {wanted} is wanted.",
            hint="Move its guests away and remove that libvirt network, or use another network name.",
        )


def _host_element(mac: str, address: str) -> str:
    return ET.tostring(ET.Element("host", {"mac": mac, "ip": address}), encoding="unicode")


def _add_host(door: Door, nic: Attachment) -> None:
    name = PREFIX + nic.network
    if door.add_dhcp_host(name, _host_element(nic.mac, nic.address)):
        return
    # An entry is in the way: ours from before, in one place or both, or what a killed removal left behind.
    wanted = (nic.mac.lower(), nic.address)
    per_place = [set(_hosts(door, name, inactive=inactive)) for inactive in (False, True)]
    if all(wanted in hosts for hosts in per_place):
        return
    for inactive, hosts in zip((False, True), per_place, strict=True):
        for mac, address in hosts:
            if mac == wanted[0] or address == wanted[1]:
                door.remove_dhcp_host(name, _host_element(mac, address), inactive=inactive)
    if not door.add_dhcp_host(name, _host_element(*wanted)):
        raise fail(Code.NETWORK_FAILED, f"Network {nic.network} does not take the DHCP entry {wanted}.")


def _remove_mac(door: Door, mac: str, network: str | None) -> None:
    names = [PREFIX + network] if network is not None else door.network_names()
    for name in names:
        if not name.startswith(PREFIX):
            continue
        for inactive in (False, True):
            for found, address in _hosts(door, name, inactive=inactive):
                if found == mac.lower():
                    door.remove_dhcp_host(name, _host_element(found, address), inactive=inactive)


def _hosts(door: Door, name: str, *, inactive: bool) -> Iterator[tuple[str, str]]:
    """The static entries of a network, as (MAC, address)."""
    xml = door.network_xml(name, inactive=inactive)
    if xml is None:
        return
    for host in ET.fromstring(xml).iterfind("ip/dhcp/host"):  # noqa: S314  (libvirt's own)
        if (mac := host.get("mac")) and (address := host.get("ip")):
            yield mac.lower(), address


def free_port(settings: LibvirtSettings, vm_id: UUID, *, after: int | None = None) -> int:
    """A TCP port that nothing listens on now, the same one for the same VM when it can be. Blocking.

    Somebody may still take it before QEMU does; then the start fails, and the next one `after` it is tried.
    """
    ports = settings.ports
    start = vm_id.int % len(ports) if after is None or after not in ports else ports.index(after) + 1
    for offset in range(len(ports)):
        port = ports[(start + offset) % len(ports)]
        if _is_free(settings.forward_bind, port):
            return port
    raise fail(Code.NETWORK_FAILED, f"No free TCP port in {ports.start}-{ports.stop - 1} to forward ssh from.")


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return False
            raise
    return True


def _text(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text
