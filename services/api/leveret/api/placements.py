"""Why a VM stands where it does, and how many more there is room for, over REST."""

from fastapi import Request
from starlette.responses import Response

from leveret.api import queries, views
from leveret.api.asking import ask_for
from leveret.api.auth import Reader
from leveret.api.params import Asking, Nothing, VmId
from leveret.api.problems import Refusal
from leveret.api.service import service_of
from leveret.api.vms import not_found
from leveret.api.waits import look
from leveret.shared.documents import Document
from leveret.shared.errors import Code, fail
from leveret.shared.placements import CapacityReport

#: A VM that was retried without end has been decided about often: the newest decisions say why it stands where it does.
DECISIONS_MAX = 100
#: A conductor only looks at what it has in memory.
WAIT_S = 4.0


async def get_placement(request: Request, vm_id: VmId, identity: Reader, _params: Nothing) -> Response:
    database = service_of(request).database
    row = await database.row(identity.project, queries.GET_PLACEMENT, identity.project, vm_id)
    if row is None:
        sight = await look(database, identity.project, vm_id)
        raise Refusal(sight.refusal or not_found(sight))
    decisions = await database.rows(identity.project, queries.LIST_DECISIONS, identity.project, vm_id, DECISIONS_MAX)
    return _json(views.placement(row, decisions[::-1]))


async def get_capacity(request: Request, identity: Reader, params: Asking) -> Response:
    """Nobody else knows all hosts of all projects: a conductor is asked."""
    ask = ask_for(request, identity, params.question())
    report = await service_of(request).requests.ask(ask, CapacityReport, wait_s=WAIT_S)
    if report is None:
        raise fail(Code.UNAVAILABLE, f"No conductor has answered within {WAIT_S:.0f} s.")
    return _json(report)


def _json(document: Document) -> Response:
    return Response(document.model_dump_json(), media_type="application/json")
