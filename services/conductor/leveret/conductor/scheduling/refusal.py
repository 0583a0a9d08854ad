"""Why no host takes a VM, and what would fit instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leveret.shared.errors import Code, Problem

#: How many names, and how many alternatives, an answer lists.
NAMES_MAX = 16
HINTS_MAX = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """One change after which it would fit now, and how many hosts it could then go to.

    With a size (`vcpus`, `memory_mib`, `disk_gib` or a resource's name) `value` is the most of it that fits, the rest
    as asked. With a condition it is what the condition would have to be, or None if it would have to go.
    """

    change: str
    value: int | str | None
    hosts: int

    def __str__(self) -> str:
        hosts = "1 host" if self.hosts == 1 else f"{self.hosts} hosts"
        words = _WORDS.get(self.change, "with {value} of {change}")
        return f"{words.format(value=self.value, change=self.change)} ({hosts})"


#: How a change is told to a person.
_WORDS = {
    "vcpus": "with {value} vcpus",
    "memory_mib": "with {value} MiB of memory",
    "disk_gib": "with {value} GiB of disk",
    "zones": "in {value}",
    "require_labels": "without its required labels",
    "forbid_labels": "without its forbidden labels",
    "tolerate": "if it tolerated {value}",
    "group": "if its group were soft",
    "hosts": "without its choice of hosts",
    "avoid": "on a host that failed to build it before",
}


@dataclass(frozen=True, slots=True)
class Refused:
    """Nobody takes it. `constraints` counts the hosts that each constraint refuses; a host may be in several.

    `only` counts the hosts that a constraint refuses alone: what a change of this one would win. `fits` are single
    changes after which it would fit. `largest` is what the roomiest host has free of those that are eligible whatever
    its size. Of several `vms` asked for together, `vms_fitting` could have been placed.
    """

    hosts: int
    constraints: Mapping[str, int]
    only: Mapping[str, int]
    zones: Sequence[str]
    fits: Sequence[Fit]
    largest: Mapping[str, int] | None
    vms: int = 1
    vms_fitting: int = 0

    def problem(self) -> Problem:
        """The answer to "why not?"."""
        details: dict[str, Any] = {
            "hosts": self.hosts,
            "constraints": dict(self.constraints),
            "only": dict(self.only),
            "zones": list(self.zones[:NAMES_MAX]),
            "fits": [{"change": fit.change, "value": fit.value, "hosts": fit.hosts} for fit in self.fits[:NAMES_MAX]],
        }
        if self.largest is not None:
            details["largest"] = dict(self.largest)
        if self.vms > 1:
            details |= {"vms": self.vms, "vms_fitting": self.vms_fitting}
        return Problem.of(Code.NO_CAPACITY, self._message(), hint=self._hint(), **details)

    def _message(self) -> str:
        if not self.hosts:
            return "There is no host."
        counts = ", ".join(f"{name} {count}" for name, count in self.constraints.items())
        if self.vms > 1:
            fit = f"only {self.vms_fitting}" if self.vms_fitting else "none"
            return f"Of these {self.vms} VMs {fit} would fit; the rest is refused by: {counts}."
        nobody = "The only host cannot" if self.hosts == 1 else f"None of the {self.hosts} hosts can"
        return f"{nobody} take this VM; refused by: {counts}."

    def _hint(self) -> str | None:
        if self.constraints.get("state") == self.hosts > 0:
            return "No host takes new VMs: `leveret host list` says which are cordoned, and which are not heard of."
        said = []
        fits = list(self.fits)
        if self.constraints.get("zone") == self.hosts > 0:
            zones = listed(self.zones)
            said.append(f"Zones there are: {zones}.")
            fits = [fit for fit in fits if (fit.change, fit.value) != ("zones", zones)]
        if fits:
            it = "It" if self.vms == 1 else "More of them"
            said.append(f"{it} would fit {', or '.join(map(str, fits[:HINTS_MAX]))}.")
        elif self.largest is not None and not said:
            said.append(
                "The most that one host has free: {vcpus} vcpus, {memory_mib} MiB, {disk_gib} GiB.".format(
                    **self.largest
                )
            )
        return " ".join(said) or None


def listed(names: Sequence[str]) -> str:
    """These names as a person reads them, and how many more there are."""
    more = f" and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else ""
    return ", ".join(names[:NAMES_MAX]) + more
