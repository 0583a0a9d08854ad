"""The config drive: an ISO in which a guest finds its name, its keys, its network and its user-data.

OpenStack's layout, volume id `config-2`: cloud-init, ignition, Talos and others read it. All of them take
`openstack/latest`; dated directories announce API versions, of which there is only one here.
"""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pycdlib
from pycdlib.pycdlibexception import PyCdlibException

from leveret.compute.libvirt_driver.paths import FILE_MODE, make_directory, replacing
from leveret.shared.messages import DesiredVm, Nic

VOLUME_ID = "config-2"
#: busybox does not recognise an ISO of less than about 69 KB.
MIN_BYTES = 256 * 1024
#: What `write` raises beside OSError. The texts may repeat values, so they are for nobody to see.
CANNOT = (ValueError, PyCdlibException)
_SECTOR = 2048
#: The primary volume descriptor (ECMA-119, 8.4): offsets of the volume and the application identifier in it.
_DESCRIPTOR_OFFSET = 16 * _SECTOR
_VOLUME_ID = slice(40, 72)
_APPLICATION_ID = slice(574, 702)
_FORMER = "LEVERET TOKEN"


def write(path: Path, vm: DesiredVm, name_servers: Sequence[str]) -> None:
    """Make the drive, readable by its owner only, unless the same placement's is there already. Blocking.

    That one is kept: once the guest is ready its user-data is wiped everywhere else, and a drive made anew would
    have none.
    """
    if token_of(path) == vm.token:
        return
    make_directory(path.parent)
    with replacing(path) as temporary:
        temporary.touch(mode=FILE_MODE)
        temporary.write_bytes(image(files(vm, name_servers), token=vm.token))


def files(vm: DesiredVm, name_servers: Sequence[str]) -> dict[str, bytes]:
    """The drive's files, by name."""
    documents: dict[str, Any] = {
        "meta_data.json": meta_data(vm),
        "network_data.json": network_data(vm.nic, name_servers),
    }
    made = {name: json.dumps(document, indent=1).encode() for name, document in documents.items()}
    if vm.user_data_base64 is not None:
        made["user_data"] = base64.b64decode(vm.user_data_base64, validate=True)
    return made


def meta_data(vm: DesiredVm) -> dict[str, Any]:
    """Who the guest is. cloud-init takes `uuid` for its instance id."""
    keys = {f"key-{number}": key for number, key in enumerate(vm.ssh_keys)}
    return {
        "uuid": str(vm.vm_id),
        "name": vm.name,
        "hostname": vm.name,
        "launch_index": 0,
        "project_id": vm.project,
        "public_keys": keys,
        "keys": [{"name": name, "type": "ssh", "data": key} for name, key in keys.items()],
    }


def network_data(nic: Nic | None, name_servers: Sequence[str]) -> dict[str, Any]:
    """The guest's network, in OpenStack's format."""
    if nic is None:
        return {"links": [], "networks": [], "services": []}
    interface = ip_interface(f"{nic.address}/{nic.prefix}")
    services = [{"type": "dns", "address": server} for server in name_servers]
    anywhere = "0.0.0.0" if interface.version == 4 else "::"  # noqa: S104  (a route, not a socket)
    nothing = "0.0.0.0" if interface.version == 4 else "::"  # noqa: S104
    return {
        "links": [{"id": "nic0", "type": "phy", "ethernet_mac_address": nic.mac, "mtu": None}],
        "networks": [
            {
                "id": "network0",
                "network_id": nic.network,
                "type": f"ipv{interface.version}",
                "link": "nic0",
                "ip_address": nic.address,
                "netmask": str(interface.netmask),
                "routes": [{"network": anywhere, "netmask": nothing, "gateway": nic.gateway}],
                "services": services,
            }
        ],
        "services": services,
    }


def image(contents: Mapping[str, bytes], *, token: int) -> bytes:
    """An ISO 9660 image with Rock Ridge and Joliet names. The placement's token stands in its descriptor."""
    iso = pycdlib.PyCdlib()
    iso.new(
        interchange_level=3,
        vol_ident=VOLUME_ID,
        app_ident_str=f"{_FORMER} {token}",
        rock_ridge="1.09",
        joliet=3,
    )
    iso.add_directory("/OPENSTACK", rr_name="openstack", joliet_path="/openstack")
    iso.add_directory("/OPENSTACK/LATEST", rr_name="latest", joliet_path="/openstack/latest")
    for number, (name, content) in enumerate(contents.items()):
        iso.add_fp(
            io.BytesIO(content),
            len(content),
            f"/OPENSTACK/LATEST/FILE{number}.;1",
            rr_name=name,
            joliet_path=f"/openstack/latest/{name}",
        )
    made = io.BytesIO()
    iso.write_fp(made)
    iso.close()
    return made.getvalue().ljust(MIN_BYTES, b"\0")


def token_of(path: Path) -> int | None:
    """The token of the placement that a drive was made for; None when there is no drive of ours. Blocking."""
    try:
        with path.open("rb") as drive:
            drive.seek(_DESCRIPTOR_OFFSET)
            descriptor = drive.read(_SECTOR)
    except FileNotFoundError:
        return None
    if descriptor[_VOLUME_ID].rstrip(b" \0") != VOLUME_ID.encode():
        return None
    match = re.fullmatch(rb"%s (\d+)[ \0]*" % _FORMER.encode(), descriptor[_APPLICATION_ID])
    return int(match[1]) if match else None
