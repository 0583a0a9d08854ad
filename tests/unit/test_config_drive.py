"""The config drive: byte for byte what was asked for, private, and never made anew for the same placement."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pycdlib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leveret.compute.libvirt_driver import config_drive
from leveret.shared.documents import MAX_USER_DATA_BYTES
from leveret.shared.ids import mac_for, new_id
from leveret.shared.lifecycle import Wanted
from leveret.shared.messages import DesiredVm, Image, Nic

pytestmark = pytest.mark.unit

VM_ID = new_id()
NIC = Nic(
    network="default",
    mac=mac_for(VM_ID),
    address="10.80.0.7",
    prefix=20,
    gateway="10.80.0.1",
)
DNS = ("9.9.9.9", "1.1.1.1")
KEYS = ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA one@example", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB")


def wish(user_data: bytes | None = b"#!/bin/sh\n", *, token: int = 1, nic: Nic | None = NIC, **more: Any) -> DesiredVm:
    return DesiredVm(
        vm_id=VM_ID,
        host_epoch=1,
        project="demo",
        name="web-1",
        generation=1,
        token=token,
        wanted=Wanted.RUNNING,
        may_build=True,
        restarts=0,
        grace_s=1,
        vcpus=1,
        memory_mib=128,
        disk_gib=1,
        image=Image(url="file:///i", sha256="0" * 64, format="qcow2"),
        ssh_keys=KEYS,
        user_data_base64=None if user_data is None else base64.b64encode(user_data).decode(),
        nic=nic,
        deadline_s=60,
        **more,
    )


def read(path: Path) -> dict[str, bytes]:
    """The files of the drive by their Rock Ridge names; the Joliet ones must hold the same."""
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    found = {}
    for child in iso.list_children(rr_path="/openstack/latest"):
        if not child.is_file():
            continue
        name = child.rock_ridge.name().decode()
        by_joliet, by_rock_ridge = io.BytesIO(), io.BytesIO()
        iso.get_file_from_iso_fp(by_rock_ridge, rr_path=f"/openstack/latest/{name}")
        iso.get_file_from_iso_fp(by_joliet, joliet_path=f"/openstack/latest/{name}")
        assert by_joliet.getvalue() == by_rock_ridge.getvalue()
        found[name] = by_rock_ridge.getvalue()
    iso.close()
    return found


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(user_data=st.binary(max_size=5000))
def test_user_data_is_read_back_byte_for_byte(tmp_path: Path, user_data: bytes) -> None:
    path = tmp_path / "config.iso"
    path.unlink(missing_ok=True)

    config_drive.write(path, wish(user_data), DNS)

    assert read(path)["user_data"] == user_data


@pytest.mark.parametrize("size_bytes", [2047, 2048, 2049, MAX_USER_DATA_BYTES])
def test_user_data_of_every_size_up_to_the_limit_fits(tmp_path: Path, size_bytes: int) -> None:
    user_data = os.urandom(size_bytes)

    config_drive.write(tmp_path / "config.iso", wish(user_data), DNS)

    assert read(tmp_path / "config.iso")["user_data"] == user_data


def test_a_vm_without_user_data_has_no_such_file(tmp_path: Path) -> None:
    config_drive.write(tmp_path / "config.iso", wish(None), DNS)

    assert set(read(tmp_path / "config.iso")) == {"meta_data.json", "network_data.json"}


def test_the_guest_learns_its_name_its_id_and_its_keys(tmp_path: Path) -> None:
    config_drive.write(tmp_path / "config.iso", wish(), DNS)

    meta = json.loads(read(tmp_path / "config.iso")["meta_data.json"])
    assert meta["uuid"] == str(VM_ID)
    assert meta["hostname"] == meta["name"] == "web-1"
    assert tuple(meta["public_keys"].values()) == KEYS
    assert tuple(key["data"] for key in meta["keys"]) == KEYS


def test_the_guest_learns_its_network(tmp_path: Path) -> None:
    config_drive.write(tmp_path / "config.iso", wish(), DNS)

    found = json.loads(read(tmp_path / "config.iso")["network_data.json"])
    (link,), (network,) = found["links"], found["networks"]
    assert link["ethernet_mac_address"] == NIC.mac
    assert network["link"] == link["id"]
    assert (network["type"], network["ip_address"], network["netmask"]) == ("ipv4", "10.80.0.7", "255.255.240.0")
    assert network["routes"] == [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.80.0.1"}]
    assert [service["address"] for service in found["services"]] == ["9.9.9.9", "1.1.1.1"]


def test_a_vm_without_an_interface_has_empty_network_data() -> None:
    assert config_drive.network_data(None, ()) == {"links": [], "networks": [], "services": []}


def test_the_drive_is_private_whatever_the_umask(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        config_drive.write(tmp_path / "config.iso", wish(), DNS)
    finally:
        os.umask(former)

    assert (tmp_path / "config.iso").stat().st_mode & 0o777 == 0o600


def test_the_drive_is_never_open_to_others_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    write_bytes = Path.write_bytes

    def spied(self: Path, data: bytes) -> int:
        modes.append(self.stat().st_mode & 0o777)
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", spied)
    former = os.umask(0)
    try:
        config_drive.write(tmp_path / "config.iso", wish(), DNS)
    finally:
        os.umask(former)

    assert modes == [0o600]


def test_the_drive_is_large_enough_for_busybox_and_has_the_known_label(tmp_path: Path) -> None:
    config_drive.write(tmp_path / "config.iso", wish(None), DNS)

    drive = (tmp_path / "config.iso").read_bytes()
    assert len(drive) >= 256 * 1024
    assert drive[32808:32816] == b"config-2"


def test_a_drive_of_the_same_placement_keeps_user_data_that_is_wiped_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "config.iso"
    config_drive.write(path, wish(b"#!/bin/sh\n", token=4), DNS)

    config_drive.write(path, wish(None, token=4), DNS)

    assert read(path)["user_data"] == b"#!/bin/sh\n"


def test_a_drive_of_another_placement_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "config.iso"
    config_drive.write(path, wish(b"old", token=4), DNS)

    config_drive.write(path, wish(b"new", token=5), DNS)

    assert read(path)["user_data"] == b"new"
    assert config_drive.token_of(path) == 5


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 300_000], ids=["empty", "short", "no ISO"])
def test_what_is_no_drive_of_ours_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.iso"
    path.write_bytes(content)

    config_drive.write(path, wish(b"new"), DNS)

    assert read(path)["user_data"] == b"new"


def test_a_writer_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "config.iso.tmp").write_bytes(b"half")

    config_drive.write(tmp_path / "config.iso", wish(b"new"), DNS)

    assert [path.name for path in tmp_path.iterdir()] == ["config.iso"]


def test_a_failing_write_leaves_neither_a_drive_nor_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        config_drive.write(tmp_path / "config.iso", wish(), DNS)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [0, 1, 2**63 - 1])
def test_the_token_can_be_read_without_understanding_the_file_system(tmp_path: Path, token: int) -> None:
    config_drive.write(tmp_path / "config.iso", wish(token=token), DNS)

    assert config_drive.token_of(tmp_path / "config.iso") == token
