"""Placing VMs: choose from a snapshot, then claim under lock. Who loses the race comes again."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from leveret.conductor import decisions, scheduler
from leveret.conductor.database import Connection
from leveret.conductor.rows import Change, Vm
from leveret.conductor.store import hosts, vms
from leveret.shared.documents import Placement
from leveret.shared.errors import Problem


@dataclass(frozen=True, slots=True)
class Placements:
    """What became of some pending VMs. `lost` had a host that somebody else filled meanwhile: try again."""

    placed: list[Change]
    refused: dict[UUID, Problem]
    lost: list[UUID]


def wish_of(vm: Vm) -> scheduler.Wish:
    return scheduler.Wish(
        vcpus=vm.vcpus,
        memory_mib=vm.memory_mib,
        disk_gib=vm.disk_gib,
        placement=Placement.model_validate(vm.spec.get("placement", {})),
        avoid=frozenset(UUID(failed["host_id"]) for failed in vm.failed_hosts),
    )


async def place(connection: Connection, pending: Sequence[Vm], now: datetime, rng: random.Random) -> Placements:
    """A host for each of these VMs, claimed in the caller's transaction when it records the changes."""
    snapshot = await hosts.snapshot(connection)
    chosen: list[tuple[Vm, UUID]] = []
    refused: dict[UUID, Problem] = {}
    for vm in pending:
        choice = scheduler.choose(wish_of(vm), snapshot, rng)
        if isinstance(choice, scheduler.Refused):
            refused[vm.id] = choice.problem()
        else:
            chosen.append((vm, choice.id))
    current = await hosts.lock(connection, {host_id for _, host_id in chosen})
    winners = [(vm, host_id) for vm, host_id in chosen if _claim(vm, current.get(host_id))]
    tokens = await vms.new_tokens(connection, len(winners)) if winners else []
    placed = [
        decisions.placed(vm, host_id, current[host_id].name, token, now)
        for (vm, host_id), token in zip(winners, tokens, strict=True)
    ]
    won = {vm.id for vm, _ in winners}
    return Placements(placed, refused, [vm.id for vm, _ in chosen if vm.id not in won])


def _claim(vm: Vm, host: scheduler.HostSnapshot | None) -> bool:
    """Whether there is still room on a host that is locked now; if so, it is taken."""
    if host is None or host.state != "up" or not host.healthy:
        return False
    if vm.vcpus > host.vcpus_free or vm.memory_mib > host.memory_mib_free or vm.disk_gib > host.disk_gib_free:
        return False
    host.vcpus_free -= vm.vcpus
    host.memory_mib_free -= vm.memory_mib
    host.disk_gib_free -= vm.disk_gib
    return True
