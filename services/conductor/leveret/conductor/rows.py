"""Rows of Postgres as values."""

from dataclasses import dataclass, field, fields
from datetime import datetime
from ipaddress import IPv4Address
from typing import Any
from uuid import UUID

from leveret.shared.errors import Problem
from leveret.shared.lifecycle import Desired, State, Step


@dataclass(frozen=True, slots=True)
class Vm:
    """A row of `vms`. Decisions make a new one of it with `dataclasses.replace`."""

    id: UUID
    project_id: str
    name: str
    spec: dict[str, Any]
    spec_hash: bytes
    labels: dict[str, str]
    vcpus: int
    memory_mib: int
    disk_gib: int
    image: dict[str, str]
    network: str
    mac: str
    address: IPv4Address | None
    desired: Desired
    state: State
    created_at: datetime
    deadline: datetime | None
    generation: int = 1
    group_name: str | None = None
    bundle: UUID | None = None
    restarts: int = 0
    grace_s: int = 60
    host_id: UUID | None = None
    token: int | None = None
    #: Its own place in a group that is spread hard: its host, or its zone.
    seat: str | None = None
    attempts: int = 0
    failed_hosts: tuple[dict[str, Any], ...] = ()
    step: str | None = None
    observed_generation: int = 0
    report_epoch: int = 0
    report_seq: int = 0
    guest_ready: bool = False
    steps: tuple[dict[str, Any], ...] = ()
    ssh: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None
    sent_at: datetime | None = None
    #: What it was last looked at with, in vain; see store.vms.looked_at.
    looked_rooms: int | None = None
    recent_requests: tuple[str, ...] = ()
    #: Whether there was user-data that the guest has read, and that is gone since; the database sets it.
    user_data_wiped: bool = False
    #: When the row was last written; the database sets it.
    updated_at: datetime | None = None

    @classmethod
    def of(cls, row: Any) -> "Vm":
        """From a record with every column of VM_COLUMNS."""
        values = {name: row[name] for name in VM_COLUMNS}
        values["desired"] = Desired(values["desired"])
        values["state"] = State(values["state"])
        for name in ("failed_hosts", "steps", "recent_requests"):
            values[name] = tuple(values[name])
        return cls(**values)

    @property
    def is_made_anew(self) -> bool:
        """Whether its owner wants it on another host, without its disk, when its own is proven to be off."""
        return self.spec.get("on_host_failure") == "restart"

    @property
    def waits_for_capacity(self) -> bool:
        """Whether its owner wants it to wait when there is no room for it."""
        return bool(self.spec.get("wait_for_capacity"))

    @property
    def is_given_up(self) -> bool:
        """Whether it is in error, and its host is to remove what is left of it.

        A host that builds reports the same step when it removes what a failed build left: then nothing is ordered yet.
        """
        return self.state is State.ERROR and self.host_id is not None and self.step == Step.CLEANUP

    @property
    def is_lagging(self) -> bool:
        """Whether its host has still something to do for it."""
        if self.host_id is None:
            return False
        if self.state is State.ERROR:
            return self.is_given_up
        return self.state in {State.BUILDING, State.DELETING} or self.observed_generation < self.generation


VM_COLUMNS = tuple(entry.name for entry in fields(Vm))


#: What no owner sees of a VM.
_NOTES = frozenset(
    {
        "recent_requests",
        "sent_at",
        "report_epoch",
        "report_seq",
        "deadline",
        "grace_s",
        "updated_at",
        "user_data_wiped",
        "seat",
        "bundle",
        "looked_rooms",
    }
)


@dataclass(frozen=True, slots=True)
class Event:
    """A fact to append to the log. `moved_from` is set when it is a move."""

    vm: Vm
    type: str
    data: dict[str, Any] = field(default_factory=dict)
    moved_from: State | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to log that is no part of a VM's life: a request that was refused, or what became of a project."""

    project_id: str
    type: str
    data: dict[str, Any] = field(default_factory=dict)
    vm_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a VM: the row before (None for a new one), the row after, and the facts to log."""

    before: Vm | None
    after: Vm
    events: tuple[Event, ...] = ()

    @property
    def is_visible(self) -> bool:
        """Whether its owner sees another VM now. What Leveret notes for itself makes no new revision of it."""
        return self.before is None or any(
            getattr(self.after, name) != getattr(self.before, name) for name in VM_COLUMNS if name not in _NOTES
        )

    @property
    def gives_up(self) -> bool:
        """Whether a host loses the VM, and gets its capacity back."""
        return self.before is not None and self.before.host_id not in {None, self.after.host_id}


def told(problem: Problem) -> dict[str, Any]:
    """A problem as it stands in a row."""
    return problem.model_dump(mode="json", exclude_defaults=True)
