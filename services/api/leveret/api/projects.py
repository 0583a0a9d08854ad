"""Projects over REST: who administers them decides, and the answer comes after the decision."""

from typing import Annotated

from fastapi import Depends, Request
from starlette.responses import Response

from leveret.api import queries, views
from leveret.api.administering import Administering, Founding, Looking
from leveret.api.auth import Reader
from leveret.api.bodies import body_of
from leveret.api.database import EVERY_PROJECT
from leveret.api.paging import cursor_of_name
from leveret.api.params import ByName, Nothing
from leveret.api.service import service_of
from leveret.shared.documents import CreateProject, DeleteProject, Document, UpdateQuota


async def list_projects(request: Request, identity: Reader, params: ByName) -> Response:
    """Administrators see every project, everybody else their own."""
    if identity.role == "admin":
        only, sight = None, EVERY_PROJECT
    else:
        only, sight = identity.project, identity.project
    rows = await service_of(request).database.rows(sight, queries.LIST_PROJECTS, only, params.after(), params.limit + 1)
    shown = rows[: params.limit]
    more = cursor_of_name(shown[-1]["id"]) if len(rows) > len(shown) else None
    return _json(views.ProjectPage(items=tuple(views.project(row) for row in shown), next=more))


async def get_project(desk: Looking, _params: Nothing) -> Response:
    return _json(views.project(await desk.must_exist()))


async def put_project(
    desk: Founding, document: Annotated[CreateProject, Depends(body_of(CreateProject))], _params: Nothing
) -> Response:
    """Making a project again as it was made is no failure, so that asking again is safe."""
    before = await desk.row(queries.GET_PROJECT)
    await desk.ask(document)
    view = views.project(await desk.must_exist())
    return _json(view, status=201 if before is None else 200, headers={"Location": f"/v1/projects/{desk.project}"})


async def patch_quota(
    desk: Administering, document: Annotated[UpdateQuota, Depends(body_of(UpdateQuota))], _params: Nothing
) -> Response:
    await desk.ask(document)
    return _json(views.project(await desk.must_exist()))


async def delete_project(desk: Administering, _params: Nothing) -> Response:
    await desk.ask(DeleteProject())
    return Response(status_code=204)


def _json(document: Document, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(document.model_dump_json(), status_code=status, headers=headers, media_type="application/json")
