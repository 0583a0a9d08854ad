"""A host, as far as deciding where VMs go has to know it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from leveret.conductor.scheduling.wish import Wish


@dataclass(slots=True)
class Host:
    """A host, what it has and what of that is free. Once it is in a fleet only the fleet changes it.

    `healthy` is false while the host itself reports a problem. A host with `taints` takes only VMs that tolerate every
    one of them. `resources` are counted things with a name, such as {"gpu.a10": 4}. `images` are the sha256 of those in
    its cache. `vms_max` is how many VMs it may have, whatever their size.
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
    taints: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, int] = field(default_factory=dict)
    resources_free: Mapping[str, int] = field(default_factory=dict)
    vms: int = 0
    vms_max: int | None = None
    images: frozenset[str] = frozenset()

    def is_open(self) -> bool:
        """Whether it could take any VM at all."""
        return (
            self.state == "up"
            and self.healthy
            and self.vcpus_free > 0
            and self.memory_mib_free > 0
            and self.disk_gib_free > 0
            and (self.vms_max is None or self.vms < self.vms_max)
        )

    def free_share(self) -> float:
        """The free share of what is scarcest, from 0 to 1. Only of a host that is open."""
        return min(
            self.vcpus_free / self.vcpus,
            self.memory_mib_free / self.memory_mib,
            self.disk_gib_free / self.disk_gib,
        )

    def room_left(self, wish: Wish) -> float:
        """The free share of what is scarcest once the VM is there; of named resources, those that it asks for count."""
        room = min(
            (self.vcpus_free - wish.vcpus) / self.vcpus,
            (self.memory_mib_free - wish.memory_mib) / self.memory_mib,
            (self.disk_gib_free - wish.disk_gib) / self.disk_gib,
        )
        for name, count in wish.resources.items():
            if count:
                room = min(room, (self.resources_free.get(name, 0) - count) / max(1, self.resources.get(name, 0)))
        return room

    def times(self, wish: Wish) -> int:
        """How many VMs of this shape its room is for. Says nothing of other constraints."""
        limits = [
            self.vcpus_free // wish.vcpus,
            self.memory_mib_free // wish.memory_mib,
            self.disk_gib_free // wish.disk_gib,
        ]
        limits += [self.resources_free.get(name, 0) // count for name, count in wish.resources.items() if count]
        if self.vms_max is not None:
            limits.append((self.vms_max - self.vms) // wish.vms)
        return max(0, min(limits))

    def take(self, wish: Wish) -> None:
        """Book the VM."""
        self.vcpus_free -= wish.vcpus
        self.memory_mib_free -= wish.memory_mib
        self.disk_gib_free -= wish.disk_gib
        self.vms += wish.vms
        if wish.resources:
            self.resources_free = {
                name: free - wish.resources.get(name, 0) for name, free in self.resources_free.items()
            }

    def give_back(self, wish: Wish) -> None:
        """End a booking. Nothing ever becomes more than there is: fresh facts may have come between."""
        self.vcpus_free = min(self.vcpus, self.vcpus_free + wish.vcpus)
        self.memory_mib_free = min(self.memory_mib, self.memory_mib_free + wish.memory_mib)
        self.disk_gib_free = min(self.disk_gib, self.disk_gib_free + wish.disk_gib)
        self.vms = max(0, self.vms - wish.vms)
        if wish.resources:
            self.resources_free = {
                name: min(self.resources.get(name, 0), free + wish.resources.get(name, 0))
                for name, free in self.resources_free.items()
            }
