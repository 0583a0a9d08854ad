"""Examples of every document, for /openapi.json and /docs. A test holds them against their models."""

from typing import Any

from leveret.api import sse
from leveret.shared.documents import EventView
from leveret.shared.errors import HINTS, Code
from leveret.shared.examples import (
    AT,
    CREATE,
    CREATE_GROUP,
    HOST_ID,
    NO_CAPACITY,
    PLACED,
    PROJECT,
    REQUEST_ID,
    TOKEN_ID,
    USER,
    VM_ID,
)

VM: dict[str, Any] = {
    "id": VM_ID,
    "project": PROJECT,
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
    "created_at": AT,
    "updated_at": "2026-11-22T09:30:09Z",
    "on_host_failure": "none",
    "host_silent_since": None,
    "group": None,
}

REQUEST: dict[str, Any] = {
    "request_id": REQUEST_ID,
    "vm_id": VM_ID,
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
        "updated_at": AT,
    },
}  # fmt: skip

EVENT: dict[str, Any] = {
    "seq": 1042,
    "vm_id": VM_ID,
    "vm_name": "k8s-worker-1",
    "type": "scheduled",
    "state": "building",
    "at": AT,
    "data": PLACED,
}

HOST: dict[str, Any] = {
    "id": HOST_ID,
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
    "vms_to_restart": 0,
    "heartbeat_at": AT,
    "clean": None,
    "taints": {},
    "vms_max": None,
    "problem": None,
}

IMAGE: dict[str, Any] = {
    "name": "debian-12",
    "url": "https://images.example/debian-12.qcow2",
    "sha256": "9b6c6c5a" * 8,
    "format": "qcow2",
}

QUOTA: dict[str, Any] = {
    "vms": 20,
    "vcpus": 80,
    "memory_mib": 163840,
    "disk_gib": None,
    "requests_per_s": 500,
    "request_burst": 5000,
}

PROJECT_VIEW: dict[str, Any] = {
    "id": "shop",
    "quota": QUOTA,
    "usage": {"vms": 1, "vcpus": 2, "memory_mib": 4096, "disk_gib": 20},
    "created_at": AT,
}

TOKEN: dict[str, Any] = {
    "id": TOKEN_ID,
    "project": "shop",
    "name": "ci",
    "role": "member",
    "created_at": AT,
    "created_by": f"token ops of {PROJECT}",
    "expires_at": "2027-11-22T00:00:00Z",
    "last_used_at": None,
    "revoked_at": None,
}

AMQP_USER: dict[str, Any] = {
    "name": USER,
    "project": "shop",
    "role": "member",
    "created_at": AT,
    "created_by": f"token ops of {PROJECT}",
}

CHECK_REPORT: dict[str, Any] = {
    "at": AT,
    "seconds": 5.218,
    "broken": 1,
    "hosts_asked": 2,
    "rules": [
        {
            "name": "host_counters_match_placements",
            "says": "What a host's counters say is used is the sum over the VMs that are placed there.",
            "broken": 0,
            "examples": [],
            "repair": "Put right the row by hand if somebody changed it by hand.",
        },
        {
            "name": "vm_has_its_domain",
            "says": "Every VM that is running has a running domain, and every one that is stopped one that is off.",
            "broken": 1,
            "examples": [{"vm_id": VM_ID, "host": "rack1-node3", "state": "running", "found": "no domain"}],
            "repair": "Leveret puts it right by itself; if it stays, look at the log of the conductors.",
        },
    ],
    "unchecked": [{"what": "host rack1-node4", "why": "It is silent."}],
}

GROUP: dict[str, Any] = CREATE_GROUP | {"vms": 3, "created_at": AT}

PLACEMENT: dict[str, Any] = {
    "vm_id": VM_ID,
    "name": "k8s-worker-1",
    "state": "running",
    "host": "rack1-node3",
    "zone": "zone-a",
    "placement": CREATE["placement"],
    "tried": [PLACED | {"at": AT, "problem": None}],
    "problem": None,
}

#: Events as they are told to whoever listens.
STREAM = sse.event(EventView.model_validate(EVENT)).decode()

#: By the name of the document in /openapi.json.
DOCUMENTS: dict[str, Any] = {
    "CreateVm": CREATE,
    "StartVm": {},
    "StopVm": {"grace_s": 30},
    "RebootVm": {},
    "RetryVm": {},
    "UpdateVm": {"name": "k8s-worker-2", "labels": {"role": "db", "cluster": None}},
    "CordonHost": {"reason": "its memory is to be replaced"},
    "UncordonHost": {},
    "FenceHost": {"proof": "power cut at the PDU, outlet 7, and its lights are out"},
    "RetireHost": {},
    "CreateProject": {"quota": {"vms": 20, "vcpus": 80, "memory_mib": 163840}},
    "UpdateQuota": {"vms": 40, "disk_gib": None},
    "CreateToken": {"name": "ci", "role": "member", "expires_at": "2027-11-22T00:00:00Z"},
    "AddAmqpUser": {"role": "member"},
    "CreateGroup": CREATE_GROUP,
    "GroupView": GROUP,
    "GroupPage": {"items": [GROUP], "next": None},
    "PlacementView": PLACEMENT,
    "CapacityReport": {"at": AT, "hosts": 12, "zones": {"zone-a": 140, "zone-b": 96}, "total": 236},
    "ProjectView": PROJECT_VIEW,
    "ProjectPage": {"items": [PROJECT_VIEW], "next": None},
    "TokenPage": {"items": [TOKEN], "next": None},
    "NewTokenView": TOKEN | {"token": "lv_EXAMPLE-of-a-secret-that-is-told-only-once0"},
    "AmqpUserView": AMQP_USER,
    "AmqpUserPage": {"items": [AMQP_USER], "next": None},
    "RequestView": REQUEST,
    "VmView": VM,
    "VmPage": {"items": [VM], "next": None},
    "EventPage": {"items": [EVENT], "next": 1042, "forgotten_seq": 0},
    "WhoamiView": {"project": PROJECT, "role": "member", "token": {"id": TOKEN_ID, "name": "ci", "expires_at": None}},
    "HostView": HOST,
    "HostPage": {"items": [HOST], "next": None},
    "RunCheck": {"hosts": True},
    "CheckReport": CHECK_REPORT,
    "ImagePage": {"items": [IMAGE], "next": None},
}

_TOLD: dict[Code, dict[str, Any]] = {
    Code.INVALID_REQUEST: {
        "detail": "The document is not valid.",
        "errors": [{"field": "vcpus", "message": "Input should be greater than or equal to 1"}],
    },
    Code.NO_CAPACITY: {
        "detail": NO_CAPACITY["message"],
        "hint": NO_CAPACITY["hint"],
        "details": NO_CAPACITY["details"],
    },
    Code.RATE_LIMITED: {"detail": "The project asks for too much at once.", "details": {"retry_after_s": 0.4}},
    Code.QUOTA_EXCEEDED: {
        "detail": "Project 'shop' may have 20 VMs.",
        "details": {"quota": {"vms": {"limit": 20, "used": 20, "wanted": 1}}},
    },
    Code.HOST_CONFLICT: {"detail": "Host rack1-node3 is retired: it cannot be cordoned."},
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
        "request_id": REQUEST_ID,
    } | _TOLD.get(code, {})
