"""Telling hosts what to make true, and askers what became of their requests."""

import base64
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from typing import Any
from uuid import UUID

from leveret.conductor.database import Connection
from leveret.conductor.rows import VM_COLUMNS, Vm
from leveret.shared import topology
from leveret.shared.bus import Answerer, Delivery, Envelope, Publisher
from leveret.shared.bus.publishing import DIRECT_REPLY
from leveret.shared.checks import CheckReport
from leveret.shared.fault_points import fault_point
from leveret.shared.lifecycle import Desired, State, Wanted
from leveret.shared.messages import DesiredVm, Image, ListVms, Nic, Verdict
from leveret.shared.placements import CapacityReport

_COMMANDS = f"""
SELECT {", ".join(f"v.{name}" for name in VM_COLUMNS)}, h.epoch, n.cidr, n.gateway, n.dns, u.user_data,
       extract(epoch FROM v.deadline - now())::float8 AS left_s
FROM vms v
JOIN hosts h ON h.id = v.host_id
JOIN networks n ON n.name = v.network
LEFT JOIN vm_user_data u ON u.vm_id = v.id AND v.state = 'building'
WHERE v.id = ANY($1)
"""  # noqa: S608 - our own column names


@dataclass(frozen=True, slots=True)
class Command:
    """Something to say to a host. Losing it does no harm: the sweeper says it again."""

    host_id: UUID
    message: DesiredVm | ListVms


async def commands_for(connection: Connection, ids: Iterable[UUID]) -> list[Command]:
    """What the hosts of these VMs should make true now, as the rows say in this very transaction."""
    rows = await connection.fetch(_COMMANDS, list(ids))
    return [Command(row["host_id"], _desired(Vm.of(row), row)) for row in rows]


def wanted_of(vm: Vm) -> Wanted:
    """What the host of a VM is told to make true of it."""
    if vm.desired is Desired.DELETED or vm.is_given_up:
        return Wanted.ABSENT
    return Wanted(vm.desired)


def _desired(vm: Vm, row: Any) -> DesiredVm:
    assert vm.token is not None
    user_data = row["user_data"]
    return absent(vm, row["epoch"], vm.token).model_copy(
        update={
            "wanted": wanted_of(vm),
            "may_build": vm.state is State.BUILDING,
            "grace_s": vm.grace_s,
            "ssh_keys": tuple(vm.spec.get("ssh_keys", ())),
            "user_data_base64": base64.b64encode(user_data).decode() if user_data is not None else None,
            "nic": _nic(vm, row),
            "deadline_s": max(row["left_s"] or 0.0, 0.0),
        }
    )


def _nic(vm: Vm, row: Any) -> Nic | None:
    if vm.address is None:
        return None
    return Nic(
        network=vm.network,
        mac=vm.mac,
        address=str(vm.address),
        prefix=ip_network(row["cidr"]).prefixlen,
        gateway=str(ip_interface(row["gateway"]).ip),
        dns=tuple(str(ip_interface(server).ip) for server in row["dns"]),
    )


def absent(vm: Vm, epoch: int, token: int) -> DesiredVm:
    """The order to leave nothing of a placement, which may be over already."""
    return DesiredVm(
        vm_id=vm.id,
        host_epoch=epoch,
        project=vm.project_id,
        name=vm.name,
        generation=vm.generation,
        token=token,
        wanted=Wanted.ABSENT,
        may_build=False,
        restarts=vm.restarts,
        grace_s=0,
        vcpus=vm.vcpus,
        memory_mib=vm.memory_mib,
        disk_gib=vm.disk_gib,
        image=Image(url=vm.image["url"], sha256=vm.image["sha256"], format=vm.image["format"]),
        nic=None,
        deadline_s=0.0,
    )


async def send(publisher: Publisher, commands: Sequence[Command]) -> None:
    for command in commands:
        await publisher.post(topology.HOSTS.name, str(command.host_id), command.message)


def is_answerable(delivery: Delivery) -> bool:
    """Whether the asker waits for a direct reply; nobody else's queue is ever written to."""
    return delivery.reply_to is not None and delivery.reply_to.startswith(f"{DIRECT_REPLY}.")


class Answers:
    """Says to askers what became of their requests.

    A gateway's address is its own. A client's may be made up to end the connection that writes to it: those are
    answered over a connection that nothing else depends on.
    """

    def __init__(self, publisher: Publisher, answerer: Answerer, gateways: Collection[str]) -> None:
        self._publisher = publisher
        self._answerer = answerer
        self._gateways = frozenset(gateways)

    @fault_point("requests.answer")
    async def give(self, delivery: Delivery, verdict: Verdict | CheckReport | CapacityReport) -> None:
        """Reply, if a direct reply was asked for. It may be lost: the row is the truth."""
        if not is_answerable(delivery) or not delivery.reply_to:
            return
        if delivery.user_id in self._gateways:
            envelope = Envelope(correlation_id=delivery.correlation_id)
            await self._publisher.post("", delivery.reply_to, verdict, envelope=envelope)
        else:
            self._answerer.answer(delivery, verdict)
