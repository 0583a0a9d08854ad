"""What is asked of groups. Their VMs join them when they are made, and are placed with regard to each other."""

from leveret.conductor.database import Connection
from leveret.conductor.order import Order
from leveret.conductor.rows import Fact
from leveret.conductor.store import groups
from leveret.shared.errors import Code, fail
from leveret.shared.groups import CreateGroup, DeleteGroup


async def create(connection: Connection, order: Order, body: CreateGroup) -> list[Fact]:
    if await groups.create(connection, order.project, body):
        return [order.fact("group.created", **body.model_dump())]
    there = await groups.find(connection, order.project, body.name)
    if there is None or {**there, "vms": None} != {**body.model_dump(), "vms": None}:
        raise fail(
            Code.NAME_TAKEN,
            f"There is a group {body.name!r} already, and it is not the same.",
            hint="Choose another name, or delete that group when it has no VMs any more.",
        )
    return []


async def delete(connection: Connection, order: Order, body: DeleteGroup) -> list[Fact]:
    there = await groups.find(connection, order.project, body.name)
    if there is None:
        raise fail(Code.GROUP_NOT_FOUND, f"Project {order.project!r} has no group {body.name!r}.")
    if there["vms"]:
        raise fail(Code.GROUP_IN_USE, f"Group {body.name!r} has {there['vms']} VM{'s' if there['vms'] > 1 else ''}.")
    await groups.delete(connection, order.project, body.name)
    return [order.fact("group.deleted", name=body.name)]
