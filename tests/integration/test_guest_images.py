"""The guest images keep their contract (deploy/images/README.md), booted by QEMU alone, without libvirt."""

import io
import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pycdlib
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
MAC = "52:54:00:0a:50:07"
INSTANCE_ID = "0199f0aa-5c1e-7d60-9b7e-3f1d2c4b5a69"
READY = r"LEVERET-GUEST-READY (\S+) (\S+)\r?\n"
NETWORK_DATA = {
    "links": [{"id": "nic0", "type": "phy", "ethernet_mac_address": MAC.upper(), "mtu": 1400}],
    "networks": [
        {
            "id": "net0",
            "link": "nic0",
            "type": "ipv4",
            "ip_address": "10.80.3.7",
            "netmask": "255.255.0.0",
            "routes": [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.80.0.1"}],
        }
    ],
    "services": [{"type": "dns", "address": "10.80.0.3"}],
}


def image(name: str, *options: str) -> Path:
    """Build or find an image; the path that script/guest-images prints."""
    printed = subprocess.run(
        [ROOT / "script/guest-images", *options], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    paths = {line.split(" ")[0]: Path(line.split(" ")[1]) for line in printed.splitlines()}
    return paths[name]


def write_config_drive(path: Path, *, public_key: str, user_data: bytes, network: bool = True) -> None:
    meta_data = {"uuid": INSTANCE_ID, "hostname": "hare-1", "name": "hare-1", "public_keys": {"a key": public_key}}
    files = {"meta_data.json": json.dumps(meta_data).encode(), "user_data": user_data}
    if network:
        files["network_data.json"] = json.dumps(NETWORK_DATA).encode()
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, vol_ident="config-2", rock_ridge="1.09", joliet=3)
    iso.add_directory("/OPENSTACK", rr_name="openstack", joliet_path="/openstack")
    iso.add_directory("/OPENSTACK/LATEST", rr_name="latest", joliet_path="/openstack/latest")
    for number, (name, body) in enumerate(files.items()):
        iso.add_fp(
            io.BytesIO(body),
            len(body),
            f"/OPENSTACK/LATEST/FILE{number}.;1",
            rr_name=name,
            joliet_path=f"/openstack/latest/{name}",
        )
    iso.write(str(path))
    iso.close()


class Guest:
    """One virtual machine on an overlay, with a static address behind QEMU's user networking."""

    def __init__(self, directory: Path, base: Path, *, memory_mib: int = 128) -> None:
        self.directory = directory
        self.memory_mib = memory_mib
        self.qemu: subprocess.Popen[bytes] | None = None
        self.key = directory / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        backing = ["-f", "qcow2", "-F", "qcow2", "-b", str(base)]
        subprocess.run(["qemu-img", "create", "-q", *backing, directory / "disk", "3G"], check=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.ssh_port: int = free.getsockname()[1]

    def configure(self, user_data: bytes, *, network: bool = True) -> None:
        public_key = self.key.with_suffix(".pub").read_text()
        drive = self.directory / "config-drive"
        write_config_drive(drive, public_key=public_key, user_data=user_data, network=network)

    def start(self) -> None:
        here = self.directory
        (here / "console.log").unlink(missing_ok=True)
        network = f"user,id=net,net=10.80.0.0/16,host=10.80.0.1,hostfwd=tcp:127.0.0.1:{self.ssh_port}-10.80.3.7:22"
        arguments = {
            "-accel": ["tcg,tb-size=32"],
            "-m": [str(self.memory_mib)],
            "-display": ["none"],
            "-drive": [
                f"file={here}/disk,format=qcow2,if=virtio",
                f"file={here}/config-drive,format=raw,if=virtio,readonly=on",
            ],
            "-netdev": [network],
            "-device": [f"virtio-net-pci,netdev=net,mac={MAC}", "virtio-rng-pci"],
            "-chardev": [f"socket,id=console,path={here}/console,server=on,wait=off,logfile={here}/console.log"],
            "-serial": ["chardev:console"],
            "-monitor": [f"unix:{here}/monitor,server=on,wait=off"],
        }
        flat = [word for option, values in arguments.items() for value in values for word in (option, value)]
        self.qemu = subprocess.Popen(["qemu-system-x86_64", "-nodefaults", *flat])

    def console(self) -> str:
        log = self.directory / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def wait_console(self, pattern: str, *, timeout_s: float = 60) -> re.Match[str]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.console()):
                return found
            time.sleep(0.1)
        pytest.fail(f"the console never showed {pattern!r}:\n{self.console()[-3000:]}")

    def type(self, name: str, text: str) -> None:
        """Send text to the socket called `name`: the console or QEMU's monitor."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(self.directory / name))
            channel.sendall(text.encode())
            time.sleep(0.5)  # QEMU drops what it has not yet read when we hang up

    def ssh(self, command: str, *, user: str = "root") -> str:
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "IdentitiesOnly=yes", "BatchMode=yes"]
        flags = [word for option in options for word in ("-o", option)]
        target = ["-i", str(self.key), "-p", str(self.ssh_port), f"{user}@127.0.0.1"]
        result = subprocess.run(
            ["ssh", "-q", *flags, *target, command], capture_output=True, text=True, timeout=60, check=True
        )
        return result.stdout

    def press_power_button(self) -> float:
        """Returns the seconds until the machine was off."""
        assert self.qemu is not None
        pressed = time.monotonic()
        self.type("monitor", "system_powerdown\n")
        assert self.qemu.wait(timeout=30) == 0
        return time.monotonic() - pressed

    def destroy(self) -> None:
        if self.qemu is not None:
            self.qemu.kill()
            self.qemu.wait()


@pytest.fixture(scope="module")
def appliance() -> Path:
    return image("appliance")


@pytest.fixture
def guest(tmp_path: Path, appliance: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path, appliance)
    yield guest
    guest.destroy()


def test_the_images_are_named_at_once_when_they_are_cached(appliance: Path) -> None:
    name, path, digest = subprocess.check_output([ROOT / "script/guest-images", "--print"], text=True).split()
    assert (name, path) == ("appliance", str(appliance))
    assert subprocess.check_output(["sha256sum", path], text=True).split()[0] == digest


def test_the_appliance_is_the_guest_of_its_config_drive_and_remembers_it(guest: Guest) -> None:
    guest.configure(b"#!/bin/sh\necho ran-as $(id -un) on $(hostname)\n")
    guest.start()
    ready = guest.wait_console(READY)
    assert ready.groups() == ("hare-1", "10.80.3.7")
    assert f"hostname=hare-1 address=10.80.3.7/16 instance-id={INSTANCE_ID}" in guest.console()
    assert "ran-as root on hare-1" in guest.console()
    assert guest.ssh("uname -n; cat /sys/class/net/eth0/mtu; cat /etc/resolv.conf").split() == [
        "hare-1",
        "1400",
        "nameserver",
        "10.80.0.3",
    ]
    assert "default via 10.80.0.1" in guest.ssh("ip route")
    guest.ssh("echo kept >/data/file")

    assert guest.press_power_button() < 5
    guest.start()
    guest.wait_console(READY)
    assert "boot=2" in guest.console()
    assert "user-data: has run at an earlier boot" in guest.console()
    assert guest.ssh("cat /data/file") == "kept\n"

    guest.type("console", "reboot\n")  # the console is a root shell
    guest.wait_console(rf"boot=3(?s:.)*{READY}")


def test_the_appliance_survives_binary_user_data_and_asks_dhcp_when_it_has_no_network_data(guest: Guest) -> None:
    user_data = bytes(range(256)) * 4096
    guest.configure(user_data, network=False)
    guest.start()
    ready = guest.wait_console(READY)
    assert ready.group(1) == "hare-1"
    assert ready.group(2).startswith("10.80.")
    assert f"user-data: {len(user_data)} bytes" in guest.console()


@pytest.mark.slow
def test_debian_with_cloud_init_is_the_guest_of_its_config_drive(tmp_path: Path) -> None:
    guest = Guest(tmp_path, image("debian", "--debian"), memory_mib=512)
    guest.configure(b"#cloud-config\nruncmd: [echo cloud-init-ran-this >/dev/console]\n")
    guest.start()
    try:
        guest.wait_console(r"cloud-init.* finished at .* Datasource DataSourceConfigDrive", timeout_s=300)
        assert "cloud-init-ran-this" in guest.console()
        assert guest.ssh("hostname; sudo id -un", user="debian").split() == ["hare-1", "root"]
        assert "10.80.3.7/16" in guest.ssh("ip -4 addr", user="debian")
        assert guest.press_power_button() < 30
    finally:
        guest.destroy()
