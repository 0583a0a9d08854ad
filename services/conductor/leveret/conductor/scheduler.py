"""Where VMs go: a pure function over a snapshot of the hosts.

Filter, score, choose. Races are not its business: the claim in SQL decides them, and a loser comes again with a new
snapshot.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from leveret.shared.documents import Placement
from leveret.shared.errors import Code, Problem


@dataclass(slots=True)
class HostSnapshot:
    """A host and what is free on it. The scheduler books what it places, so that a batch does not pile up.

    `healthy` is false while the host itself reports a problem, such as a libvirtd that does not answer.
    """

    id: UUID
    name: str
    zone: str
    state: str
    healthy: bool
    labels: Mapping[str, str]
    vcpus: int
    memory_mib: int
    disk_gib: int
    vcpus_free: int
    memory_mib_free: int
    disk_gib_free: int


@dataclass(frozen=True, slots=True)
class Wish:
    """What one VM needs. `avoid` are hosts that failed to build it."""

    vcpus: int
    memory_mib: int
    disk_gib: int
    placement: Placement = field(default_factory=Placement)
    avoid: frozenset[UUID] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class Refused:
    """Nobody takes it. `constraints` counts the hosts that each constraint refuses; a host may be in several."""

    hosts: int
    constraints: Mapping[str, int]
    zones: Sequence[str]
    largest: Mapping[str, int] | None

    def problem(self) -> Problem:
        """The answer to "why not?"."""
        counts = ", ".join(f"{name} {count}" for name, count in self.constraints.items())
        nobody = "The only host cannot" if self.hosts == 1 else f"None of the {self.hosts} hosts can"
        message = f"{nobody} take this VM; refused by: {counts}." if self.hosts else "There is no host."
        hint = f"Zones there are: {', '.join(self.zones)}." if "zone" in self.constraints else None
        if self.largest is not None and hint is None:
            hint = "The most that one host has free: {vcpus} vcpus, {memory_mib} MiB, {disk_gib} GiB.".format(
                **self.largest
            )
        details: dict[str, Any] = {"hosts": self.hosts, "constraints": dict(self.constraints)}
        if self.largest is not None:
            details["largest"] = dict(self.largest)
        return Problem.of(Code.NO_CAPACITY, message, hint=hint, **details)


def _state(host: HostSnapshot, _wish: Wish) -> bool:
    return host.state == "up"


def _healthy(host: HostSnapshot, _wish: Wish) -> bool:
    return host.healthy


def _failed_before(host: HostSnapshot, wish: Wish) -> bool:
    return host.id not in wish.avoid


def _zone(host: HostSnapshot, wish: Wish) -> bool:
    return not wish.placement.zones or host.zone in wish.placement.zones


def _required_labels(host: HostSnapshot, wish: Wish) -> bool:
    return all(host.labels.get(key) == value for key, value in wish.placement.require_labels.items())


def _forbidden_labels(host: HostSnapshot, wish: Wish) -> bool:
    return not any(host.labels.get(key) == value for key, value in wish.placement.forbid_labels.items())


def _vcpus(host: HostSnapshot, wish: Wish) -> bool:
    return wish.vcpus <= host.vcpus_free


def _memory(host: HostSnapshot, wish: Wish) -> bool:
    return wish.memory_mib <= host.memory_mib_free


def _disk(host: HostSnapshot, wish: Wish) -> bool:
    return wish.disk_gib <= host.disk_gib_free


Filter = Callable[[HostSnapshot, Wish], bool]

#: What does not change while a batch is placed, and what does.
ELIGIBLE: dict[str, Filter] = {
    "state": _state,
    "hypervisor": _healthy,
    "failed_before": _failed_before,
    "zone": _zone,
    "required_labels": _required_labels,
    "forbidden_labels": _forbidden_labels,
}
FITTING: dict[str, Filter] = {"vcpus": _vcpus, "memory_mib": _memory, "disk_gib": _disk}
FILTERS = ELIGIBLE | FITTING


def choose(wish: Wish, hosts: Sequence[HostSnapshot], rng: random.Random) -> HostSnapshot | Refused:
    """The host for one VM, booked in the snapshot; or why there is none."""
    checks = tuple(FILTERS.values())
    spread = wish.placement.strategy == "spread"
    best: HostSnapshot | None = None
    best_score = (0.0, 0.0)
    for host in hosts:
        if not all(check(host, wish) for check in checks):
            continue
        room = _room_left(host, wish)
        score = (room if spread else -room, rng.random())
        if best is None or score > best_score:
            best, best_score = host, score
    if best is None:
        return _refused(wish, hosts)
    best.vcpus_free -= wish.vcpus
    best.memory_mib_free -= wish.memory_mib
    best.disk_gib_free -= wish.disk_gib
    return best


def _room_left(host: HostSnapshot, wish: Wish) -> float:
    """The scarcest resource's free share once the VM is there, from 0 to 1."""
    return min(
        (host.vcpus_free - wish.vcpus) / host.vcpus,
        (host.memory_mib_free - wish.memory_mib) / host.memory_mib,
        (host.disk_gib_free - wish.disk_gib) / host.disk_gib,
    )


def _refused(wish: Wish, hosts: Sequence[HostSnapshot]) -> Refused:
    counts = {name: sum(not check(host, wish) for host in hosts) for name, check in FILTERS.items()}
    eligible = [host for host in hosts if all(check(host, wish) for check in ELIGIBLE.values())]
    roomiest = max(eligible, key=lambda host: (host.memory_mib_free, host.vcpus_free), default=None)
    largest = None
    if roomiest is not None:
        largest = {
            "vcpus": roomiest.vcpus_free,
            "memory_mib": roomiest.memory_mib_free,
            "disk_gib": roomiest.disk_gib_free,
        }
    zones = sorted({host.zone for host in hosts})
    return Refused(len(hosts), {name: count for name, count in counts.items() if count}, zones, largest)
