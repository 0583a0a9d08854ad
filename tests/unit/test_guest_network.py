"""The host's side of a guest's network, as far as it needs no host."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from uuid import UUID
from xml.etree import ElementTree as ET

import pytest

from leveret.compute.libvirt_driver import network
from leveret.compute.libvirt_driver.connection import Connection
from leveret.compute.libvirt_driver.lane import Lane
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, LeveretError
from leveret.shared.messages import Nic

pytestmark = pytest.mark.unit

NIC = Nic(network="default", mac="0a:01:02:03:04:05", address="10.80.0.7", prefix=20, gateway="10.80.0.1")
VM_ID = UUID(int=7)


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def settings(ports: range) -> LibvirtSettings:
    return LibvirtSettings(pool_dir=Path("/nowhere"), ports=ports)


def test_a_port_in_use_is_passed_over(taken: socket.socket) -> None:
    port = taken.getsockname()[1]

    with pytest.raises(LeveretError, match="No free TCP port") as caught:
        network.free_port(settings(range(port, port + 1)), VM_ID)

    assert caught.value.problem.code is Code.NETWORK_FAILED


def test_the_same_vm_gets_the_same_port_when_it_is_free() -> None:
    ports = range(21000, 21100)

    assert network.free_port(settings(ports), VM_ID) == network.free_port(settings(ports), VM_ID)
    assert network.free_port(settings(ports), VM_ID) in ports


def test_the_next_try_is_another_port() -> None:
    ports = settings(range(21000, 21100))
    first = network.free_port(ports, VM_ID)

    assert network.free_port(ports, VM_ID, after=first) != first
    assert network.free_port(ports, VM_ID, after=21099) != 21099
    assert network.free_port(ports, VM_ID, after=5) in range(21000, 21100)


def test_the_network_hands_out_nothing_but_fixed_addresses() -> None:
    root = ET.fromstring(network.network_xml(NIC, Path("/pool/dhcp/default")))

    assert root.findtext("name") == "leveret-default"
    assert root.find("ip/dhcp/range") is None
    ip = root.find("ip")
    assert ip is not None
    assert (ip.get("address"), ip.get("prefix")) == ("10.80.0.1", "20")
    assert "dhcp-hostsdir=/pool/dhcp/default" in network.network_xml(NIC, Path("/pool/dhcp/default"))


def test_a_network_is_the_same_on_every_host_and_after_every_restart() -> None:
    directory = Path("/pool/dhcp/default")

    assert network.network_xml(NIC, directory) == network.network_xml(NIC, directory)
    other = NIC.model_copy(update={"network": "other"})
    assert ET.fromstring(network.network_xml(other, directory)).findtext("uuid") != ET.fromstring(
        network.network_xml(NIC, directory)
    ).findtext("uuid")


@pytest.mark.parametrize(
    ("mode", "dns", "asked"),
    [
        ("nat", (), "10.80.0.1"),
        ("user", (), "10.80.15.254"),
        ("nat", ("9.9.9.9",), "9.9.9.9"),
        ("user", ("9.9.9.9",), "9.9.9.9"),
    ],
)
async def test_a_guest_asks_names_where_they_are_answered(
    mode: Literal["nat", "user"], dns: tuple[str, ...], asked: str
) -> None:
    chosen = LibvirtSettings(pool_dir=Path("/nowhere"), network_mode=mode)
    nothing_happens = Connection(chosen, on_event=lambda _vm_id: None, on_open=lambda: None)
    files = Lane("files", width=1, max_hung=1, timeout_code=Code.DISK_FAILED)

    networks = network.Networks(nothing_happens, chosen, Path("/nowhere"), files)

    assert await networks.name_servers(NIC.model_copy(update={"dns": dns})) == (asked,)


@pytest.mark.parametrize(
    ("advertised", "given", "bound"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("localhost", None, "127.0.0.1"),
        ("host.example", None, "0.0.0.0"),
        ("host.example", "192.0.2.7", "192.0.2.7"),
    ],
)
def test_ports_listen_where_they_are_advertised(advertised: str, given: str | None, bound: str) -> None:
    chosen = LibvirtSettings(pool_dir=Path("/nowhere"), advertise_host=advertised, forward_bind=given)

    assert chosen.bind_address == bound
