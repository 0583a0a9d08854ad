"""Examples of every document, for /openapi.json and /docs. A test holds them against their models."""

from typing import Any

from leveret.api.problems import RETRY_AFTER_S
from leveret.shared.errors import HINTS, Code

_VM_ID = "0198c5a2-6d4f-7c31-9d0e-3f6f0b8f2a10"
_HOST_ID = "5f0c1f0e-7a53-4f0b-8a8e-0d9a3c6b1e44"
_AT = "2026-11-22T09:30:00Z"

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

VM: dict[str, Any] = {
    "id": _VM_ID,
    "project": "default",
    "name": "k8s-worker-1",
    "state": "running",
    "step": None,
    "desired": "running",
    "generation": 1,
    "observed_generation": 1,
    "vcpus": 2,
    "memory_mib": 4096,
    "disk_gib": 20,
    "image": "debian-12",
    "network": "default",
    "address": "10.77.0.10",
    "mac": "0a:1c:5e:00:12:9f",
    "ssh": {"host": "10.77.0.10", "port": 22},
    "host": "rack1-node3",
    "zone": "zone-a",
    "labels": {"cluster": "blue"},
    "guest_ready": True,
    "problem": None,
    "attempts": 1,
    "created_at": _AT,
    "updated_at": "2026-11-22T09:30:09Z",
}

REQUEST: dict[str, Any] = {
    "request_id": "0198c5a2-6d50-7a02-8c55-1b6f3ac9d0aa",
    "vm_id": _VM_ID,
    "verdict": "accepted",
    "vm": VM | {
        "state": "pending",
        "step": "scheduling",
        "observed_generation": 0,
        "ssh": None,
        "host": None,
        "zone": None,
        "guest_ready": False,
        "attempts": 0,
        "updated_at": _AT,
    },
}  # fmt: skip

EVENT: dict[str, Any] = {
    "seq": 1042,
    "vm_id": _VM_ID,
    "vm_name": "k8s-worker-1",
    "type": "scheduled",
    "state": "building",
    "at": _AT,
    "data": {"host": "rack1-node3", "host_id": _HOST_ID, "attempt": 1},
}

HOST: dict[str, Any] = {
    "id": _HOST_ID,
    "name": "rack1-node3",
    "zone": "zone-a",
    "state": "up",
    "state_reason": None,
    "labels": {"disk": "nvme"},
    "virt_type": "kvm",
    "vcpus": 128,
    "vcpus_used": 2,
    "memory_mib": 126976,
    "memory_mib_used": 4096,
    "disk_gib": 1800,
    "disk_gib_used": 20,
    "vms": 1,
    "heartbeat_at": _AT,
}

IMAGE: dict[str, Any] = {
    "name": "debian-12",
    "url": "https://images.example/debian-12.qcow2",
    "sha256": "9b6c6c5a" * 8,
    "format": "qcow2",
}

#: By the name of the document in /openapi.json.
DOCUMENTS: dict[str, Any] = {
    "CreateVm": CREATE,
    "StartVm": {},
    "StopVm": {"grace_s": 30},
    "RebootVm": {},
    "RetryVm": {},
    "RequestView": REQUEST,
    "VmView": VM,
    "VmPage": {"items": [VM], "next": None},
    "EventPage": {"items": [EVENT], "next": 1042},
    "HostView": HOST,
    "HostPage": {"items": [HOST], "next": None},
    "ImagePage": {"items": [IMAGE], "next": None},
}

_TOLD: dict[Code, dict[str, Any]] = {
    Code.INVALID_REQUEST: {
        "detail": "The document is not valid.",
        "errors": [{"field": "vcpus", "message": "Input should be greater than or equal to 1"}],
    },
    Code.NO_CAPACITY: {
        "detail": "None of 3 hosts can take this VM.",
        "details": {"hosts": 3, "refused_by": {"memory_mib": 2, "zone": 1}},
    },
    Code.UNAVAILABLE: {"detail": "The message broker cannot be reached."},
}


def problem(code: Code, status: int, title: str, docs_url: str) -> dict[str, Any]:
    """What a problem with this code looks like."""
    return {
        "type": f"{docs_url}#{code}",
        "title": title,
        "status": status,
        "code": code.value,
        "detail": title + ".",
        "hint": HINTS[code],
        "request_id": REQUEST["request_id"],
    } | _TOLD.get(code, {})


RETRY_AFTER = str(RETRY_AFTER_S)
