"""Who one is, over REST."""

from fastapi import Request
from starlette.responses import Response

from leveret.api import queries, views
from leveret.api.auth import Reader
from leveret.api.params import Nothing
from leveret.api.service import service_of


async def whoami(request: Request, identity: Reader, _params: Nothing) -> Response:
    """The token's project and role. It may end at any moment, so this says nothing about the next request."""
    row = await service_of(request).database.row(
        identity.project, queries.GET_OWN_TOKEN, identity.project, identity.token_id
    )
    view = views.WhoamiView(
        project=identity.project,
        role=identity.role,
        token=views.TokenName(
            id=identity.token_id, name=identity.token_name, expires_at=row["expires_at"] if row is not None else None
        ),
    )
    return Response(view.model_dump_json(), media_type="application/json")
