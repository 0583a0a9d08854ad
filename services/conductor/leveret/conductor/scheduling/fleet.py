"""The hosts that VMs are placed on, and the verbs that decide where."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from leveret.conductor.scheduling.constraints import SIZES, asked
from leveret.conductor.scheduling.explaining import explain
from leveret.conductor.scheduling.group import GroupView
from leveret.conductor.scheduling.host import Host
from leveret.conductor.scheduling.index import Index
from leveret.conductor.scheduling.refusal import Refused
from leveret.conductor.scheduling.search import search
from leveret.conductor.scheduling.wish import Wish, together

#: How many refusals are remembered while nothing changes: a batch of the same VM is explained once.
REFUSALS_MAX = 8


@dataclass(frozen=True, slots=True)
class Chosen:
    """A host for a VM, booked; and how it was found.

    Of `looked_at` hosts `considered` could have taken it; `refused` counts the others by the first constraint that
    refused them. `score` is what the host was chosen by, in order of weight.
    """

    host: Host
    score: Mapping[str, float]
    looked_at: int
    considered: int
    refused: Mapping[str, int]


class Fleet:
    """Hosts, sorted by what they have free. It books what it places, so that a batch does not pile up.

    Hosts that are put in belong to the fleet: nobody else changes them.
    """

    def __init__(self, hosts: Iterable[Host] = ()) -> None:
        self._index = Index()
        self._refusals: list[tuple[Wish, Refused]] = []
        self.put(hosts)

    def __len__(self) -> int:
        return len(self._index.hosts)

    def get(self, host_id: UUID) -> Host | None:
        return self._index.hosts.get(host_id)

    def put(self, hosts: Iterable[Host]) -> None:
        """Take these hosts in as they are now. What was known or booked of them before is forgotten."""
        self._refusals.clear()
        for host in hosts:
            self._index.put(host)

    def drop(self, ids: Iterable[UUID]) -> None:
        """Forget these hosts."""
        self._refusals.clear()
        for host_id in ids:
            self._index.drop(host_id)

    def choose(self, wish: Wish, rng: random.Random) -> Chosen | Refused:
        """The host for one VM, booked; or why there is none: it is refused only if no host can take it."""
        return self._place(wish, rng) or self._explain(wish)

    def choose_all(
        self, wishes: Sequence[Wish], group: GroupView | None, rng: random.Random
    ) -> tuple[Chosen, ...] | Refused:
        """A host for every VM of a group, in the order asked, all booked; or why not, and nothing is booked.

        VMs that are all alike are refused only if there is no way to place them all. Of others the largest is placed
        first, which may miss a way.
        """
        # Of VMs that are all alike, placing one takes one place from all there are, wherever it goes: so one after the
        # other finds a way if there is one. Only of those that stay together can the first take a wrong turn.
        if not wishes:
            return ()
        if len(wishes) == 1 or group is None or group.policy == "spread" or group.is_somewhere():
            return self._each(wishes, group, rng)
        hard = replace(group, hard=True)
        choice = (
            self._at_one_host(wishes, hard, rng) if group.topology == "host" else self._in_one_zone(wishes, hard, rng)
        )
        return self._each(wishes, group, rng) if isinstance(choice, Refused) and not group.hard else choice

    def release(self, host_id: UUID, wish: Wish) -> None:
        """Undo a booking. A host that is gone has none."""
        host = self.get(host_id)
        if host is not None:
            self._refusals.clear()
            host.give_back(wish)
            self._index.sort_in(host)

    def capacity(self, wish: Wish) -> dict[str, int]:
        """How many VMs of this shape fit now, by zone; without its group. Zones in which none fits are there too."""
        alone = replace(wish, group=None)
        checks = [accepts for name, accepts in asked(alone) if name not in SIZES]
        count = dict.fromkeys(sorted({host.zone for host in self._index.hosts.values()}), 0)
        for host in self._index.hosts.values():
            if all(accepts(host, alone) for accepts in checks):
                count[host.zone] += host.times(alone)
        return count

    def _place(self, wish: Wish, rng: random.Random) -> Chosen | None:
        found = search(self._index, wish, rng)
        if found.best is None:
            return None
        self._refusals.clear()
        found.best.take(wish)
        self._index.sort_in(found.best)
        refused = {name: count for name, count in found.refused.items() if count}
        return Chosen(found.best, found.score(), found.looked_at, found.considered, refused)

    def _explain(self, wish: Wish, vms: int = 1, vms_fitting: int = 0) -> Refused:
        for known, refused in self._refusals:
            if known == wish and (refused.vms, refused.vms_fitting) == (vms, vms_fitting):
                return refused
        refused = explain(self._index.hosts.values(), wish, vms=vms, vms_fitting=vms_fitting)
        self._refusals = [*self._refusals[-(REFUSALS_MAX - 1) :], (wish, refused)]
        return refused

    def _each(
        self, wishes: Sequence[Wish], group: GroupView | None, rng: random.Random
    ) -> tuple[Chosen, ...] | Refused:
        """One after the other, the largest first; if one finds no place, none gets one."""
        placed, missing = self._try(wishes, group, rng)
        if missing is None:
            return tuple(chosen for _, (_, chosen) in sorted(placed.items()))
        refused = self._explain(missing, len(wishes), len(placed))
        self._undo(placed)
        return refused

    def _try(
        self, wishes: Sequence[Wish], group: GroupView | None, rng: random.Random
    ) -> tuple[dict[int, tuple[Wish, Chosen]], Wish | None]:
        """What is placed, by its position, and the first wish that no host takes."""
        placed: dict[int, tuple[Wish, Chosen]] = {}
        for position in _largest_first(wishes):
            wish = replace(wishes[position], group=group)
            chosen = self._place(wish, rng)
            if chosen is None:
                return placed, wish
            placed[position] = (wish, chosen)
            group = group and group.joined(chosen.host.id, chosen.host.zone)
        return placed, None

    def _undo(self, placed: Mapping[int, tuple[Wish, Chosen]]) -> None:
        for wish, chosen in placed.values():
            self.release(chosen.host.id, wish)

    def _at_one_host(
        self, wishes: Sequence[Wish], group: GroupView, rng: random.Random
    ) -> tuple[Chosen, ...] | Refused:
        """All on one host. VMs that differ in size only are as one large VM to it."""
        conditions = [wish.conditions() for wish in wishes]
        if all(one == conditions[0] for one in conditions):
            whole = replace(together(wishes), group=group)
            best = search(self._index, whole, rng).best
            if best is None:
                return self._explain(whole, len(wishes), self._most_at_one_host(whole, wishes[0]))
            return self._each(wishes, _anchored(group, best), rng)
        return self._at_any(self._index.hosts.values(), wishes, group, rng)

    def _in_one_zone(
        self, wishes: Sequence[Wish], group: GroupView, rng: random.Random
    ) -> tuple[Chosen, ...] | Refused:
        """All in one zone: those who spread take the roomiest that has room for all, those who pack the fullest."""
        rooms: dict[str, float] = {}
        anyone: dict[str, Host] = {}
        for cell in self._index.cells():
            anyone[cell.zone] = cell.any_host()
            rooms[cell.zone] = rooms.get(cell.zone, 0.0) + cell.room()
        zones = sorted(rooms, key=lambda zone: (rooms[zone], zone), reverse=wishes[0].strategy == "spread")
        return self._at_any([anyone[zone] for zone in zones], wishes, group, rng)

    def _at_any(
        self, hosts: Iterable[Host], wishes: Sequence[Wish], group: GroupView, rng: random.Random
    ) -> tuple[Chosen, ...] | Refused:
        """All where one of these hosts is, the first where they fit. The refusal is that of where most of them fit."""
        most, nearest = -1, group
        for host in hosts:
            there = _anchored(group, host)
            placed, missing = self._try(wishes, there, rng)
            if missing is None:
                return tuple(chosen for _, (_, chosen) in sorted(placed.items()))
            self._undo(placed)
            if len(placed) > most:
                most, nearest = len(placed), there
        return self._each(wishes, nearest, rng)

    def _most_at_one_host(self, whole: Wish, wish: Wish) -> int:
        """How many of these VMs one host could take, of those that could take some."""
        checks = [accepts for name, accepts in asked(whole) if name not in {*SIZES, "max_vms"}]
        return max(
            (
                host.times(wish)
                for host in self._index.hosts.values()
                if all(accepts(host, whole) for accepts in checks)
            ),
            default=0,
        )


def _largest_first(wishes: Sequence[Wish]) -> list[int]:
    """The positions of these wishes, by their sizes as shares of the largest there is."""
    vcpus = max(wish.vcpus for wish in wishes)
    memory_mib = max(wish.memory_mib for wish in wishes)
    disk_gib = max(wish.disk_gib for wish in wishes)

    def size(position: int) -> float:
        wish = wishes[position]
        return wish.vcpus / vcpus + wish.memory_mib / memory_mib + wish.disk_gib / disk_gib

    return sorted(range(len(wishes)), key=size, reverse=True)


def _anchored(group: GroupView, host: Host) -> GroupView:
    """The group as if its first member were there."""
    return replace(group, by_host={host.id: 1}, by_zone={host.zone: 1})
