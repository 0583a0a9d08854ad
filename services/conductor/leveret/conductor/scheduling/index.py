"""Hosts in the order in which one would look at them.

Every host that could take anything is in one bucket: that of its zone, its taints and its free share, in steps of a
32nd. A spreading VM looks through the roomiest buckets first, a packing one through the fullest, and neither comes to
the end unless it has to. Beside that, short lists of the hosts that have some label, some resource or some image.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any
from uuid import UUID

from leveret.conductor.scheduling.host import Host
from leveret.conductor.scheduling.wish import Wish

LEVELS = 32
#: How many shapes a bucket remembers to have no room for.
MISFITS_MAX = 8

Shape = tuple[int, int, int]
Term = tuple[str, str, str]


def level_of(host: Host) -> int:
    """The step of its free share; the last one has the empty hosts in it."""
    return min(int(host.free_share() * LEVELS), LEVELS - 1)


class Bucket:
    """Hosts alike in zone, taints and free share, in no order; and shapes that none of them has room for."""

    __slots__ = ("_misfits", "_positions", "hosts")

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        self._positions: dict[UUID, int] = {}
        self._misfits: list[Shape] = []

    def put(self, host: Host) -> None:
        """Take this host in, or take note of what it has now."""
        position = self._positions.get(host.id)
        if position is None:
            self._positions[host.id] = len(self.hosts)
            self.hosts.append(host)
        else:
            self.hosts[position] = host
        if self._misfits:
            vcpus, memory_mib, disk_gib = host.vcpus_free, host.memory_mib_free, host.disk_gib_free
            self._misfits = [
                shape for shape in self._misfits if shape[0] > vcpus or shape[1] > memory_mib or shape[2] > disk_gib
            ]

    def remove(self, host_id: UUID) -> None:
        """The last one takes its place."""
        position = self._positions.pop(host_id)
        last = self.hosts.pop()
        if last.id != host_id:
            self.hosts[position] = last
            self._positions[last.id] = position

    def is_too_small(self, wish: Wish) -> bool:
        """Whether it is known that no host here has room for that."""
        return any(
            wish.vcpus >= vcpus and wish.memory_mib >= memory_mib and wish.disk_gib >= disk_gib
            for vcpus, memory_mib, disk_gib in self._misfits
        )

    def remember_too_small(self, wish: Wish) -> None:
        """Every host here was looked at, and none has room. True until one comes that has."""
        vcpus, memory_mib, disk_gib = shape = (wish.vcpus, wish.memory_mib, wish.disk_gib)
        smaller = [
            other
            for other in self._misfits
            if not (other[0] >= vcpus and other[1] >= memory_mib and other[2] >= disk_gib)
        ]
        self._misfits = [*smaller[-(MISFITS_MAX - 1) :], shape]


class Cell:
    """The buckets of one zone and one set of taints, by level. There are no empty ones."""

    __slots__ = ("buckets", "taints", "zone")

    def __init__(self, zone: str, taints: Mapping[str, str]) -> None:
        self.zone = zone
        self.taints = taints
        self.buckets: dict[int, Bucket] = {}

    def any_host(self) -> Host:
        return next(iter(self.buckets.values())).hosts[0]

    def room(self) -> float:
        """How many empty hosts the free shares add up to, roughly."""
        return sum((level + 0.5) / LEVELS * len(bucket.hosts) for level, bucket in self.buckets.items())


class Index:
    """The hosts of a fleet, by id, by room, and by what few of them have."""

    def __init__(self) -> None:
        self.hosts: dict[UUID, Host] = {}
        self._cells: dict[tuple[str, frozenset[tuple[str, str]]], Cell] = {}
        self._bucket_of: dict[UUID, tuple[Cell, int]] = {}
        # Dictionaries stand for sets here because they keep their order: a seed makes the same choice everywhere.
        self._having: dict[Term, dict[UUID, None]] = {}

    def put(self, host: Host) -> None:
        """Take this host in, in place of what was known of it."""
        before = self.hosts.get(host.id)
        if before is None or not _has_the_same(before, host):
            if before is not None:
                self._forget_terms(before)
            for term in _terms(host):
                self._having.setdefault(term, {})[host.id] = None
            # The taints may be others: the cell is looked up anew.
            self._take_out(host.id)
        self.hosts[host.id] = host
        self.sort_in(host)

    def drop(self, host_id: UUID) -> None:
        host = self.hosts.pop(host_id, None)
        if host is not None:
            self._take_out(host_id)
            self._forget_terms(host)

    def sort_in(self, host: Host) -> None:
        """Put it into the bucket of what it has free now; into none, if it can take nothing."""
        if not host.is_open():
            self._take_out(host.id)
            return
        level = level_of(host)
        known = self._bucket_of.get(host.id)
        if known is not None and known[1] == level:
            known[0].buckets[level].put(host)
            return
        self._take_out(host.id)
        key = (host.zone, frozenset(host.taints.items()))
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = Cell(host.zone, dict(host.taints))
        bucket = cell.buckets.get(level)
        if bucket is None:
            bucket = cell.buckets[level] = Bucket()
        bucket.put(host)
        self._bucket_of[host.id] = (cell, level)

    def cells(self) -> Collection[Cell]:
        return self._cells.values()

    def having(self, kind: str, key: str, value: str = "") -> Collection[UUID]:
        """The hosts with this `label`, `resource`, `image` or `name`, open or not."""
        return self._having.get((kind, key, value), {}).keys()

    def get_all(self, ids: Iterable[UUID]) -> list[Host]:
        """Those of these that there are, in this order, each once."""
        return [self.hosts[host_id] for host_id in dict.fromkeys(ids) if host_id in self.hosts]

    def _take_out(self, host_id: UUID) -> None:
        known = self._bucket_of.pop(host_id, None)
        if known is None:
            return
        cell, level = known
        bucket = cell.buckets[level]
        bucket.remove(host_id)
        if not bucket.hosts:
            del cell.buckets[level]
            if not cell.buckets:
                del self._cells[cell.zone, frozenset(cell.taints.items())]

    def _forget_terms(self, host: Host) -> None:
        for term in _terms(host):
            holders = self._having[term]
            del holders[host.id]
            if not holders:
                del self._having[term]


def _has_the_same(one: Host, other: Host) -> bool:
    return _lasting(one) == _lasting(other)


def _lasting(host: Host) -> tuple[Any, ...]:
    return host.name, host.zone, host.taints, host.labels, host.resources, host.images


def _terms(host: Host) -> Iterator[Term]:
    yield "name", host.name, ""
    for key, value in host.labels.items():
        yield "label", key, value
    for name in host.resources:
        yield "resource", name, ""
    for sha256 in host.images:
        yield "image", sha256, ""
