"""The domain XML: closed, whatever names say, and of a shape that libvirt's own schema accepts."""

import subprocess
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from uuid import UUID
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.compute.driver import Journal
from leveret.compute.libvirt_driver import domain_xml, journal
from leveret.compute.libvirt_driver.domain_xml import DomainSpec, Offer, Subnet
from leveret.compute.libvirt_driver.journal import NAMESPACE, Attachment, Memory
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Wanted

pytestmark = pytest.mark.unit

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
VM_ID = UUID("0192f0c1-0000-7000-8000-00000000abcd")
TCG = Offer("qemu", "x86_64", "q35", "/usr/bin/qemu-system-x86_64")
KVM = replace(TCG, virt_type="kvm")
NAT = Attachment("nat", "default", "0a:01:02:03:04:05", "10.80.0.7")
USER = Attachment("user", "default", "0a:01:02:03:04:05", "10.80.0.7", 20022)
SUBNET = Subnet("10.80.0.1", 16, "127.0.0.1")


def spec(
    *,
    name: str = "web-1",
    project: str = "demo",
    boot_id: str = "boot",
    attachment: Attachment | None = NAT,
    offer: Offer = TCG,
) -> DomainSpec:
    journal = Journal(VM_ID, project, name, 3, 0, Wanted.RUNNING, 0, boot_id)
    mode = attachment.mode if attachment else None
    return DomainSpec(
        memory=Memory(journal, attachment),
        vcpus=2,
        memory_mib=512,
        disk=Path("/pool/a/disk.qcow2"),
        base=Path("/pool/images/b.qcow2"),
        base_format="qcow2",
        config_drive=Path("/pool/a/config.iso"),
        console=Path("/pool/a/console.log"),
        offer=offer,
        subnet=SUBNET if mode == "user" else None,
        bridge_network="leveret-default" if mode == "nat" else None,
    )


def shape(xml: str) -> list[str]:
    """Every element and the names of its attributes: what no text may change."""
    return [f"{element.tag}:{sorted(element.attrib)}" for element in ET.fromstring(xml).iter()]


def memory_in(xml: str) -> Memory:
    metadata = ET.fromstring(xml).find("metadata")
    assert metadata is not None
    return journal.from_xml(ET.tostring(metadata[0], encoding="unicode"))


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@given(name=ANY_TEXT, project=ANY_TEXT, boot_id=ANY_TEXT)
def test_any_text_comes_back_as_it_was_and_adds_no_element(name: str, project: str, boot_id: str) -> None:
    asked = spec(name=name, project=project, boot_id=boot_id)

    xml = domain_xml.build(asked)

    assert shape(xml) == shape(domain_xml.build(spec()))
    assert memory_in(xml) == asked.memory


@given(name=ANY_TEXT, project=ANY_TEXT, network=ANY_TEXT, port=st.none() | st.integers(1, 65535))
def test_the_journal_that_libvirt_is_given_later_reads_the_same(
    name: str, project: str, network: str, port: int | None
) -> None:
    asked = spec(name=name, project=project).memory
    asked = replace(asked, attachment=replace(USER, network=network, port=port))

    assert journal.from_xml(journal.to_xml(asked)) == asked


@pytest.mark.parametrize(
    "text",
    ["", "<vm", "<vm/>", '<vm id="x"/>', "<other/>"],
    ids=["nothing", "cut short", "empty", "bad id", "another element"],
)
def test_what_is_no_journal_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        journal.from_xml(text)


def test_names_of_domains_differ_for_ids_made_in_the_same_moment() -> None:
    names = {domain_xml.domain_name("web", new_id()) for _ in range(100)}

    assert len(names) == 100


@given(name=ANY_TEXT)
def test_a_domain_name_holds_nothing_that_libvirt_or_a_file_name_cannot(name: str) -> None:
    assert set(domain_xml.domain_name(name, VM_ID)) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
    )


SPECS = {
    "nat": spec(),
    "user mode": spec(attachment=USER),
    "no interface": spec(attachment=None),
    "kvm": spec(offer=KVM),
    "kvm on pc": spec(offer=replace(KVM, machine="pc"), attachment=USER),
    "maximum cpu": spec(offer=replace(TCG, emulated_cpu="maximum")),
    "raw base": replace(spec(), base_format="raw"),
}


@pytest.mark.skipif(not SCHEMA.exists(), reason="libvirt's schemas are not installed")
@pytest.mark.parametrize("which", SPECS)
def test_libvirts_own_schema_accepts_the_xml(which: str, tmp_path: Path) -> None:
    document = tmp_path / "domain.xml"
    document.write_text(domain_xml.build(SPECS[which]))

    verdict = subprocess.run(
        ["xmllint", "--noout", "--relaxng", SCHEMA, document], capture_output=True, text=True, check=False
    )

    assert verdict.returncode == 0, verdict.stderr


def test_an_emulated_guest_has_a_small_translation_cache_and_a_modest_processor() -> None:
    root = ET.fromstring(domain_xml.build(spec()))

    assert root.findtext("features/tcg/tb-cache") == "32"
    assert root.findtext("cpu/model") == "Nehalem"


def test_a_kvm_guest_has_the_hosts_processor() -> None:
    root = ET.fromstring(domain_xml.build(spec(offer=KVM)))

    cpu = root.find("cpu")
    assert cpu is not None
    assert cpu.get("mode") == "host-passthrough"
    assert root.find("features/tcg") is None


def test_qemu_may_read_the_base_image_but_is_never_made_its_owner() -> None:
    backing = ET.fromstring(domain_xml.build(spec())).find("devices/disk/backingStore")

    assert backing is not None
    seclabel = backing.find("source/seclabel")
    assert seclabel is not None
    assert seclabel.get("relabel") == "no"
    assert backing.find("backingStore") is not None, "the chain must end explicitly, or libvirt probes it"


def test_the_port_is_exchanged_in_the_argument_and_in_the_journal() -> None:
    asked = spec(attachment=USER)
    changed = asked.memory.with_port(20099)

    xml = domain_xml.with_port(domain_xml.build(asked), changed)

    assert xml == domain_xml.build(replace(asked, memory=changed))
    assert "20022" not in xml
    assert memory_in(xml) == changed


def test_our_metadata_has_our_namespace() -> None:
    metadata = ET.fromstring(domain_xml.build(spec())).find("metadata")

    assert metadata is not None
    assert [child.tag for child in metadata] == [f"{{{NAMESPACE}}}vm"]


@given(
    network=st.integers(0, 2**16 - 1).map(lambda n: IPv4Network((0x0A500000 + (n << 3), 29))),
    prefix=st.integers(8, 30),
    data=st.data(),
)
def test_user_mode_networks_give_every_role_its_own_address(
    network: IPv4Network, prefix: int, data: st.DataObject
) -> None:
    whole = IPv4Network((network.network_address, prefix), strict=False)
    hosts = st.integers(1, min(whole.num_addresses - 2, 1000)).map(lambda n: whole.network_address + n)
    gateway, guest = data.draw(st.lists(hosts, min_size=2, max_size=2, unique=True))

    options = dict(
        option.split("=", 1)
        for option in domain_xml.user_netdev(str(guest), 20022, Subnet(str(gateway), prefix, "127.0.0.1")).split(",")[
            1:
        ]
    )

    inside = IPv4Network(options["net"])
    assert whole.subnet_of(inside)
    roles = {str(guest), str(gateway), options["dns"]}
    assert len(roles) == 3
    assert all(IPv4Network(f"{role}/32").subnet_of(inside) for role in roles)
    assert options["dhcpstart"] == str(guest)
    assert options["hostfwd"] == f"tcp:127.0.0.1:20022-{guest}:22"


@pytest.mark.parametrize("address", ["10.80.0.7,restrict=off", "", "10.81.0.7", "::1"])
def test_an_address_that_is_none_cannot_add_an_option_to_qemu(address: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        domain_xml.user_netdev(address, 20022, SUBNET)
