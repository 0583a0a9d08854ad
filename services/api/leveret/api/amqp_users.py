"""The broker users that speak for a project, over REST. The broker's own accounts are made by its administrator."""

from typing import Annotated, Any

from fastapi import Depends, Path
from pydantic import TypeAdapter
from starlette.responses import Response

from leveret.api import queries, views
from leveret.api.administering import Administering, check, is_valid
from leveret.api.bodies import body_of
from leveret.api.paging import cursor_of_name
from leveret.api.params import ByName, Nothing
from leveret.shared.documents import AddAmqpUser, AmqpUserName, Document
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.messages import EndAmqpUser, NewAmqpUser

#: Only described here: what cannot be a broker user's name is answered by hand.
_DESCRIBED: dict[str, Any] = {"pattern": r"^[a-z][a-z0-9-]{0,61}$", "not": {"pattern": "^leveret"}}

_USER_NAME: TypeAdapter[str] = TypeAdapter(AmqpUserName)
UserPath = Annotated[str, Path(description="The broker user.", json_schema_extra=_DESCRIBED)]


async def list_amqp_users(desk: Administering, params: ByName) -> Response:
    await desk.must_exist()
    rows = await desk.rows(queries.LIST_AMQP_USERS, params.after(), params.limit + 1)
    shown = rows[: params.limit]
    more = cursor_of_name(shown[-1]["name"]) if len(rows) > len(shown) else None
    return _json(views.AmqpUserPage(items=tuple(views.amqp_user(row) for row in shown), next=more))


async def put_amqp_user(
    desk: Administering,
    user: UserPath,
    document: Annotated[AddAmqpUser, Depends(body_of(AddAmqpUser))],
    _params: Nothing,
) -> Response:
    check(_USER_NAME, user, field="user")
    before = await desk.row(queries.GET_AMQP_USER, user)
    await desk.ask(NewAmqpUser(**document.model_dump(), user=user))
    row = await desk.row(queries.GET_AMQP_USER, user)
    if row is None:
        raise _not_found()
    return _json(views.amqp_user(row), status=201 if before is None else 200)


async def delete_amqp_user(desk: Administering, user: UserPath, _params: Nothing) -> Response:
    if not is_valid(_USER_NAME, user):
        raise _not_found()
    await desk.ask(EndAmqpUser(user=user))
    return Response(status_code=204)


def _not_found() -> LeveretError:
    return fail(Code.AMQP_USER_NOT_FOUND, "This broker user does not speak for this project.")


def _json(document: Document, *, status: int = 200) -> Response:
    return Response(document.model_dump_json(), status_code=status, media_type="application/json")
