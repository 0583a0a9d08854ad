"""Example documents of everything that clients send and hear. Tests hold them against models and schemas."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from leveret.shared.errors import HINTS, Code
from leveret.shared.event_types import cloud_type
from leveret.shared.ids import ids_of

VM_ID = "0198c5a2-6d4f-7c31-9d0e-3f6f0b8f2a10"
HOST_ID = "5f0c1f0e-7a53-4f0b-8a8e-0d9a3c6b1e44"
TOKEN_ID = "0198c5a2-7e01-7b53-8f2c-11d0a7c4e9b3"  # noqa: S105  (an id, not a secret)
REQUEST_ID = "0198c5a2-6d50-7a02-8c55-1b6f3ac9d0aa"
AT = "2026-11-22T09:30:00+00:00"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

PROJECT = "default"
USER = "shop"

CREATE: dict[str, Any] = {
    "name": "k8s-worker-1",
    "vcpus": 2,
    "memory_mib": 4096,
    "disk_gib": 20,
    "image": {"name": "debian-12"},
    "ssh_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGVkMjU1MTktZXhhbXBsZS1rZXktb25seS4uLi4u me@laptop"],
    "user_data": "#cloud-config\npackages: [curl]\n",
    "labels": {"cluster": "blue"},
    "placement": {"zones": ["zone-a"], "strategy": "spread"},
}
LARGE: dict[str, Any] = {"vcpus": 4, "memory_mib": 2048, "disk_gib": 40, "image": {"name": "debian-12"}}
CREATE_BY_URL: dict[str, Any] = {
    "image": {"url": "https://images.example/debian-12.qcow2", "sha256": "9b6c6c5a" * 8},
    "running": False,
}
CREATE_SEVERAL: dict[str, Any] = {
    "name": "web",
    "memory_mib": 512,
    "image": {"name": "debian-12"},
    "count": 3,
    "placement": {"group": "web"},
    "wait_for_capacity": True,
}
CREATE_GROUP: dict[str, Any] = {"name": "web", "policy": "spread", "enforcement": "soft", "topology": "host"}


@dataclass(frozen=True, slots=True)
class Example:
    """One message: its body and its headers, under a name that says what it shows."""

    name: str
    summary: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def _asked(**more: str) -> dict[str, str]:
    return {"vm_id": VM_ID, "request_id": REQUEST_ID} | more


#: What clients send, by type. Sent in this order to an installation that knows the image, each one makes sense.
REQUESTS: dict[str, tuple[Example, ...]] = {
    "vm.create.v1": (
        Example(
            "everything",
            "A worker of a cluster, in a zone, with cloud-init",
            CREATE,
            _asked(requested_at="1795339800.125", traceparent=TRACEPARENT),
        ),
        Example("least", "The least that can be said", {"image": {"name": "debian-12"}}, _asked()),
        Example(
            "dry_run", "Would this be accepted? Nothing is claimed, nothing is made", LARGE, _asked(dry_run="true")
        ),
        Example(
            "several", "Three at once, all or none, in a group; to wait if there is no room", CREATE_SEVERAL, _asked()
        ),
        Example("image_by_url", "An image that is not registered; made, but not started", CREATE_BY_URL, _asked()),
    ),
    "vm.update.v1": (
        Example(
            "relabel",
            "Set one label, remove another; all else stays",
            {"labels": {"role": "db", "cluster": None}},
            _asked(if_match="1"),
        ),
        Example("rename", "Call it otherwise", {"name": "k8s-worker-2"}, _asked()),
    ),
    "vm.stop.v1": (
        Example("by_default", "Shut down; switch off after a minute", {}, _asked()),
        Example("in_30_s", "Switch off after half a minute", {"grace_s": 30}, _asked(if_match="3.1795339809000000")),
    ),
    "vm.start.v1": (Example("start", "Let it run again", {}, _asked()),),
    "vm.reboot.v1": (Example("reboot", "Press the reset button", {}, _asked()),),
    "vm.retry.v1": (Example("retry", "Try a VM in `error` again", {}, _asked()),),
    "vm.delete.v1": (Example("delete", "Make it go away", {}, _asked()),),
}


#: What clients send about their project, by type. Sent in this order, between the creates of VMs, each makes sense.
GROUPS: dict[str, tuple[Example, ...]] = {
    "group.create.v1": (
        Example(
            "spread",
            "On as many hosts as there are; soft, so that nothing is refused for its sake",
            CREATE_GROUP,
            {"request_id": REQUEST_ID, "requested_at": "1795339800.125"},
        ),
        Example("least", "Never two on one host", {"name": "database"}, {"request_id": REQUEST_ID}),
    ),
    "group.delete.v1": (
        Example("delete", "Forget a group without VMs", {"name": "database"}, {"request_id": REQUEST_ID}),
    ),
}


def problem(code: Code, message: str, **more: Any) -> dict[str, Any]:
    """A problem with the hint of its code."""
    return {"code": code.value, "message": message, "hint": HINTS[code], **more}


NO_CAPACITY = problem(
    Code.NO_CAPACITY,
    "None of the 3 hosts can take this VM; refused by: zone 1, memory_mib 2.",
    details={
        "hosts": 3,
        "constraints": {"zone": 1, "memory_mib": 2},
        "only": {"zone": 1, "memory_mib": 2},
        "zones": ["zone-a", "zone-b"],
        "fits": [
            {"change": "memory_mib", "value": 2048, "hosts": 1},
            {"change": "zones", "value": "zone-b", "hosts": 1},
        ],
        "largest": {"vcpus": 8, "memory_mib": 2048, "disk_gib": 400},
    },
) | {"hint": "It would fit with 2048 MiB of memory (1 host), or in zone-b (1 host)."}
INVALID = problem(
    Code.INVALID_REQUEST,
    "The document is not valid.",
    details={"errors": [{"field": "vcpus", "message": "Input should be greater than or equal to 1"}]},
)
RATE_LIMITED = problem(Code.RATE_LIMITED, "This project asks for too much at once.", details={"retry_after_s": 0.25})

VERDICTS: tuple[Example, ...] = (
    Example(
        "accepted",
        "Committed. What equals its default is left out",
        {
            "request_id": REQUEST_ID,
            "vm_id": VM_ID,
            "accepted": True,
            "generation": 1,
            "state": "building",
            "name": "k8s-worker-1",
            "address": "10.77.0.10",
        },
    ),
    Example(
        "refused",
        "Not accepted, and why",
        {"request_id": REQUEST_ID, "vm_id": VM_ID, "accepted": False, "problem": NO_CAPACITY},
    ),
    Example(
        "unreadable",
        "A document with a fault; `details.errors` names each",
        {"request_id": REQUEST_ID, "vm_id": VM_ID, "accepted": False, "problem": INVALID},
    ),
    Example(
        "would_be_accepted",
        "The answer to a dry run",
        {
            "request_id": REQUEST_ID,
            "vm_id": VM_ID,
            "accepted": True,
            "dry_run": True,
            "generation": 1,
            "state": "building",
            "name": "k8s-worker-1",
        },
    ),
    Example(
        "several",
        "All that one request asked for, in order; `vm_id` is only what the request is called by",
        {
            "request_id": REQUEST_ID,
            "vm_id": VM_ID,
            "accepted": True,
            "vms": [
                {"id": str(one), "name": f"web-{number}", "state": "building", "address": f"10.77.0.{10 + number}"}
                for number, one in enumerate(ids_of(UUID(VM_ID), 3), start=1)
            ],
        },
    ),
    Example(
        "too_fast",
        "More than the project may ask in this moment; try again after `retry_after_s`",
        {"request_id": REQUEST_ID, "vm_id": VM_ID, "accepted": False, "problem": RATE_LIMITED},
    ),
)

_STEPS = [{"step": "image", "seconds": 1.21}, {"step": "disk", "seconds": 0.04}]
_DISK_FULL = problem(Code.DISK_FULL, "The pool has 3 GiB left.", step="disk", host="rack1-node3")
PLACED = {
    "host": "rack1-node3",
    "host_id": HOST_ID,
    "attempt": 1,
    "looked_at": 12,
    "considered": 9,
    "refused": {"zone": 1, "memory_mib": 2},
    "score": {"room_class": 14.0, "image": 1.0, "room": 0.91},
    "seconds": 0.0004,
}
_HOST = {"host": "rack1-node3", "host_id": HOST_ID}
_TOKEN = {"token_id": TOKEN_ID, "name": "ci"}
_BY = {"request_id": REQUEST_ID, "by": f"broker user {USER}"}
_BY_ADMIN = {"request_id": REQUEST_ID, "by": "token ops of default"}

#: By type in the event log: the state that the VM is in, and what the event says of itself.
_OF_VMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "accepted": ("pending", {"requested_at": AT, **_BY}),
    "pending": ("pending", {"attempt": 1}),
    "waiting": ("pending", {"problem": NO_CAPACITY}),
    "scheduled": ("building", PLACED),
    "progress": ("building", {"step": "config_drive", "steps": _STEPS}),
    "build_failed": ("pending", {"problem": _DISK_FULL, "attempt": 1}),
    "running": ("running", {"steps": [*_STEPS, {"step": "start", "seconds": 0.83}]}),
    "stopped": ("stopped", {"problem": problem(Code.GUEST_SHUTDOWN, "The guest switched itself off.")}),
    "guest_ready": ("running", {}),
    "changed": ("running", {"verb": "stop", **_BY}),
    "settled": ("running", {"restarts": 1}),
    "late": ("deleting", {"problem": problem(Code.DELETE_TIMEOUT, "The host has not yet confirmed it.")}),
    "error": ("error", {"problem": problem(Code.BUILD_FAILED, "3 hosts tried to build VM k8s-worker-1 and failed.")}),
    "deleting": ("deleting", _BY),
    "deleted": ("deleted", {}),
    "rejected": (None, {"problem": NO_CAPACITY, **_BY}),
}
_OF_OTHERS: dict[str, dict[str, Any]] = {
    "project.created": {"quota": {"vms": 20, "vcpus": None, "memory_mib": 65536, "disk_gib": None}, **_BY_ADMIN},
    "project.deleted": _BY_ADMIN,
    "quota.changed": {"quota": {"vms": 40}, **_BY_ADMIN},
    "token.created": {**_TOKEN, "role": "member", "expires_at": None, **_BY_ADMIN},
    "token.revoked": _TOKEN | _BY_ADMIN,
    "amqp_user.added": {"user": USER, "role": "member", **_BY_ADMIN},
    "amqp_user.changed": {"user": USER, "role": "reader", **_BY_ADMIN},
    "amqp_user.removed": {"user": USER, **_BY_ADMIN},
    "host.cordoned": {"reason": "its memory is to be replaced", **_HOST, **_BY_ADMIN},
    "host.uncordoned": _HOST | _BY_ADMIN,
    "host.fenced": {"proof": "power cut at the PDU, outlet 7", **_HOST, **_BY_ADMIN},
    "host.retired": _HOST | _BY_ADMIN,
    "group.created": CREATE_GROUP | _BY,
    "group.deleted": {"name": "database", **_BY},
    "rejected": {"problem": INVALID, **_BY},
}


def _enveloped(event_type: str, subject: str, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": f"{PROJECT}-1042",
        "source": f"/v1/projects/{PROJECT}",
        "type": event_type,
        "subject": subject,
        "time": AT,
        "datacontenttype": "application/json",
        "sequence": "1042",
        "data": data,
    }


def _of_vm(name: str) -> Example:
    state, said = _OF_VMS[name]
    data = {"vm_id": VM_ID, "name": None if state is None else "k8s-worker-1", "state": state, **said}
    body = _enveloped(cloud_type(name, of_vm=True), VM_ID, data)
    return Example(name, "About a VM", body | ({"traceparent": TRACEPARENT} if name == "accepted" else {}))


def _of_other(name: str) -> Example:
    body = _enveloped(cloud_type(name, of_vm=False), PROJECT, _OF_OTHERS[name])
    about = "About a host, ordered by the project" if name.startswith("host.") else "About the project"
    return Example(name.replace(".", "_"), about, body)


#: What clients hear of everything that happens, by CloudEvents type.
EVENTS: dict[str, Example] = {
    example.body["type"]: example for example in [*map(_of_vm, _OF_VMS), *map(_of_other, _OF_OTHERS)]
}
