"""What a host must be and have to take a VM: one table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from leveret.conductor.scheduling.host import Host
from leveret.conductor.scheduling.wish import Wish


def _state(host: Host, _wish: Wish) -> bool:
    return host.state == "up"


def _hypervisor(host: Host, _wish: Wish) -> bool:
    return host.healthy


def _failed_before(host: Host, wish: Wish) -> bool:
    return host.id not in wish.avoid


# Loops, not any() and all(): these are asked of very many hosts, and take a third of the time.


def _host(host: Host, wish: Wish) -> bool:
    return not wish.hosts or host.name in wish.hosts or str(host.id) in wish.hosts


def _zone(host: Host, wish: Wish) -> bool:
    return not wish.zones or host.zone in wish.zones


def _required_labels(host: Host, wish: Wish) -> bool:
    labels = host.labels
    for key, value in wish.require_labels.items():  # noqa: SIM110
        if labels.get(key) != value:
            return False
    return True


def _forbidden_labels(host: Host, wish: Wish) -> bool:
    labels = host.labels
    for key, value in wish.forbid_labels.items():  # noqa: SIM110
        if labels.get(key) == value:
            return False
    return True


def tolerates(wish: Wish, taints: Mapping[str, str]) -> bool:
    return all(wish.tolerate.get(key) == value for key, value in taints.items())


def _taints(host: Host, wish: Wish) -> bool:
    return not host.taints or tolerates(wish, host.taints)


def _group(host: Host, wish: Wish) -> bool:
    return wish.group is None or wish.group.admits(host.id, host.zone)


def _max_vms(host: Host, wish: Wish) -> bool:
    return host.vms_max is None or host.vms + wish.vms <= host.vms_max


def _vcpus(host: Host, wish: Wish) -> bool:
    return wish.vcpus <= host.vcpus_free


def _memory(host: Host, wish: Wish) -> bool:
    return wish.memory_mib <= host.memory_mib_free


def _disk(host: Host, wish: Wish) -> bool:
    return wish.disk_gib <= host.disk_gib_free


def _resources(host: Host, wish: Wish) -> bool:
    free = host.resources_free
    return all(count <= free.get(name, 0) for name, count in wish.resources.items())


def _always(_wish: Wish) -> bool:
    return True


Predicate = Callable[[Host, Wish], bool]


@dataclass(frozen=True, slots=True)
class Constraint:
    """`accepts` decides; of a wish that does not ask for it (`asked_by`) it accepts every host.

    `walked` says that the walk through the buckets offers no host that it refuses, so that it is not asked again.
    """

    accepts: Predicate
    asked_by: Callable[[Wish], bool] = _always
    walked: bool = False


#: The names are stable: clients read them in `details.constraints`. First what a host is, then what it has free.
CONSTRAINTS: dict[str, Constraint] = {
    "state": Constraint(_state, walked=True),
    "hypervisor": Constraint(_hypervisor, walked=True),
    "failed_before": Constraint(_failed_before, lambda wish: bool(wish.avoid)),
    "host": Constraint(_host, lambda wish: bool(wish.hosts)),
    "zone": Constraint(_zone, lambda wish: bool(wish.zones), walked=True),
    "required_labels": Constraint(_required_labels, lambda wish: bool(wish.require_labels)),
    "forbidden_labels": Constraint(_forbidden_labels, lambda wish: bool(wish.forbid_labels)),
    "taints": Constraint(_taints, walked=True),
    "group": Constraint(_group, lambda wish: wish.group is not None and wish.group.hard),
    "max_vms": Constraint(_max_vms),
    "vcpus": Constraint(_vcpus, walked=True),
    "memory_mib": Constraint(_memory, walked=True),
    "disk_gib": Constraint(_disk, walked=True),
    "resources": Constraint(_resources, lambda wish: bool(wish.resources)),
}
#: What a smaller VM changes. What is not in here decides whether a host is eligible at all.
SIZES = ("vcpus", "memory_mib", "disk_gib", "resources")


def asked(wish: Wish) -> list[tuple[str, Predicate]]:
    """The constraints that this wish makes of hosts, in order."""
    return [(name, one.accepts) for name, one in CONSTRAINTS.items() if one.asked_by(wish)]


def admits(host: Host, wish: Wish) -> bool:
    """Whether this host may take the VM as both are now."""
    return all(accepts(host, wish) for _, accepts in asked(wish))


def asked_beside_the_walk(wish: Wish) -> list[tuple[str, Predicate]]:
    """Those of them that the walk through the buckets does not keep by itself."""
    return [(name, one.accepts) for name, one in CONSTRAINTS.items() if not one.walked and one.asked_by(wish)]
