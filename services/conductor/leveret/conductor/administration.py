"""Administration: what becomes of projects, tokens, broker users, groups and hosts.

Each order is one transaction with the facts it logs and the answer it gets; coming again, it gets that answer again.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel

from leveret.conductor import group_orders, host_orders
from leveret.conductor.database import Connection
from leveret.conductor.order import Order
from leveret.conductor.rows import Fact, told
from leveret.conductor.store import events, orders, projects
from leveret.conductor.store.projects import RATES, RESOURCES, AmqpUser, Token
from leveret.shared.documents import CreateProject, DeleteProject, UpdateQuota
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.groups import CreateGroup, DeleteGroup
from leveret.shared.messages import (
    Cordon,
    EndAmqpUser,
    EndToken,
    Fence,
    NewAmqpUser,
    NewToken,
    Retire,
    TokensUsed,
    Uncordon,
)


async def carry_out(connection: Connection, order: Order, *, heard: bool = True) -> Problem | None:
    """Do it in the caller's transaction, once. The problem when it cannot be done; then only that is noted.

    When nobody waits to hear it (not `heard`), the project's log says it.
    """
    known, problem = await orders.judged(connection, order.project, order.request_id, order.digest)
    if not known:
        try:
            async with connection.transaction():
                facts = await HANDLERS[type(order.body)](connection, order, order.body)
                await events.append(connection, facts)
        except LeveretError as error:
            problem = error.problem
            await events.append(connection, [] if heard else [order.fact("rejected", problem=told(problem))])
        await orders.note(connection, order.project, order.request_id, order.digest, problem)
    return problem


async def _create_project(connection: Connection, order: Order, body: CreateProject) -> list[Fact]:
    wanted = body.quota.model_dump()
    if await projects.create(connection, order.project):
        await projects.limit(connection, order.project, wanted)
        return [order.fact("project.created", quota=wanted)]
    there = await projects.quota(connection, order.project)
    if there is None:
        raise fail(Code.ID_CONFLICT, f"There was a project {order.project!r} before: its id is not used again.")
    if _present(there) != wanted:
        raise fail(
            Code.ID_CONFLICT,
            f"Project {order.project!r} is there, with another quota.",
            hint="Change its quota instead: `leveret quota set`.",
        )
    return []


async def _set_quota(connection: Connection, order: Order, body: UpdateQuota) -> list[Fact]:
    there = await _quota_of(connection, order.project)
    wanted = body.model_dump(exclude_unset=True)
    changed = {name: value for name, value in wanted.items() if _present(there)[name] != value}
    above = {
        name: {"limit": value, "used": there[f"{name}_used"]}
        for name, value in changed.items()
        if name in RESOURCES and value is not None and there[f"{name}_used"] > value
    }
    if above:
        raise fail(
            Code.QUOTA_EXCEEDED,
            f"Project {order.project!r} uses more than that already.",
            hint="Delete VMs of the project first, or set the limit no lower than what it uses.",
            quota=above,
        )
    await projects.limit(connection, order.project, changed)
    return [order.fact("quota.changed", quota=changed)] if changed else []


async def _delete_project(connection: Connection, order: Order, _body: DeleteProject) -> list[Fact]:
    there = await _quota_of(connection, order.project)
    if there["vms_used"]:
        raise fail(Code.PROJECT_IN_USE, f"Project {order.project!r} still has {there['vms_used']} VMs.")
    if not await projects.is_administered_without(connection, project=order.project):
        raise fail(
            Code.PROJECT_IN_USE,
            f"The last administrator's token belongs to project {order.project!r}.",
            hint="Make one in another project first: `leveret token create NAME --role admin --project OTHER`.",
        )
    await projects.close(connection, order.project)
    return [order.fact("project.deleted")]


async def _create_token(connection: Connection, order: Order, body: NewToken) -> list[Fact]:
    await _quota_of(connection, order.project)
    holder = await projects.token_named(connection, order.project, body.name)
    if holder not in {None, body.token_id}:
        raise fail(
            Code.NAME_TAKEN,
            f"Project {order.project!r} has a token {body.name!r} already.",
            hint="Revoke that one first, or choose another name.",
        )
    token = Token(
        id=body.token_id,
        project_id=order.project,
        name=body.name,
        role=body.role,
        hash=bytes.fromhex(body.hash),
        expires_at=body.expires_at,
        created_by=order.by,
    )
    if not await projects.add_token(connection, token):
        return []
    expires = body.expires_at.isoformat() if body.expires_at else None
    about = {"token_id": str(body.token_id), "name": body.name, "role": body.role, "expires_at": expires}
    return [order.fact("token.created", **about)]


async def _revoke_token(connection: Connection, order: Order, body: EndToken) -> list[Fact]:
    if not await projects.is_administered_without(connection, token_id=body.token_id):
        raise fail(
            Code.STATE_CONFLICT,
            "This is the last administrator's token.",
            hint="Make another one first: `leveret token create NAME --role admin`.",
        )
    revoked = await projects.revoke_token(connection, order.project, body.token_id)
    if revoked is None:
        raise fail(Code.TOKEN_NOT_FOUND, f"Project {order.project!r} has no token {body.token_id}.")
    name, is_news = revoked
    return [order.fact("token.revoked", token_id=str(body.token_id), name=name)] if is_news else []


async def _note_use(connection: Connection, _order: Order, body: TokensUsed) -> list[Fact]:
    await projects.tokens_used(connection, body.last_used)
    return []


async def _add_amqp_user(connection: Connection, order: Order, body: NewAmqpUser) -> list[Fact]:
    await _quota_of(connection, order.project)
    wanted = AmqpUser(order.project, body.role)
    there = (await projects.amqp_users(connection, [body.user])).get(body.user)
    if there == wanted:
        return []
    if there is not None and there.project_id != order.project:
        raise _speaks_for_another(body.user)
    if not await projects.put_amqp_user(connection, body.user, wanted, order.by):
        raise _speaks_for_another(body.user)
    return [order.fact("amqp_user.changed" if there else "amqp_user.added", user=body.user, role=body.role)]


def _speaks_for_another(user: str) -> LeveretError:
    return fail(
        Code.ID_CONFLICT,
        f"Broker user {user!r} speaks for another project.",
        hint="Choose another name: a broker user speaks for one project.",
    )


async def _remove_amqp_user(connection: Connection, order: Order, body: EndAmqpUser) -> list[Fact]:
    if not await projects.remove_amqp_user(connection, order.project, body.user):
        raise fail(Code.AMQP_USER_NOT_FOUND, f"Broker user {body.user!r} does not speak for {order.project!r}.")
    return [order.fact("amqp_user.removed", user=body.user)]


async def _quota_of(connection: Connection, project: str) -> dict[str, Any]:
    """The project's limits; it is locked, so that nobody closes or fills it meanwhile."""
    there = await projects.quota(connection, project)
    if there is None:
        raise project_not_found(project)
    return there


def project_not_found(project: str) -> LeveretError:
    return fail(Code.PROJECT_NOT_FOUND, f"There is no project {project!r}.")


def _present(quota: dict[str, Any]) -> dict[str, int | None]:
    return {name: quota[f"{name}_max"] for name in RESOURCES} | {name: quota[name] for name in RATES}


#: What each order does.
HANDLERS: dict[type[BaseModel], Callable[[Connection, Order, Any], Awaitable[list[Fact]]]] = {
    CreateProject: _create_project,
    UpdateQuota: _set_quota,
    DeleteProject: _delete_project,
    NewToken: _create_token,
    EndToken: _revoke_token,
    TokensUsed: _note_use,
    NewAmqpUser: _add_amqp_user,
    EndAmqpUser: _remove_amqp_user,
    Cordon: host_orders.cordon,
    Uncordon: host_orders.uncordon,
    Fence: host_orders.fence,
    Retire: host_orders.retire,
    CreateGroup: group_orders.create,
    DeleteGroup: group_orders.delete,
}
