"""The tables that people see, and the marks of states."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from leveret.client.cli.output import Column, paint
from leveret.client.cli.values import age

if TYPE_CHECKING:
    from leveret.shared.documents import EventView, HostView, VmView

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

#: A name that was made up has at most so many characters; a longer one only moves what follows it.
_SUBJECT_WIDTH = 18
_TYPE_WIDTH = 12
_QUOTA_ORDER = ("vms", "vcpus", "memory_mib", "disk_gib", "requests_per_s", "request_burst")


def state_style(text: str) -> str:
    return _STATE_STYLES.get(text.partition(" ")[0], "")


def state_text(vm: "VmView") -> str:
    """The state, what is being done, and the other wish when it is not yet so."""
    if vm.step and vm.state in {"pending", "building", "running", "stopped", "deleting", "error"}:
        return f"{vm.state} ({vm.step.replace('_', ' ')})"
    if vm.problem and (vm.state == "error" or (vm.state == "stopped" and vm.desired == "running")):
        return f"{vm.state} ({vm.problem.code})"
    return vm.state.value


def memory_text(memory_mib: int) -> str:
    return f"{memory_mib // 1024}G" if memory_mib % 1024 == 0 else f"{memory_mib}M"


def size_text(vm: "VmView") -> str:
    return f"{vm.vcpus} vCPU, {memory_text(vm.memory_mib)}, {vm.disk_gib}G disk"


def age_text(at: datetime) -> str:
    return age((datetime.now(UTC) - at).total_seconds())


def local_time(at: datetime) -> str:
    return at.astimezone().strftime("%H:%M:%S.%f")[:-3]


def event_note(event: "EventView") -> str:
    """What there is to say of an event beside its type."""
    problem = event.data.get("problem") or {}
    if problem:
        return f"{problem.get('message', '')} ({problem.get('code', '?')})"
    if "." in event.type:
        return _administration_note(event.data)
    if event.type == "progress":
        done = ", ".join(f"{one['step']} {float(one['seconds']):.2f} s" for one in event.data.get("steps", ()))
        step = str(event.data.get("step") or "").replace("_", " ")
        return f"{step} (done: {done})" if done else step
    if event.type == "changed" and "labels" in event.data:
        labels = ", ".join(f"{key}={value}" for key, value in sorted(event.data["labels"].items()))
        return f"{event.data.get('verb', '')}: called {event.data.get('name')}, {labels or 'no labels'}"
    parts = {"scheduled": "host", "changed": "verb"}
    return str(event.data.get(parts.get(event.type, ""), ""))


def _administration_note(data: dict[str, Any]) -> str:
    """Of an event about a project itself: what it concerns, and who did it."""
    about = [str(data[key]) for key in ("name", "user") if data.get(key)]
    if data.get("role"):
        about.append(f"as {data['role']}")
    if data.get("expires_at"):
        about.append(f"until {datetime.fromisoformat(data['expires_at']).astimezone():%Y-%m-%d %H:%M}")
    quota = data.get("quota") or {}
    known = [name for name in _QUOTA_ORDER if name in quota] + sorted(quota.keys() - set(_QUOTA_ORDER))
    about += [f"{name}={'none' if quota[name] is None else quota[name]}" for name in known]
    by = f"(by {data['by']})" if data.get("by") else ""
    return " ".join([*about, by]).strip()


def event_subject(event: "EventView") -> str:
    """The VM that an event is about: its name, else its id; a dash for what is about the project itself."""
    return event.vm_name or (str(event.vm_id) if event.vm_id else "-")


def event_line(event: "EventView", *, with_name: bool) -> str:
    name = f"{event_subject(event).ljust(_SUBJECT_WIDTH)}  " if with_name else ""
    style = state_style("error" if event.type in {"error", "build_failed", "rejected"} else event.type)
    line = f"{paint(local_time(event.at), 'dim')}  {name}{paint(event.type, style)}"
    note = event_note(event)
    return f"{line}{' ' * (_TYPE_WIDTH - len(event.type))}  {note}" if note else line


def _used(used: int, cap: int) -> str:
    return f"{used}/{cap}"


def _used_memory(host: "HostView") -> str:
    return f"{host.memory_mib_used / 1024:.1f}/{host.memory_mib / 1024:.1f}G"


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
    Column("STATE", lambda host: host.state, style=state_style),
    Column("ZONE", lambda host: host.zone, rank=5),
    Column("TYPE", lambda host: host.virt_type, rank=4),
    Column("VMS", lambda host: str(host.vms)),
    Column("VCPUS", lambda host: _used(host.vcpus_used, host.vcpus), rank=1),
    Column("MEMORY", _used_memory, rank=2),
    Column("DISK", lambda host: f"{_used(host.disk_gib_used, host.disk_gib)}G", rank=3),
    Column("HEARD", lambda host: f"{age_text(host.heartbeat_at)} ago", rank=6),
    Column("NOTE", lambda host: host.state_reason or "", rank=7),
)

IMAGE_COLUMNS = (
    Column("NAME", lambda image: image.name, style=lambda _: "bold"),
    Column("FORMAT", lambda image: image.format, rank=1),
    Column("SHA256", lambda image: image.sha256[:12], rank=2),
    Column("URL", lambda image: image.url, rank=3),
)
