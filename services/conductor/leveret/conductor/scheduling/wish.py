"""What a VM needs from the host it goes to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from uuid import UUID

from leveret.conductor.scheduling.group import GroupView

Strategy = Literal["spread", "pack"]


@dataclass(frozen=True, slots=True)
class Wish:
    """What one VM needs. What is empty or None restricts nothing.

    `hosts` pins it to these, by name or by id. `avoid` are hosts that failed to build it. `image` is a sha256. `vms` is
    more than one only for a sum of wishes that go to one host together. Every size is at least 1 (ValueError).
    """

    vcpus: int
    memory_mib: int
    disk_gib: int
    resources: Mapping[str, int] = field(default_factory=dict)
    zones: tuple[str, ...] = ()
    require_labels: Mapping[str, str] = field(default_factory=dict)
    forbid_labels: Mapping[str, str] = field(default_factory=dict)
    tolerate: Mapping[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    strategy: Strategy = "spread"
    avoid: frozenset[UUID] = frozenset()
    image: str | None = None
    group: GroupView | None = None
    vms: int = 1

    def __post_init__(self) -> None:
        # Hosts without anything free are in no bucket: that is right only for VMs that need something of everything.
        if min(self.vcpus, self.memory_mib, self.disk_gib, self.vms) < 1 or min(self.resources.values(), default=0) < 0:
            raise ValueError(f"a VM needs at least 1 of everything: {self}")

    def conditions(self) -> "Wish":
        """What it says beside its sizes: of wishes that are equal in this, a host suits all or none."""
        return replace(self, vcpus=1, memory_mib=1, disk_gib=1, resources={}, vms=1)


def together(wishes: Sequence[Wish]) -> Wish:
    """The sum of wishes that differ in nothing but their sizes: what one host needs to take them all."""
    resources: dict[str, int] = {}
    for wish in wishes:
        for name, count in wish.resources.items():
            resources[name] = resources.get(name, 0) + count
    return replace(
        wishes[0],
        vcpus=sum(wish.vcpus for wish in wishes),
        memory_mib=sum(wish.memory_mib for wish in wishes),
        disk_gib=sum(wish.disk_gib for wish in wishes),
        resources=resources,
        vms=sum(wish.vms for wish in wishes),
    )
