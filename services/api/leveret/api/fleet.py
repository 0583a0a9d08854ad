"""Images and consoles over REST."""

from uuid import UUID

from fastapi import Request
from starlette.responses import Response

from leveret.api import queries, views
from leveret.api.auth import Reader
from leveret.api.params import Nothing, Reading, VmId
from leveret.api.problems import Refusal
from leveret.api.service import Service, service_of
from leveret.api.vms import not_found
from leveret.api.waits import Sight
from leveret.shared import topology
from leveret.shared.bus import Unroutable
from leveret.shared.documents import Document
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.messages import ConsoleTail, ReadConsole

CONSOLE_WAIT_S = 3.0
TRUNCATED_HEADER = "Leveret-Truncated"


async def list_images(request: Request, _identity: Reader, _params: Nothing) -> Response:
    rows = await service_of(request).database.rows(None, queries.LIST_IMAGES)
    return _json(views.ImagePage(items=tuple(views.image(row) for row in rows)))


async def read_console(request: Request, vm_id: VmId, identity: Reader, params: Reading) -> Response:
    """Nobody keeps a copy of a console: its host is asked for it."""
    service = service_of(request)
    row = await service.database.row(identity.project, queries.GET_VM, identity.project, vm_id)
    if row is None:
        raise Refusal(not_found(Sight()))
    if row["host_id"] is None:
        problem = Problem.of(Code.STATE_CONFLICT, f"This VM is {row['state']}: it has no host, and so no console.")
        raise LeveretError(problem)
    tail = await _ask_host(service, row["host_id"], row["host"], ReadConsole(vm_id=vm_id, max_bytes=params.max_bytes))
    if tail.problem is not None:
        raise LeveretError(tail.problem)
    return Response(
        tail.text,
        media_type="text/plain; charset=utf-8",
        headers={TRUNCATED_HEADER: "true" if tail.truncated else "false"},
    )


async def _ask_host(service: Service, host_id: UUID, name: str, question: ReadConsole) -> ConsoleTail:
    try:
        tail = await service.caller.ask(
            topology.HOSTS.name, str(host_id), question, wait_s=CONSOLE_WAIT_S, publish_timeout_s=1.5
        )
    except Unroutable:
        tail = None
    if not isinstance(tail, ConsoleTail):
        raise fail(Code.HOST_SILENT, f"Host {name} did not answer.", host=name)
    return tail


def _json(document: Document) -> Response:
    return Response(document.model_dump_json(), media_type="application/json")
