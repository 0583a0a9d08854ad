"""The driver's memory: one element in the domain's `<metadata>`, kept by libvirt across restarts of everything."""

from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import quote, unquote
from uuid import UUID
from xml.etree import ElementTree as ET

from leveret.compute.driver import Journal
from leveret.shared.lifecycle import Wanted

#: Of version 1 of this element. What a newer version adds must be readable as version 1, or get a namespace of its own.
NAMESPACE = "urn:leveret:domain:1"
PREFIX = "lv"

ET.register_namespace(PREFIX, NAMESPACE)

NetworkMode = Literal["nat", "user"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """How a domain hangs on its network: by a bridge with NAT, or in user mode with its ssh forwarded to `port`."""

    mode: NetworkMode
    network: str
    mac: str
    address: str
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What the metadata holds: the journal, and how the domain hangs on its network."""

    journal: Journal
    attachment: Attachment | None = None

    def with_port(self, port: int) -> "Memory":
        if self.attachment is None:
            raise ValueError("a domain without an interface has no port")
        return replace(self, attachment=replace(self.attachment, port=port))


def to_element(memory: Memory, *, namespace: str = f"{{{NAMESPACE}}}") -> ET.Element:
    """The element, in our own namespace. Text is percent-encoded: any text comes back as it was, even one that XML
    cannot hold, and ordinary names stand there as they are."""
    journal = memory.journal
    element = ET.Element(
        f"{namespace}vm",
        {
            "id": str(journal.vm_id),
            "project": quote(journal.project),
            "name": quote(journal.name),
            "token": str(journal.token),
            "generation": str(journal.generation),
            "wanted": journal.wanted.value,
            "restarts": str(journal.restarts),
            "boot-id": quote(journal.boot_id),
        },
    )
    if (nic := memory.attachment) is not None:
        attributes = {"mode": nic.mode, "network": quote(nic.network), "mac": nic.mac, "address": nic.address}
        if nic.port is not None:
            attributes["port"] = str(nic.port)
        ET.SubElement(element, f"{namespace}nic", attributes)
    return element


def to_xml(memory: Memory) -> str:
    """The element for `virDomainSetMetadata`, which adds the namespace itself and takes none that has it."""
    return ET.tostring(to_element(memory, namespace=""), encoding="unicode")


def from_xml(text: str) -> Memory:
    """The memory in a metadata element. Raises ValueError when it is none of ours."""
    try:
        return _from_element(ET.fromstring(text))  # noqa: S314  (it comes from libvirt, which has parsed it)
    except (ET.ParseError, KeyError) as error:
        raise ValueError(f"not a journal: {error!r}") from error


def _from_element(element: ET.Element) -> Memory:
    get = element.attrib
    journal = Journal(
        vm_id=UUID(get["id"]),
        project=unquote(get["project"]),
        name=unquote(get["name"]),
        token=int(get["token"]),
        generation=int(get["generation"]),
        wanted=Wanted(get["wanted"]),
        restarts=int(get["restarts"]),
        boot_id=unquote(get["boot-id"]),
    )
    nic = next((child for child in element if child.tag.rpartition("}")[2] == "nic"), None)
    return Memory(journal, None if nic is None else _attachment(nic))


def _attachment(nic: ET.Element) -> Attachment:
    mode = nic.attrib["mode"]
    if mode not in {"nat", "user"}:
        raise ValueError(f"unknown network mode {mode!r}")
    port = nic.attrib.get("port")
    return Attachment(
        mode="nat" if mode == "nat" else "user",
        network=unquote(nic.attrib["network"]),
        mac=nic.attrib["mac"],
        address=nic.attrib["address"],
        port=None if port is None else int(port),
    )
