"""The domain XML of a VM, built from data by ElementTree: nothing is ever pasted into text."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Literal
from uuid import UUID
from xml.etree import ElementTree as ET

from leveret.compute.libvirt_driver.journal import Memory, to_element

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", QEMU_NAMESPACE)

#: The translation cache of an emulated guest. QEMU's own default is a quarter of the host's memory, or 1 GiB.
TB_CACHE_MIB = 32
#: A slot that nothing else on the root bus takes, for the interface that libvirt does not know of in user mode.
USER_NIC_SLOT = "0x1e"
_MAC = re.compile(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")
_UNFIT_FOR_A_NAME = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, slots=True)
class Offer:
    """What the hypervisor can run: asked of libvirt once per connection."""

    virt_type: Literal["kvm", "qemu"]
    arch: str
    machine: str
    emulator: str
    emulated_cpu: str = "Nehalem"


@dataclass(frozen=True, slots=True)
class Subnet:
    """The guest's network as QEMU's user mode has to know it."""

    gateway: str
    prefix: int
    forward_bind: str


@dataclass(frozen=True, slots=True)
class DomainSpec:
    """All that a domain is made of. The memory's attachment decides its interface; `subnet` is for user mode."""

    memory: Memory
    vcpus: int
    memory_mib: int
    disk: Path
    base: Path
    base_format: Literal["qcow2", "raw"]
    config_drive: Path
    console: Path
    offer: Offer
    subnet: Subnet | None = None
    bridge_network: str | None = None


def domain_name(name: str, vm_id: UUID) -> str:
    """Unique on a host by the whole id: names are unique in a project only, and the first digits of a UUIDv7 are
    a clock's."""
    return f"lv-{_UNFIT_FOR_A_NAME.sub('-', name)[:64]}-{vm_id}"


def build(spec: DomainSpec) -> str:
    """The XML for `virDomainDefineXML`."""
    journal = spec.memory.journal
    root = ET.Element("domain", {"type": spec.offer.virt_type})
    _text(root, "name", domain_name(journal.name, journal.vm_id))
    _text(root, "uuid", str(journal.vm_id))
    ET.SubElement(root, "metadata").append(to_element(spec.memory))
    _text(root, "memory", str(spec.memory_mib), unit="MiB")
    _text(root, "vcpu", str(spec.vcpus))
    _platform(root, spec)
    for event, action in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
        _text(root, event, action)
    pm = ET.SubElement(root, "pm")
    ET.SubElement(pm, "suspend-to-mem", enabled="no")
    ET.SubElement(pm, "suspend-to-disk", enabled="no")
    _devices(root, spec)
    if spec.memory.attachment is not None and spec.memory.attachment.mode == "user":
        _user_mode(root, spec)
    return ET.tostring(root, encoding="unicode")


def _platform(root: ET.Element, spec: DomainSpec) -> None:
    offer = spec.offer
    system = ET.SubElement(root, "os")
    _text(system, "type", "hvm", arch=offer.arch, machine=offer.machine)
    x86 = offer.arch == "x86_64"
    if not x86:
        system.set("firmware", "efi")
    features = ET.SubElement(root, "features")
    ET.SubElement(features, "acpi")
    if x86:
        ET.SubElement(features, "apic")
    if offer.virt_type == "qemu":
        tcg = ET.SubElement(features, "tcg")
        _text(tcg, "tb-cache", str(TB_CACHE_MIB), unit="MiB")
    ET.SubElement(_cpu(root, offer), "topology", sockets="1", cores=str(spec.vcpus), threads="1")
    clock = ET.SubElement(root, "clock", offset="utc")
    if x86:
        ET.SubElement(clock, "timer", name="rtc", tickpolicy="catchup")
        ET.SubElement(clock, "timer", name="pit", tickpolicy="delay")
        ET.SubElement(clock, "timer", name="hpet", present="no")


def _cpu(root: ET.Element, offer: Offer) -> ET.Element:
    """The host's own under KVM. Emulated, every instruction set that a guest finds and uses costs time: `maximum` took
    a quarter longer to boot than Nehalem, which has all of x86-64-v2."""
    if offer.virt_type == "kvm":
        return ET.SubElement(root, "cpu", mode="host-passthrough")
    if offer.arch != "x86_64" or offer.emulated_cpu == "maximum":
        return ET.SubElement(root, "cpu", mode="maximum")
    cpu = ET.SubElement(root, "cpu", mode="custom", match="exact")
    _text(cpu, "model", offer.emulated_cpu)
    return cpu


def _devices(root: ET.Element, spec: DomainSpec) -> None:
    devices = ET.SubElement(root, "devices")
    _text(devices, "emulator", spec.offer.emulator)
    _disk(devices, spec)
    _config_drive(devices, spec)
    ET.SubElement(devices, "controller", type="usb", model="none")
    if spec.bridge_network is not None:
        _bridged_interface(devices, spec)
    _serial(devices, spec)
    # For an agent, should the guest have one. Nothing waits for it.
    channel = ET.SubElement(devices, "channel", type="unix")
    ET.SubElement(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    ET.SubElement(ET.SubElement(devices, "video"), "model", type="none")
    ET.SubElement(devices, "memballoon", model="virtio", autodeflate="on", freePageReporting="on")
    rng = ET.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    if spec.offer.arch == "x86_64":
        ET.SubElement(devices, "panic", model="isa")


def _disk(devices: ET.Element, spec: DomainSpec) -> None:
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    # Flushes are honoured; the host's page cache is shared by all the guests of one base image.
    ET.SubElement(disk, "driver", name="qemu", type="qcow2", cache="writeback", discard="unmap")
    ET.SubElement(disk, "source", file=str(spec.disk))
    # The chain is spelt out, so that nothing is probed, and the base keeps its owner: QEMU may read it, not change it.
    backing = ET.SubElement(disk, "backingStore", type="file")
    ET.SubElement(backing, "format", type=spec.base_format)
    source = ET.SubElement(backing, "source", file=str(spec.base))
    ET.SubElement(source, "seclabel", model="dac", relabel="no")
    ET.SubElement(backing, "backingStore")
    ET.SubElement(disk, "target", dev="vda", bus="virtio")
    ET.SubElement(disk, "boot", order="1")


def _config_drive(devices: ET.Element, spec: DomainSpec) -> None:
    drive = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(drive, "driver", name="qemu", type="raw", cache="writeback")
    ET.SubElement(drive, "source", file=str(spec.config_drive))
    ET.SubElement(drive, "target", dev="vdb", bus="virtio")
    ET.SubElement(drive, "readonly")


def _bridged_interface(devices: ET.Element, spec: DomainSpec) -> None:
    attachment = spec.memory.attachment
    if attachment is None or spec.bridge_network is None:
        raise ValueError("a bridged interface needs an attachment and a network")
    nic = ET.SubElement(devices, "interface", type="network")
    ET.SubElement(nic, "mac", address=attachment.mac)
    ET.SubElement(nic, "source", network=spec.bridge_network)
    ET.SubElement(nic, "model", type="virtio")
    ET.SubElement(nic, "rom", enabled="no")  # the boot order has no network in it


def _serial(devices: ET.Element, spec: DomainSpec) -> None:
    """A pty for people, and a log that virtlogd writes: it rotates it, so a talkative guest cannot fill the disk."""
    serial = ET.SubElement(devices, "serial", type="pty")
    ET.SubElement(serial, "log", file=str(spec.console), append="on")
    ET.SubElement(serial, "target", port="0")


def _user_mode(root: ET.Element, spec: DomainSpec) -> None:
    """An interface with QEMU's own user-mode network, which libvirt can pass on but does not describe."""
    attachment, subnet = spec.memory.attachment, spec.subnet
    if attachment is None or subnet is None or attachment.port is None:
        raise ValueError("user mode needs an attachment with a port, and a subnet")
    if not _MAC.fullmatch(attachment.mac):
        raise ValueError(f"{attachment.mac!r} is not a MAC address")
    options = user_netdev(attachment.address, attachment.port, subnet)
    place = f"bus={_root_bus(spec)},addr={USER_NIC_SLOT}"
    device = f"virtio-net-pci,netdev=lvnet0,id=lvnic0,mac={attachment.mac},romfile=,{place}"
    commandline = ET.SubElement(root, f"{{{QEMU_NAMESPACE}}}commandline")
    for argument in ("-netdev", options, "-device", device):
        ET.SubElement(commandline, f"{{{QEMU_NAMESPACE}}}arg", value=argument)


def _root_bus(spec: DomainSpec) -> str:
    return "pcie.0" if "q35" in spec.offer.machine or spec.offer.arch != "x86_64" else "pci.0"


def user_netdev(address: str, port: int, subnet: Subnet) -> str:
    """QEMU's `-netdev` argument: the guest's own network with its gateway, DHCP that gives `address`, ssh forwarded.

    Raises ValueError when a value is no address.
    """
    guest, gateway, network, dns = _user_network(address, subnet.gateway, subnet.prefix)
    bind = IPv4Address(subnet.forward_bind)
    return (
        f"user,id=lvnet0,net={network},host={gateway},dns={dns},dhcpstart={guest},ipv6=off,"
        f"hostfwd=tcp:{bind}:{port}-{guest}:22"
    )


def user_name_server(address: str, gateway: str, prefix: int) -> str:
    """Where QEMU's user mode answers names. Its gateway does not: that leads to the host's own loopback."""
    return str(_user_network(address, gateway, prefix)[3])


def _user_network(address: str, gateway: str, prefix: int) -> tuple[IPv4Address, IPv4Address, IPv4Network, IPv4Address]:
    """Guest, gateway, network and name server, which needs an address of its own: the last one that is free."""
    guest, host = IPv4Address(address), IPv4Address(gateway)
    network = IPv4Network((host, min(prefix, 29)), strict=False)
    if guest not in network:
        raise ValueError(f"{guest} is not in {network}")
    last = network.broadcast_address
    dns = next(candidate for offset in (1, 2, 3) if (candidate := last - offset) not in {guest, host})
    return guest, host, network, dns


_FORWARD = re.compile(r"(hostfwd=tcp:[0-9.]+:)[0-9]+(-[0-9.]+:22)$")


def with_port(xml: str, memory: Memory) -> str:
    """A domain's own XML, with its ssh forwarded to the port in `memory`."""
    if memory.attachment is None or memory.attachment.port is None:
        raise ValueError("no port to forward to")
    root = ET.fromstring(xml)  # noqa: S314  (libvirt's own)
    for argument in root.iter(f"{{{QEMU_NAMESPACE}}}arg"):
        argument.set("value", _FORWARD.sub(rf"\g<1>{memory.attachment.port}\g<2>", argument.get("value", "")))
    metadata = root.find("metadata")
    if metadata is None:
        raise ValueError("a domain without metadata is not ours")
    ours = to_element(memory)
    for child in list(metadata):
        if child.tag == ours.tag:
            metadata.remove(child)
    metadata.append(ours)
    return ET.tostring(root, encoding="unicode")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element
