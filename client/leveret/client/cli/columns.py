"""The tables that people see, and the marks of states."""

import sys
import textwrap
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from leveret.client.cli.output import Column
from leveret.client.cli.values import age

if TYPE_CHECKING:
    from leveret.shared.documents import HostView, VmView

_NOTE_CHARS = 44
_STATE_STYLES = {
    "running": "green",
    "up": "green",
    "pending": "magenta",
    "building": "magenta",
    "deleting": "magenta",
    "cordoned": "magenta",
    "draining": "magenta",
    "stopped": "dim",
    "deleted": "dim",
    "retired": "dim",
    "error": "red",
    "silent": "red",
    "fenced": "red",
}


def state_style(text: str) -> str:
    return _STATE_STYLES.get(text.partition(" ")[0], "")


def state_text(vm: "VmView") -> str:
    """The state, what is being done, and the other wish when it is not yet so."""
    if vm.host_silent_since and vm.state != "error":
        return f"{vm.state} (host silent)"
    if vm.step and vm.state in {"pending", "building", "running", "stopped", "deleting", "error"}:
        return f"{vm.state} ({vm.step.replace('_', ' ')})"
    if vm.problem and (vm.state == "error" or (vm.state == "stopped" and vm.desired == "running")):
        return f"{vm.state} ({vm.problem.code})"
    return vm.state.value


def memory_text(memory_mib: int) -> str:
    return f"{memory_mib // 1024}G" if memory_mib % 1024 == 0 else f"{memory_mib}M"


def size_text(vm: "VmView") -> str:
    return f"{vm.vcpus} vCPU, {memory_text(vm.memory_mib)}, {vm.disk_gib}G disk"


def host_state_text(host: "HostView") -> str:
    """The state, and of a fenced host whether it could be let work again."""
    if host.clean is None:
        return host.state
    return f"{host.state} ({'clean' if host.clean else 'not clean'})"


def seconds_since(at: datetime) -> float:
    return (datetime.now(UTC) - at).total_seconds()


def age_text(at: datetime) -> str:
    return age(seconds_since(at))


def local_time(at: datetime) -> str:
    return at.astimezone().strftime("%H:%M:%S.%f")[:-3]


def _used(used: int, cap: int) -> str:
    return f"{used}/{cap}"


def _used_memory(host: "HostView") -> str:
    return f"{host.memory_mib_used / 1024:.1f}/{host.memory_mib / 1024:.1f}G"


def used_memory_text(host: "HostView") -> str:
    return f"{host.memory_mib_used / 1024:.1f} of {host.memory_mib / 1024:.1f}G"


def _note(host: "HostView") -> str:
    """Why it is in its state. A proof may be long: on a terminal it is shortened, and `host show` has all of it."""
    note = host.state_reason or (host.problem.message if host.problem else "")
    return textwrap.shorten(note, _NOTE_CHARS, placeholder="...") if sys.stdout.isatty() else note


def _taints(host: "HostView") -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(host.taints.items())) or "-"


VM_COLUMNS = (
    Column("NAME", lambda vm: vm.name, style=lambda _: "bold"),
    Column("STATE", state_text, style=state_style),
    Column("ADDRESS", lambda vm: str(vm.address or "-"), rank=1),
    Column("HOST", lambda vm: vm.host or "-", rank=2),
    Column("VCPUS", lambda vm: str(vm.vcpus), rank=5),
    Column("MEMORY", lambda vm: memory_text(vm.memory_mib), rank=4),
    Column("DISK", lambda vm: f"{vm.disk_gib}G", rank=6),
    Column("IMAGE", lambda vm: vm.image.rpartition("/")[2], rank=7),
    Column("AGE", lambda vm: age_text(vm.created_at), rank=3),
)

HOST_COLUMNS = (
    Column("NAME", lambda host: host.name, style=lambda _: "bold"),
    Column("STATE", host_state_text, style=state_style),
    Column("ZONE", lambda host: host.zone, rank=6),
    Column("TYPE", lambda host: host.virt_type, rank=5),
    Column("VMS", lambda host: str(host.vms) if host.vms_max is None else _used(host.vms, host.vms_max)),
    Column("VCPUS", lambda host: _used(host.vcpus_used, host.vcpus), rank=2),
    Column("MEMORY", _used_memory, rank=3),
    Column("DISK", lambda host: f"{_used(host.disk_gib_used, host.disk_gib)}G", rank=4),
    Column("TAINTS", _taints, rank=8),
    Column("HEARD", lambda host: f"{age_text(host.heartbeat_at)} ago", rank=7),
    Column("NOTE", _note, rank=1),
)

IMAGE_COLUMNS = (
    Column("NAME", lambda image: image.name, style=lambda _: "bold"),
    Column("FORMAT", lambda image: image.format, rank=1),
    Column("SHA256", lambda image: image.sha256[:12], rank=2),
    Column("URL", lambda image: image.url, rank=3),
)
