"""Finding out why no host takes a VM: every constraint is put to every host."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter

from leveret.conductor.scheduling.constraints import CONSTRAINTS, SIZES, asked, tolerates
from leveret.conductor.scheduling.host import Host
from leveret.conductor.scheduling.refusal import Fit, Refused, listed
from leveret.conductor.scheduling.wish import Wish

#: What a user may change of a wish, by the constraint that it makes.
CHANGES = {
    "zone": "zones",
    "required_labels": "require_labels",
    "forbidden_labels": "forbid_labels",
    "taints": "tolerate",
    "group": "group",
    "host": "hosts",
    "failed_before": "avoid",
}

EVERY_WISH_ASKS = ("state", "hypervisor", "taints", "max_vms", "vcpus", "memory_mib", "disk_gib")

Sorted = Mapping[frozenset[str], list[Host]]


def explain(hosts: Collection[Host], wish: Wish, *, vms: int = 1, vms_fitting: int = 0) -> Refused:
    """Why none of these hosts takes this VM; of several VMs, the first that was not placed."""
    by_refusals = _sort(hosts, wish)
    counts = dict.fromkeys((name for name, _ in asked(wish)), 0)
    for names, refusing in by_refusals.items():
        for name in names:
            counts[name] += len(refusing)
    alone = {name: by_refusals.get(frozenset({name}), []) for name in counts}
    return Refused(
        hosts=len(hosts),
        constraints={name: count for name, count in counts.items() if count},
        only={name: len(refusing) for name, refusing in alone.items() if refusing},
        zones=sorted(set(map(attrgetter("zone"), hosts))),
        fits=(*_smaller(alone, wish), *_otherwise(alone, wish)),
        largest=_largest(by_refusals),
        vms=vms,
        vms_fitting=vms_fitting,
    )


def _sort(hosts: Iterable[Host], wish: Wish) -> Sorted:
    """The hosts, by the constraints that refuse them."""
    bit_of = {name: 1 << number for number, name in enumerate(CONSTRAINTS)}
    state, hypervisor, taints, max_vms = (bit_of[name] for name in ("state", "hypervisor", "taints", "max_vms"))
    vcpus, memory_mib, disk_gib = (bit_of[name] for name in ("vcpus", "memory_mib", "disk_gib"))
    special = [(bit_of[name], accepts) for name, accepts in asked(wish) if name not in EVERY_WISH_ASKS]
    needs_vcpus, needs_memory_mib, needs_disk_gib, vms = wish.vcpus, wish.memory_mib, wish.disk_gib, wish.vms
    by_bits: defaultdict[int, list[Host]] = defaultdict(list)
    for host in hosts:
        # What every wish asks is written out: a call for each would take three times as long on a large fleet.
        bits = 0
        if host.state != "up":
            bits |= state
        if not host.healthy:
            bits |= hypervisor
        if host.taints and not tolerates(wish, host.taints):
            bits |= taints
        if host.vms_max is not None and host.vms + vms > host.vms_max:
            bits |= max_vms
        if host.vcpus_free < needs_vcpus:
            bits |= vcpus
        if host.memory_mib_free < needs_memory_mib:
            bits |= memory_mib
        if host.disk_gib_free < needs_disk_gib:
            bits |= disk_gib
        for bit, accepts in special:
            if not accepts(host, wish):
                bits |= bit
        by_bits[bits].append(host)
    return {frozenset(name for name, bit in bit_of.items() if bits & bit): refused for bits, refused in by_bits.items()}


def _smaller(alone: Mapping[str, list[Host]], wish: Wish) -> Iterable[Fit]:
    """The largest that fits in one size, the others as asked. Sums of several VMs are told for each of them."""
    for size in ("vcpus", "memory_mib", "disk_gib"):
        free = list(map(attrgetter(f"{size}_free"), alone[size]))
        most = max(free, default=0) // wish.vms
        if most > 0:
            yield Fit(size, most, sum(left // wish.vms >= most for left in free))
    for name, count in wish.resources.items():
        others = [(other, need) for other, need in wish.resources.items() if other != name]
        free = [
            host.resources_free.get(name, 0) // wish.vms
            for host in alone["resources"]
            if all(need <= host.resources_free.get(other, 0) for other, need in others)
        ]
        if count and free:
            yield Fit(name, max(free), free.count(max(free)))


def _otherwise(alone: Mapping[str, list[Host]], wish: Wish) -> Iterable[Fit]:
    """Every condition without which it would fit."""
    for constraint, change in CHANGES.items():
        hosts = alone.get(constraint)
        if hosts:
            yield Fit(change, _instead(constraint, hosts, wish), len(hosts))


def _instead(constraint: str, hosts: Iterable[Host], wish: Wish) -> str | None:
    """What the condition would have to be, where that can be told."""
    if constraint == "zone":
        return listed(sorted({host.zone for host in hosts}))
    if constraint == "taints":
        host = min(hosts, key=lambda host: len(host.taints))
        return ", ".join(f"{key}={value}" for key, value in host.taints.items() if wish.tolerate.get(key) != value)
    return None


def _largest(by_refusals: Sorted) -> Mapping[str, int] | None:
    """What the roomiest host has free, of those that only their sizes refuse."""
    eligible = [hosts for names, hosts in by_refusals.items() if names.issubset(SIZES)]
    memory_mib = max((max(map(attrgetter("memory_mib_free"), hosts)) for hosts in eligible), default=0)
    roomy = [host for hosts in eligible for host in hosts if host.memory_mib_free == memory_mib]
    roomiest = max(roomy, key=attrgetter("vcpus_free"), default=None)
    if roomiest is None:
        return None
    return {
        "vcpus": roomiest.vcpus_free,
        "memory_mib": roomiest.memory_mib_free,
        "disk_gib": roomiest.disk_gib_free,
    }
