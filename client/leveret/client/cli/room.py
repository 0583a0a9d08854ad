"""Why there is no room, as people read it: what each constraint refused, and what would fit."""

from collections.abc import Iterator, Mapping
from typing import Any

from leveret.client.cli.columns import memory_text

#: What of the details of a problem is told here.
FIELDS = frozenset({"hosts", "constraints", "only", "zones", "fits", "largest", "vms", "vms_fitting"})

#: Why a host is refused, by the constraint's name.
_WHY = {
    "state": "take no new VMs: cordoned, or not heard of",
    "hypervisor": "have a hypervisor that is not well",
    "failed_before": "failed to build it before",
    "host": "are not among those that were named",
    "zone": "are in another zone",
    "required_labels": "lack a label that is required",
    "forbidden_labels": "have a label that is forbidden",
    "taints": "are kept for others (tainted)",
    "group": "are ruled out by its group",
    "max_vms": "have as many VMs as they take",
    "vcpus": "have too few vCPUs free",
    "memory_mib": "have too little memory free",
    "disk_gib": "have too little disk free",
    "resources": "lack what else was asked for",
}

#: A change after which it would fit, as it is written on the command line; a value of None means that it has to go.
_CHANGES = {
    "vcpus": "--vcpus {value}",
    "memory_mib": "--memory {memory}",
    "disk_gib": "--disk {value}G",
    "zones": "--zone {value}",
    "require_labels": "without its --require-label",
    "forbid_labels": "without its --forbid-label",
    "tolerate": "--tolerate {value}",
    "group": "without its group, or if that were soft",
    "hosts": "without its --on-host",
    "avoid": "on a host that failed to build it before",
}


def refusal_lines(details: Mapping[str, Any]) -> Iterator[str]:
    """What the details of `no_capacity` say, whoever wrote them: what is missing is not told."""
    counts = _counts(details.get("constraints"))
    hosts = details.get("hosts")
    if not counts:
        yield "there is no host"
        return
    vms, fitting = details.get("vms"), details.get("vms_fitting")
    if isinstance(vms, int) and isinstance(fitting, int):
        yield f"of {vms} VMs {fitting} would fit"
    yield from _refused(counts, _counts(details.get("only")), hosts if isinstance(hosts, int) else None)
    fits = [_fit(one) for one in details.get("fits") or () if isinstance(one, dict)]
    for fit in fits:
        yield f"it would fit {fit}"
    zones = details.get("zones")
    if isinstance(zones, list) and zones and "zone" in counts:
        yield f"zones there are: {', '.join(map(str, zones))}"
    largest = details.get("largest")
    if isinstance(largest, dict) and not fits:
        yield f"the most that one host has free: {_sizes(largest)}"


def is_told_by_lines(details: Mapping[str, Any]) -> bool:
    """Whether the lines say what the hint would say shorter."""
    return bool(details.get("fits"))


def _refused(counts: Mapping[str, int], only: Mapping[str, int], hosts: int | None) -> Iterator[str]:
    """The hosts by what speaks against them, in columns; one may be in several lines."""
    width = max(len(str(count)) for count in counts.values())
    of = f" of {hosts} hosts" if hosts is not None else " hosts"
    for name, count in counts.items():
        alone = f"; {only[name]} for this reason alone" if only.get(name) else ""
        yield f"{str(count).rjust(width)}{of} {_WHY.get(name, f'are refused by {name}')}{alone}"


def _fit(fit: Mapping[str, Any]) -> str:
    value = fit.get("value")
    change = str(fit.get("change"))
    memory = memory_text(value) if isinstance(value, int) else value
    text = _CHANGES.get(change, "with {value} of " + change).format(value=value, memory=memory)
    count = fit.get("hosts")
    where = f" ({count} host{'' if count == 1 else 's'})" if isinstance(count, int) else ""
    return f"{'with ' if text.startswith('--') else ''}{text}{where}"


def _counts(value: Any) -> dict[str, int]:
    return (
        {str(name): count for name, count in value.items() if isinstance(count, int)} if isinstance(value, dict) else {}
    )


def _sizes(sizes: Mapping[str, Any]) -> str:
    """`8 vCPUs, 2G memory, 40G disk`, and whatever else there is by its name."""
    words = {
        "vcpus": lambda size: f"{size} vCPUs",
        "memory_mib": lambda size: f"{memory_text(size)} memory",
        "disk_gib": lambda size: f"{size}G disk",
    }
    return ", ".join(
        words[name](size) if name in words and isinstance(size, int) else f"{name} {size}"
        for name, size in sizes.items()
    )
