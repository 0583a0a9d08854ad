"""A group of VMs that want to be apart from each other, or together."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal
from uuid import UUID

Policy = Literal["spread", "pack"]
Topology = Literal["host", "zone"]


@dataclass(frozen=True, slots=True)
class GroupView:
    """What a group wants, and where its members are: how many on each host, and in each zone.

    A hard group refuses hosts, a soft one only prefers some. `topology` is what is shared or kept apart.
    """

    policy: Policy
    hard: bool
    topology: Topology
    by_host: Mapping[UUID, int] = field(default_factory=dict)
    by_zone: Mapping[str, int] = field(default_factory=dict)

    def is_somewhere(self) -> bool:
        """Whether it has members where that matters: on hosts, or in zones."""
        return any((self.by_host if self.topology == "host" else self.by_zone).values())

    def admits_zone(self, zone: str) -> bool:
        """Whether a host of this zone may take the next member, as far as the zone decides that."""
        if not self.hard or self.topology == "host":
            return True
        here = self.by_zone.get(zone, 0) > 0
        return not here if self.policy == "spread" else here or not self.is_somewhere()

    def admits(self, host_id: UUID, zone: str) -> bool:
        """Whether this host may take the next member."""
        if not self.hard or self.topology == "zone":
            return self.admits_zone(zone)
        here = self.by_host.get(host_id, 0) > 0
        return not here if self.policy == "spread" else here or not self.is_somewhere()

    def joined(self, host_id: UUID, zone: str) -> "GroupView":
        """The group with one more member, on this host."""
        return replace(
            self,
            by_host={**self.by_host, host_id: self.by_host.get(host_id, 0) + 1},
            by_zone={**self.by_zone, zone: self.by_zone.get(zone, 0) + 1},
        )
