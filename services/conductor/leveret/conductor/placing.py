"""Placing VMs: choose from a snapshot, then claim under lock. Who loses the race comes again."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from leveret.conductor import decisions, scheduling
from leveret.conductor.database import Connection
from leveret.conductor.decisions import Limits
from leveret.conductor.rows import Change, Vm
from leveret.conductor.scheduling import Chosen, Fleet, GroupView, Host, Refused, Wish
from leveret.conductor.store import groups, hosts, vms
from leveret.shared.documents import Placement
from leveret.shared.errors import Code, Problem

#: Seconds for which what is known of hosts is good enough to choose by.
KEPT_S = 1.0

#: Some VMs that are placed all together, or not at all. Most are alone.
Bundle = Sequence[Vm]


@dataclass(frozen=True, slots=True)
class Placed:
    """Every VM of a bundle has a host, once these changes are recorded."""

    changes: tuple[Change, ...]


#: What became of a bundle: None when somebody else filled a host meanwhile, so that it is to be tried again.
Outcome = Placed | Problem | None


@dataclass(frozen=True, slots=True)
class _Choice:
    """A bundle with a host for each of its VMs, in the same order, and what that took, in seconds a VM."""

    bundle: Bundle
    wishes: tuple[Wish, ...]
    chosen: tuple[Chosen, ...]
    group: GroupView | None
    seconds: float


class Sized(Protocol):
    """What has the sizes of a VM."""

    @property
    def vcpus(self) -> int: ...
    @property
    def memory_mib(self) -> int: ...
    @property
    def disk_gib(self) -> int: ...


def wish_in(placement: Placement, size: Sized) -> Wish:
    """What a VM of this size needs of a host, but for its group."""
    return Wish(
        vcpus=size.vcpus,
        memory_mib=size.memory_mib,
        disk_gib=size.disk_gib,
        zones=placement.zones,
        require_labels=placement.require_labels,
        forbid_labels=placement.forbid_labels,
        tolerate=placement.tolerate,
        hosts=placement.hosts,
        strategy=placement.strategy,
    )


def wish_of(vm: Vm) -> Wish:
    """What this VM needs; hosts that failed to build it are avoided."""
    wish = wish_in(Placement.model_validate(vm.spec.get("placement", {})), vm)
    failed_on = frozenset(UUID(failed["host_id"]) for failed in vm.failed_hosts)
    return replace(wish, avoid=failed_on, image=vm.image["sha256"])


class Scheduler:
    """Finds hosts for VMs. What it knows of hosts it keeps for a moment, since reading all of them is dear.

    What it kept may be old: the claim under lock finds that out, and who is refused is refused by what is true now.
    """

    def __init__(self, limits: Limits, rng: random.Random | None = None) -> None:
        self._limits = limits
        self._rng = rng or random.Random()
        self._fleet = Fleet()
        self._read_at = float("-inf")

    async def place(self, connection: Connection, bundles: Sequence[Bundle], now: datetime) -> list[Outcome]:
        """What becomes of each of these bundles. Hosts are claimed when the caller records the changes."""
        if not bundles:
            return []
        views = await groups.lock(connection, {name for bundle in bundles for vm in bundle if (name := _group_of(vm))})
        choices = await self._choose_all(connection, bundles, views)
        made = [one for one in choices if isinstance(one, _Choice)]
        there = await hosts.lock(connection, {chosen.host.id for one in made for chosen in one.chosen})
        won = [one for one in made if _claim(one, there)]
        self._fleet.put(there.values())
        tokens = iter(await vms.new_tokens(connection, sum(len(one.bundle) for one in won)) if won else ())
        placed = {id(one): Placed(tuple(self._placed(one, tokens, now))) for one in won}
        return [one if isinstance(one, Problem) else placed.get(id(one)) for one in choices]

    async def _choose_all(
        self, connection: Connection, bundles: Sequence[Bundle], views: Mapping[groups.Name, GroupView]
    ) -> list["_Choice | Problem"]:
        is_fresh = time.monotonic() - self._read_at > KEPT_S
        while True:
            if is_fresh:
                self._fleet = Fleet(await hosts.snapshot(connection))
                self._read_at = time.monotonic()
            members = dict(views)
            choices = [_choose(bundle, self._fleet, members, self._rng) for bundle in bundles]
            if is_fresh or not any(isinstance(one, Problem) for one in choices):
                return choices
            is_fresh = True

    def _placed(self, choice: "_Choice", tokens: Iterator[int], now: datetime) -> Iterator[Change]:
        for vm, chosen in zip(choice.bundle, choice.chosen, strict=True):
            host = chosen.host
            seat, why = _seat(choice.group, host), _why(chosen, choice.seconds)
            yield decisions.placed(vm, host.id, host.name, next(tokens), now, self._limits, seat=seat, why=why)


def _choose(bundle: Bundle, fleet: Fleet, views: dict[groups.Name, GroupView], rng: random.Random) -> _Choice | Problem:
    """Hosts for a bundle, booked in the fleet and in its group; or why there are none."""
    name = _group_of(bundle[0])
    group = views.get(name) if name else None
    if name and group is None:
        return Problem.of(Code.GROUP_UNKNOWN, f"There is no group {name[1]!r}.")
    began = time.perf_counter()
    wishes = tuple(wish_of(vm) for vm in bundle)
    chosen = fleet.choose_all(wishes, group, rng)
    if isinstance(chosen, Refused):
        return chosen.problem()
    if name and group:
        for one in chosen:
            group = group.joined(one.host.id, one.host.zone)
        views[name] = group
    return _Choice(bundle, wishes, chosen, group, (time.perf_counter() - began) / len(bundle))


def _claim(choice: _Choice, there: dict[UUID, Host]) -> bool:
    """Whether there is still room on hosts that are locked now; if so, it is taken."""
    taken: list[tuple[Host, Wish]] = []
    for wish, chosen in zip(choice.wishes, choice.chosen, strict=True):
        host = there.get(chosen.host.id)
        if host is None or not scheduling.admits(host, wish):
            for other, given in taken:
                other.give_back(given)
            return False
        host.take(wish)
        taken.append((host, wish))
    return True


def _seat(group: GroupView | None, host: Host) -> str | None:
    """What no other member of its group may have."""
    if group is None or not group.hard or group.policy != "spread":
        return None
    return host.zone if group.topology == "zone" else str(host.id)


def _why(chosen: Chosen, seconds: float) -> dict[str, Any]:
    """How a decision came about, for whoever asks."""
    return {
        "looked_at": chosen.looked_at,
        "considered": chosen.considered,
        "refused": dict(chosen.refused),
        "score": {name: round(value, 4) for name, value in chosen.score.items()},
        "seconds": round(seconds, 6),
    }


def _group_of(vm: Vm) -> groups.Name | None:
    return (vm.project_id, vm.group_name) if vm.group_name else None
