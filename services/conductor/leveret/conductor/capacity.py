"""How many more VMs there is room for."""

from datetime import UTC, datetime

from leveret.conductor.database import Connection
from leveret.conductor.placing import wish_in
from leveret.conductor.scheduling import Fleet
from leveret.conductor.store import hosts
from leveret.shared.placements import AskCapacity, CapacityReport


async def measure(connection: Connection, ask: AskCapacity) -> CapacityReport:
    """How many VMs of this shape fit now, in each zone."""
    fleet = Fleet(await hosts.snapshot(connection))
    asked = ask.placement.zones
    zones = {
        zone: vms for zone, vms in fleet.capacity(wish_in(ask.placement, ask)).items() if not asked or zone in asked
    }
    return CapacityReport(at=datetime.now(UTC), hosts=len(fleet), zones=zones, total=sum(zones.values()))
