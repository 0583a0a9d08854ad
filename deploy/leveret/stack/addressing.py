"""Which addresses guests get on this machine: a network that it does not route already, and its resolvers."""

from ipaddress import AddressValueError, IPv4Address, IPv4Network
from pathlib import Path

from leveret.stack.errors import StackError

#: The first is what the documentation shows; the others are as seldom used.
CANDIDATES = (
    *(IPv4Network(f"10.{second}.0.0/20") for second in range(80, 100)),
    *(IPv4Network(f"172.29.{third}.0/20") for third in range(0, 256, 16)),
    *(IPv4Network(f"192.168.{third}.0/20") for third in range(128, 256, 16)),
)

_ROUTES = Path("/proc/net/route")
_RESOLVERS = Path("/etc/resolv.conf")
#: Postgres' inet[] takes any number; guests read three (resolv.conf(5), MAXNS).
_MOST_RESOLVERS = 3


def choose_network(routed: list[IPv4Network]) -> IPv4Network:
    """The first candidate that overlaps with no route. Raises StackError when all of them do."""
    for candidate in CANDIDATES:
        if not any(candidate.overlaps(route) for route in routed):
            return candidate
    raise StackError("every network that guests could have is routed on this machine already")


def routed_networks(text: str | None = None) -> list[IPv4Network]:
    """What the kernel routes, but for the default route. Its table holds little-endian hexadecimal numbers."""
    table = _ROUTES.read_text() if text is None else text
    networks = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        destination, mask = (IPv4Address(bytes.fromhex(fields[i])[::-1]) for i in (1, 7))
        if int(mask):
            networks.append(IPv4Network(f"{destination}/{mask}", strict=False))
    return networks


def resolvers(text: str | None = None) -> list[str]:
    """The machine's resolvers that a guest can reach too: a resolver on loopback is for the machine itself."""
    try:
        lines = (_RESOLVERS.read_text() if text is None else text).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            address = IPv4Address(words[1])
        except AddressValueError:
            continue  # guests have no IPv6 yet
        if not address.is_loopback:
            found.append(str(address))
    return found[:_MOST_RESOLVERS]
