"""The tokens of a project over REST. A secret is told once, to whom asked for it, and only its hash goes further."""

import hashlib
import secrets
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends
from starlette.responses import Response

from leveret.api import queries, views
from leveret.api.administering import Administering
from leveret.api.bodies import body_of
from leveret.api.paging import cursor_of_age
from leveret.api.params import ByAge, Nothing, TokenId
from leveret.shared import ids
from leveret.shared.documents import CreateToken
from leveret.shared.errors import Code, fail
from leveret.shared.messages import EndToken, NewToken, invalid

#: So that a secret that strayed can be known for what it is.
PREFIX = "lv_"
SECRET_BYTES = 32
_UNHEARD = "List the tokens: if there is one of this name, its secret is lost; revoke it and make another."


async def list_tokens(desk: Administering, params: ByAge) -> Response:
    await desk.must_exist()
    rows = await desk.rows(queries.LIST_TOKENS, *params.after(), params.limit + 1)
    shown = rows[: params.limit]
    more = cursor_of_age(shown[-1]["created_at"], shown[-1]["id"]) if len(rows) > len(shown) else None
    page = views.TokenPage(items=tuple(views.token(row) for row in shown), next=more)
    return Response(page.model_dump_json(), media_type="application/json")


async def post_token(
    desk: Administering, document: Annotated[CreateToken, Depends(body_of(CreateToken))], _params: Nothing
) -> Response:
    if document.expires_at is not None and document.expires_at <= datetime.now(UTC):
        raise invalid("is past", field="expires_at")
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    new = NewToken(**document.model_dump(), token_id=ids.new_id(), hash=hashlib.sha256(secret.encode()).hexdigest())
    await desk.ask(new, hint=_UNHEARD)
    row = await desk.row(queries.GET_TOKEN, new.token_id)
    if row is None:
        raise fail(Code.TOKEN_NOT_FOUND, "The token was made, and is gone already.")
    view = views.new_token(row, secret)
    headers = {"Cache-Control": "no-store"}
    return Response(view.model_dump_json(), status_code=201, headers=headers, media_type="application/json")


async def delete_token(desk: Administering, token_id: TokenId, _params: Nothing) -> Response:
    await desk.ask(EndToken(token_id=token_id))
    return Response(status_code=204)
