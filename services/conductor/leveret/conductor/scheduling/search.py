"""The walk of one decision: from the best bucket down, until enough hosts that could take the VM were seen."""

import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from uuid import UUID

from leveret.conductor.scheduling.constraints import Predicate, asked, asked_beside_the_walk, tolerates
from leveret.conductor.scheduling.host import Host
from leveret.conductor.scheduling.index import LEVELS, Bucket, Cell, Index
from leveret.conductor.scheduling.scores import SCORES
from leveret.conductor.scheduling.wish import Wish

#: Candidates that are enough if the best of them leaves no level for a worse one; and those that are in any case.
ENOUGH = 32
MOST = 64
#: A packing VM takes the fullest level that this many hosts of can take it.
ENOUGH_TO_PACK = 8
#: Hosts looked at after which any candidate is good enough.
LOOKED_AT_MOST = 1024
#: Hosts in question that are rather looked at one by one than found on the walk.
FEW = 128


class Search:
    """What one decision has seen: the best host so far, and what it counted on the way."""

    __slots__ = (
        "_checks", "_crowded", "_ideal", "_room", "_scores", "_seen", "_walk_checks",
        "best", "best_key", "considered", "looked_at", "refused", "rng", "wish",
    )  # fmt: skip

    def __init__(self, wish: Wish, rng: random.Random) -> None:
        self.wish = wish
        self.rng = rng
        self.best: Host | None = None
        self.best_key: tuple[float, ...] = ()
        self.looked_at = 0
        self.considered = 0
        self.refused: Counter[str] = Counter()
        self._checks = asked(wish)
        self._walk_checks = asked_beside_the_walk(wish)
        self._scores = [score.of for score in SCORES.values() if score.asked_by(wish)]
        self._seen: set[UUID] = set()
        # Candidates of this tier that no host elsewhere could beat by its group, and the best room among them.
        self._ideal = 0
        self._room = -math.inf
        self._crowded: Collection[UUID] = _crowded(wish)

    def score(self) -> dict[str, float]:
        """What the best host was chosen by."""
        names = (name for name, score in SCORES.items() if score.asked_by(self.wish))
        return dict(zip(names, self.best_key, strict=False))

    def look_at(self, hosts: Iterable[Host]) -> None:
        """Look at these hosts, one by one and completely."""
        for host in hosts:
            self.looked_at += 1
            self._seen.add(host.id)
            self._judge(host, self._checks)

    def walk(self, cells: Collection[Cell]) -> None:
        """Look for hosts in these cells, first where the group would have it."""
        for tier in _tiers(self.wish, cells):
            self._ideal, self._room = 0, -math.inf
            self._walk_tier(tier)
            if self._ideal:  # tiers that come later are worse for all that weighs more than room
                return

    def _walk_tier(self, cells: Sequence[Cell]) -> None:
        spread = self.wish.strategy == "spread"
        # Cells of a tier are alike: begin with any, lest the first gets all until it is a level poorer.
        first = int(self.rng.random() * len(cells))
        cells = [*cells[first:], *cells[:first]]
        for level in range(LEVELS - 1, -1, -1) if spread else range(LEVELS):
            for cell in cells:
                bucket = cell.buckets.get(level)
                if bucket is not None and not bucket.is_too_small(self.wish):
                    self._look_through(bucket, level)
                    if self._is_enough(level):
                        return
            if not spread and self._ideal >= ENOUGH_TO_PACK:
                return

    def _is_enough(self, level: int) -> bool:
        """Whether to stop looking for more. Above a level's floor, a spreading VM is within a level of the best."""
        if self._ideal < ENOUGH:
            return self._ideal > 0 and self.looked_at >= LOOKED_AT_MOST
        return self._ideal >= MOST or self.wish.strategy == "pack" or self._room >= level / LEVELS

    def _look_through(self, bucket: Bucket, level: int) -> None:
        """Look at the hosts of a bucket, from any of them on, until it is enough."""
        vcpus, memory_mib, disk_gib = self.wish.vcpus, self.wish.memory_mib, self.wish.disk_gib
        hosts, seen, checks = bucket.hosts, self._seen, self._walk_checks
        first = int(self.rng.random() * len(hosts))
        last = first - len(hosts) + max(LOOKED_AT_MOST - self.looked_at, 0)
        looked_at = no_vcpus = no_memory = no_disk = 0
        for position in range(first - len(hosts), first):  # a negative position counts from the end: once around
            if position >= last and self._ideal:
                break
            host = hosts[position]
            if seen and host.id in seen:
                continue
            looked_at += 1
            # The three sizes are what refuses most: asked here, they cost no call.
            if host.memory_mib_free < memory_mib:
                no_memory += 1
            elif host.vcpus_free < vcpus:
                no_vcpus += 1
            elif host.disk_gib_free < disk_gib:
                no_disk += 1
            elif self._judge(host, checks) and self._is_enough(level):
                break
        self.looked_at += looked_at
        refused = no_vcpus + no_memory + no_disk
        if refused:
            self.refused.update(vcpus=no_vcpus, memory_mib=no_memory, disk_gib=no_disk)
            if refused == len(hosts):
                bucket.remember_too_small(self.wish)

    def _judge(self, host: Host, checks: Iterable[tuple[str, Predicate]]) -> bool:
        """Whether it could take the VM; if so it is a candidate."""
        wish = self.wish
        for name, accepts in checks:
            if not accepts(host, wish):
                self.refused[name] += 1
                return False
        self.considered += 1
        scores = [of(host, wish) for of in self._scores]
        room = scores[-1]
        scores.append(self.rng.random())
        key = tuple(scores)
        if key > self.best_key:
            self.best, self.best_key = host, key
        if not self._crowded or host.id not in self._crowded:
            self._ideal += 1
            self._room = max(self._room, room)
        return True


def search(index: Index, wish: Wish, rng: random.Random) -> Search:
    """The best host for this VM, if any could take it. Books nothing."""
    found = Search(wish, rng)
    few = _only_these(index, wish)
    if few is not None:
        found.look_at(few)
        return found
    group = wish.group
    if group is not None and group.policy == "pack" and group.topology == "host":
        found.look_at(index.get_all(group.by_host))
        if found.best is not None and found.score()["group"] > 0:  # no host without members beats it
            return found
    if wish.image is not None:
        holders = index.having("image", wish.image)
        if len(holders) <= FEW:
            found.look_at(index.get_all(holders))
    found.walk(index.cells())
    return found


def _only_these(index: Index, wish: Wish) -> list[Host] | None:
    """The hosts in question, if they are few and known; all others are refused for sure."""
    group = wish.group
    if wish.hosts:
        return index.get_all(_pinned(index, wish.hosts))
    if group is not None and group.hard and (group.policy, group.topology) == ("pack", "host") and group.is_somewhere():
        return index.get_all(host_id for host_id, members in group.by_host.items() if members)
    lists = [index.having("label", key, value) for key, value in wish.require_labels.items()]
    lists += [index.having("resource", name) for name, count in wish.resources.items() if count]
    shortest = min(lists, key=len, default=None)
    return index.get_all(shortest) if shortest is not None and len(shortest) <= FEW else None


def _pinned(index: Index, hosts: Iterable[str]) -> list[UUID]:
    ids: list[UUID] = []
    for text in hosts:
        ids += index.having("name", text)
        try:
            ids.append(UUID(text))
        except ValueError:
            continue  # a name
    return ids


def _crowded(wish: Wish) -> Collection[UUID]:
    """Hosts that a spread group would rather not take."""
    group = wish.group
    return group.by_host if group is not None and group.policy == "spread" and group.topology == "host" else ()


def _tiers(wish: Wish, cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells that the wish allows: those first in whose zones the group has fewest members, or most if it packs."""
    group = wish.group
    allowed = [
        cell
        for cell in cells
        if (not wish.zones or cell.zone in wish.zones)
        and (not cell.taints or tolerates(wish, cell.taints))
        and (group is None or group.admits_zone(cell.zone))
    ]
    if not allowed:
        return []
    if group is None or (group.policy == "pack" and group.topology == "host"):
        return [allowed]
    sign = 1 if group.policy == "spread" else -1
    tiers: dict[int, list[Cell]] = {}
    for cell in allowed:
        tiers.setdefault(sign * group.by_zone.get(cell.zone, 0), []).append(cell)
    return [tiers[members] for members in sorted(tiers)]
