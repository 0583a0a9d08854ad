"""All that there is at one moment: rows, log, queues, and what hypervisors and disks really hold.

Ids are texts, as they stand in the history. A snapshot can be written down and judged again later.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Vm(_Fact):
    """A row of `vms`. `late_s` is how far it is past its deadline; negative before it, None without one."""

    id: str
    project: str
    state: str
    desired: str
    step: str | None = None
    generation: int = 1
    observed_generation: int = 1
    host_id: str | None = None
    token: int | None = None
    restarts: int = 0
    labels: dict[str, str] = {}
    vcpus: int = 1
    memory_mib: int = 128
    disk_gib: int = 1
    address: str | None = None
    code: str | None = None
    late_s: float | None = None
    recent_requests: tuple[str, ...] = ()

    @property
    def is_at_rest(self) -> bool:
        return self.late_s is None and self.state in {"running", "stopped", "error", "deleted"}


class Event(_Fact):
    """A row of `events`; the last fields are from its data."""

    id: int
    project: str
    seq: int | None
    vm_id: str | None
    type: str
    state: str | None = None
    moved_from: str | None = None
    request_id: str | None = None
    verb: str | None = None
    code: str | None = None


class Refused(_Fact):
    """A row of `rejections`."""

    vm_id: str
    project: str
    request_id: str
    code: str | None


class Tombstone(_Fact):
    """A row of `tombstones`: deleted before it was created."""

    vm_id: str
    project: str


class Host(_Fact):
    """A row of `hosts`: what may be placed, and what its counters say is."""

    id: str
    name: str
    state: str
    vcpus: int
    vcpus_used: int
    memory_mib: int
    memory_mib_used: int
    disk_gib: int
    disk_gib_used: int


class Quota(_Fact):
    """A row of `quotas`."""

    project: str
    vms_max: int | None
    vms_used: int
    vcpus_used: int
    memory_mib_used: int
    disk_gib_used: int


class Address(_Fact):
    """An address that is taken."""

    address: str
    vm_id: str


class Domain(_Fact):
    """What a hypervisor has of a VM, whatever anybody says."""

    host_id: str
    vm_id: str
    token: int | None
    running: bool


class Files(_Fact):
    """A VM that has files on a host."""

    host_id: str
    vm_id: str


class Queue(_Fact):
    """A queue of the broker's."""

    name: str
    messages: int
    consumers: int


class Watched(_Fact):
    """The numbers of the events that one watcher was told of, in the order in which it was told.

    It began to listen after the event number `since`.
    """

    watcher: str
    project: str
    since: int
    seqs: tuple[int, ...]


class Check(_Fact):
    """What the product says of itself: rules that are broken, and what could not be looked at."""

    broken: dict[str, list[dict[str, Any]]] = {}
    unchecked: tuple[str, ...] = ()
    hosts_asked: int = 0


class Snapshot(_Fact):
    """Everything. `entries` is how long the history was then; `qemus` are the guests' processes, by the ids in their
    command lines; `oddities` are files in a pool that belong to no VM and to no cache.
    """

    entries: int = 0

    vms: tuple[Vm, ...] = ()
    events: tuple[Event, ...] = ()
    refused: tuple[Refused, ...] = ()
    tombstones: tuple[Tombstone, ...] = ()
    hosts: tuple[Host, ...] = ()
    quotas: tuple[Quota, ...] = ()
    addresses: tuple[Address, ...] = ()
    domains: tuple[Domain, ...] = ()
    files: tuple[Files, ...] = ()
    oddities: tuple[str, ...] = ()
    qemus: tuple[str, ...] = ()
    queues: tuple[Queue, ...] = ()
    client_queues: tuple[str, ...] = ()
    watched: tuple[Watched, ...] = ()
    check: Check = Check()
