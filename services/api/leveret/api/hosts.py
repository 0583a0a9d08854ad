"""Hosts over REST, for administrators: how they are, and what is ordered of them."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import asyncpg
from fastapi import Depends, Path, Request
from starlette.responses import Response

from leveret.api import queries, views
from leveret.api.asking import ask_for
from leveret.api.auth import Administrator
from leveret.api.bodies import body_of
from leveret.api.params import Nothing
from leveret.api.service import service_of
from leveret.shared.documents import CordonHost, Document, FenceHost, HostView, RetireHost, UncordonHost
from leveret.shared.errors import Code, fail
from leveret.shared.headers import uuid_in
from leveret.shared.messages import Cordon, Fence, Retire, Uncordon

#: What the conductor is told, by what an administrator asks for.
ORDERS: dict[type[Document], type[Document]] = {
    CordonHost: Cordon,
    UncordonHost: Uncordon,
    FenceHost: Fence,
    RetireHost: Retire,
}

HostKey = Annotated[str, Path(description="Id or name. Several hosts may have had one name: then give an id.")]


async def list_hosts(request: Request, _identity: Administrator, _params: Nothing) -> Response:
    rows = await service_of(request).database.rows(None, queries.LIST_HOSTS)
    return _json(views.HostPage(items=tuple(views.host(row) for row in rows)))


async def get_host(request: Request, host: HostKey, _identity: Administrator, _params: Nothing) -> Response:
    return _json(await find(request, host))


def action(model: type[Document]) -> Callable[..., Awaitable[Response]]:
    """The handler of one order, whose body is this document; it may be left out unless it must say something."""

    async def act(
        request: Request,
        host: HostKey,
        identity: Administrator,
        document: Annotated[Any, Depends(body_of(model, optional=not says_something(model)))],
        _params: Nothing,
    ) -> Response:
        host_id = (await find(request, host)).id
        order = ORDERS[model].model_validate({**document.model_dump(), "host_id": host_id})
        await service_of(request).requests.judge(ask_for(request, identity, order))
        return _json(await find(request, str(host_id)))

    return act


def says_something(model: type[Document]) -> bool:
    """Whether this document has a field that must be given."""
    return any(field.is_required() for field in model.model_fields.values())


async def find(request: Request, key: str) -> HostView:
    """The host of this id, or the one of this name that is not retired. Raises LeveretError."""
    rows: list[asyncpg.Record] = []
    if "\x00" not in key:
        rows = await service_of(request).database.rows(None, queries.FIND_HOSTS, uuid_in(key), key)
    named = [row for row in rows if row["id"] == uuid_in(key)] or rows
    meant = [row for row in named if row["state"] != "retired"] or named
    if not meant:
        raise fail(Code.HOST_NOT_FOUND, "No host has this id or name.")
    if len(meant) > 1:
        raise fail(
            Code.HOST_CONFLICT,
            f"{len(meant)} hosts have this name.",
            hint=f"Give the id of the one that is meant: {meant[0]['id']} was heard of last.",
            ids=[str(row["id"]) for row in meant],
        )
    return views.host(meant[0])


def _json(document: Document) -> Response:
    return Response(document.model_dump_json(), media_type="application/json")
