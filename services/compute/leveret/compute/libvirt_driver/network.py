"""How a VM hangs on its network: libvirt's NAT bridge with a fixed lease, or QEMU's user mode with a forwarded port."""

import errno
import socket
from collections.abc import Callable
from ipaddress import ip_interface
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid5
from xml.etree import ElementTree as ET

import structlog

from leveret.compute.libvirt_driver.connection import Connection
from leveret.compute.libvirt_driver.domain_xml import user_name_server
from leveret.compute.libvirt_driver.door import Door
from leveret.compute.libvirt_driver.journal import Attachment, NetworkMode
from leveret.compute.libvirt_driver.lane import Lane
from leveret.compute.libvirt_driver.paths import make_directory
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.messages import Nic

log = structlog.get_logger()

T = TypeVar("T")

PREFIX = "leveret-"
NOBODY = "02:00:00:00:00:00"
MAX_LEASES = 65536
#: An address that is used again by another guest is given out once its former owner's lease has ended.
LEASE = "10m"
_DNSMASQ = "http://libvirt.org/schemas/network/dnsmasq/1.0"
ET.register_namespace("dnsmasq", _DNSMASQ)
#: So that a host always gives the same network the same identity.
_NAMESPACE = UUID("9d1f6a4e-6c7a-5f0e-8d53-6c6576657265")


class Networks:
    """The networks of one host."""

    def __init__(self, connection: Connection, settings: LibvirtSettings, root: Path, files: Lane) -> None:
        self._connection = connection
        self._settings = settings
        self._root = root
        self._files = files
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

    async def name_servers(self, nic: Nic) -> tuple[str, ...]:
        """Whom the guest asks for names: whom the network's owner wants, or the host."""
        if nic.dns:
            return nic.dns
        if await self.mode_for(nic) == "nat":
            return (nic.gateway,)
        return (user_name_server(nic.address, nic.gateway, nic.prefix),)

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
        directory = self._directory(nic.network)
        await self._connection.run(
            lambda door: _ensure(door, nic, directory),
            code=Code.NETWORK_FAILED,
            doing=f"starting network {nic.network}",
        )

    async def start(self, network: str) -> None:
        """Start a network that a domain was defined with, should it be down."""
        name = PREFIX + network
        await self._connection.run(
            lambda door: door.start_network(name), code=Code.NETWORK_FAILED, doing=f"starting network {network}"
        )

    async def add_host(self, vm_id: UUID, nic: Attachment) -> None:
        """DHCP gives this MAC its address. dnsmasq notices the new file by itself."""
        path = self._directory(nic.network) / str(vm_id)
        line = f"{nic.mac},{nic.address},{LEASE}\n"
        await self._in_thread(_write_once, path, line, doing=f"adding {nic.address} to DHCP", of=vm_id)

    async def remove_host(self, vm_id: UUID) -> None:
        """Forget a VM's entry, in whatever network it is. dnsmasq does not notice that by itself."""
        doing = "removing its address from DHCP"
        networks = await self._in_thread(_remove, self._root, str(vm_id), doing=doing, of=vm_id)
        for network in networks:
            name = PREFIX + network
            await self._connection.run(
                lambda door, name=name: door.reload_dhcp(name),  # type: ignore[misc]
                code=Code.NETWORK_FAILED,
                doing=doing,
            )

    def _directory(self, network: str) -> Path:
        if Path(network).name != network:
            raise fail(Code.NETWORK_FAILED, f"{network!r} cannot be the name of a network.")
        return self._root / network

    async def _in_thread(self, call: Callable[..., T], *args: Any, doing: str, of: UUID) -> T:
        try:
            return await self._files.run(call, *args, timeout_s=self._settings.file_timeout_s, doing=doing, of=of)
        except OSError as error:
            raise fail(Code.NETWORK_FAILED, f"{error.strerror or error} while {doing}.") from error


def network_xml(nic: Nic, directory: Path) -> str:
    """The libvirt network behind a Leveret network.

    There is no range to hand out: everybody who may be here has a fixed entry, a file in `directory`. The one entry
    that libvirt knows is nobody's; it makes libvirt serve DHCP at all. The bridge gets its name from libvirt, and no
    spanning tree, whose learning delay would cost the first guest its first DHCP requests.
    """
    root = ET.Element("network")
    _text(root, "name", PREFIX + nic.network)
    _text(root, "uuid", str(uuid5(_NAMESPACE, nic.network)))
    ET.SubElement(root, "forward", mode="nat")
    ET.SubElement(root, "bridge", stp="off", delay="0")
    ip = ET.SubElement(root, "ip", address=nic.gateway, prefix=str(nic.prefix))
    ET.SubElement(ET.SubElement(ip, "dhcp"), "host", mac=NOBODY, ip=nic.gateway)
    options = ET.SubElement(root, f"{{{_DNSMASQ}}}options")
    for value in (f"dhcp-hostsdir={directory}", f"dhcp-lease-max={MAX_LEASES}"):
        ET.SubElement(options, f"{{{_DNSMASQ}}}option", value=value)
    return ET.tostring(root, encoding="unicode")


def _ensure(door: Door, nic: Nic, directory: Path) -> None:
    name = PREFIX + nic.network
    if ip_interface(f"{nic.address}/{nic.prefix}").version != 4:
        raise fail(Code.NETWORK_FAILED, f"Network {nic.network} is not an IPv4 network.")
    _make_readable(directory)
    present = door.network_xml(name)
    if present is None:
        try:
            door.define_network(network_xml(nic, directory))
        except Exception:
            present = door.network_xml(name)  # another task was faster
            if present is None:
                raise
    if present is not None and (difference := _difference(present, nic, directory)):
        # A network that guests may hang on is never changed under them.
        if door.network_is_active(name):
            raise fail(
                Code.NETWORK_FAILED,
                f"The host's network {name} {difference}.",
                hint="Stop that libvirt network (`virsh net-destroy`) when no guest needs it, or use another name.",
            )
        door.define_network(network_xml(nic, directory))
    door.start_network(name)


def _difference(xml: str, nic: Nic, directory: Path) -> str | None:
    """What of a network is not as wanted, to complete "The network ..."."""
    root = ET.fromstring(xml)  # noqa: S314  (libvirt's own)
    ip = root.find("ip")
    found = None if ip is None else ip_interface(f"{ip.get('address')}/{ip.get('prefix') or ip.get('netmask')}")
    wanted = ip_interface(f"{nic.gateway}/{nic.prefix}")
    if found != wanted:
        return f"has gateway {found}, but {wanted} is wanted"
    if f"dhcp-hostsdir={directory}" not in [option.get("value") for option in root.iter(f"{{{_DNSMASQ}}}option")]:
        return f"reads its guests' addresses elsewhere than in {directory}"
    return None


def _make_readable(directory: Path) -> None:
    """dnsmasq reads it as a user of its own."""
    make_directory(directory.parent)
    make_directory(directory)
    directory.chmod(0o755)


def _write_once(path: Path, line: str) -> None:
    try:
        if path.read_text() == line:
            return
    except FileNotFoundError:
        pass
    _make_readable(path.parent)
    temporary = path.with_name(f".{path.name}")  # which dnsmasq does not read
    temporary.write_text(line)
    temporary.chmod(0o644)
    temporary.replace(path)


def _remove(root: Path, name: str) -> list[str]:
    """Remove the files of this name; the networks that had one."""
    found = list(root.glob(f"*/{name}"))
    for path in found:
        path.unlink(missing_ok=True)
        path.with_name(f".{name}").unlink(missing_ok=True)
    return [path.parent.name for path in found]


def free_port(settings: LibvirtSettings, vm_id: UUID, *, after: int | None = None) -> int:
    """A TCP port that nothing listens on now, the same one for the same VM when it can be. Blocking.

    Somebody may still take it before QEMU does; then the start fails, and the next one `after` it is tried.
    """
    ports = settings.ports
    start = vm_id.int % len(ports) if after is None or after not in ports else ports.index(after) + 1
    for offset in range(len(ports)):
        port = ports[(start + offset) % len(ports)]
        if _is_free(settings.bind_address, port):
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
