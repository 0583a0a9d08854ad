"""Groups over REST: VMs that are placed with regard to each other."""

from typing import Annotated

import asyncpg
from fastapi import Depends, Path, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from leveret.api import queries, views
from leveret.api.administering import is_valid
from leveret.api.asking import ask_for
from leveret.api.auth import Identity, Reader, Writer
from leveret.api.bodies import body_of
from leveret.api.paging import cursor_of_name
from leveret.api.params import ByName, Nothing
from leveret.api.service import service_of
from leveret.shared.documents import Document, VmName
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.groups import CreateGroup, DeleteGroup

_NAME: TypeAdapter[str] = TypeAdapter(VmName)

#: The pattern is described and not demanded by the framework: a group that cannot be is one that is not there.
GroupPath = Annotated[
    str,
    Path(description="The group.", json_schema_extra={"pattern": r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"}),
]


async def list_groups(request: Request, identity: Reader, params: ByName) -> Response:
    rows = await service_of(request).database.rows(
        identity.project, queries.LIST_GROUPS, identity.project, params.after(), params.limit + 1
    )
    shown = rows[: params.limit]
    more = cursor_of_name(shown[-1]["name"]) if len(rows) > len(shown) else None
    return _json(views.GroupPage(items=tuple(views.group(row) for row in shown), next=more))


async def get_group(request: Request, group: GroupPath, identity: Reader, _params: Nothing) -> Response:
    return _json(views.group(await _must_exist(request, identity, group)))


async def post_group(
    request: Request,
    identity: Writer,
    document: Annotated[CreateGroup, Depends(body_of(CreateGroup))],
    _params: Nothing,
) -> Response:
    """Making a group again as it was made is no failure, so that asking again is safe."""
    before = await _row(request, identity, document.name)
    await _ask(request, identity, document)
    view = views.group(await _must_exist(request, identity, document.name))
    return _json(view, status=201 if before is None else 200, headers={"Location": f"/v1/groups/{document.name}"})


async def delete_group(request: Request, group: GroupPath, identity: Writer, _params: Nothing) -> Response:
    if not is_valid(_NAME, group):
        raise _not_found()
    await _ask(request, identity, DeleteGroup(name=group))
    return Response(status_code=204)


async def _ask(request: Request, identity: Identity, document: Document) -> None:
    """Return when it is committed. Raises what `Requests.judge` raises."""
    await service_of(request).requests.judge(ask_for(request, identity, document))


async def _row(request: Request, identity: Identity, name: str) -> asyncpg.Record | None:
    return await service_of(request).database.row(identity.project, queries.GET_GROUP, identity.project, name)


async def _must_exist(request: Request, identity: Identity, name: str) -> asyncpg.Record:
    row = await _row(request, identity, name) if is_valid(_NAME, name) else None
    if row is None:
        raise _not_found()
    return row


def _not_found() -> LeveretError:
    return fail(Code.GROUP_NOT_FOUND, "The project has no group of this name.")


def _json(document: Document, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(document.model_dump_json(), status_code=status, headers=headers, media_type="application/json")
