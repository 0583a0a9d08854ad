"""Events over REST: read on from where one was and wait for what comes, page by page or as a stream."""

import re
import time
from uuid import UUID

from fastapi import Request
from starlette.responses import Response

from leveret.api import sse, views
from leveret.api.administering import Looking
from leveret.api.auth import Asker, Reader
from leveret.api.params import BIGINT_MAX, EventParams, Following
from leveret.api.problems import Refusal
from leveret.api.service import Service, service_of
from leveret.api.streaming import Streamed, begun
from leveret.api.vms import not_found
from leveret.api.waits import look, news
from leveret.shared.errors import Code, fail

_LOOK_S = 10.0


async def list_events(request: Request, identity: Reader, params: Following) -> Response:
    return await _answer(request, identity.project, params, None)


async def list_vm_events(request: Request, vm_id: UUID, identity: Reader, params: Following) -> Response:
    """A VM whose request is still queued has no events yet: its first one is waited for like any other."""
    return await _answer(request, identity.project, params, vm_id)


async def list_project_events(request: Request, desk: Looking, params: Following) -> Response:
    await desk.must_exist()
    return await _answer(request, desk.project, params, None)


async def _answer(request: Request, project: str, params: EventParams, vm_id: UUID | None) -> Response:
    seen = _last_event_id(request)
    if seen is not None:
        params = params.model_copy(update={"after": seen})
    if sse.is_wanted(request):
        return await _stream(request, project, params, vm_id)
    return await _page(request, project, params, vm_id)


async def _stream(request: Request, project: str, params: EventParams, vm_id: UUID | None) -> Response:
    service = service_of(request)
    if vm_id is not None:
        await _must_be_known(service, project, vm_id)
    pieces = service.streams.follow(Asker(request), project, params.after, vm_id)
    return Streamed(await begun(pieces), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)


async def _page(request: Request, project: str, params: EventParams, vm_id: UUID | None) -> Response:
    service, asker = service_of(request), Asker(request)
    until = time.monotonic() + params.wait_s
    with service.feed.watch(project, vm_id) as watch:
        after = params.after if params.after != "latest" else await service.log.newest(project)
        while True:
            page = await service.log.read(project, after, params.limit, vm_id)
            left_s = until - time.monotonic()
            if page.items or left_s <= 0 or service.feed.is_closed or await asker.is_gone():
                break
            await news(watch, asker, min(left_s, _LOOK_S))
            await asker.confirm()
    if vm_id is not None and not page.items:
        await _must_be_known(service, project, vm_id)
    document = views.EventPage(
        items=page.items, next=page.items[-1].seq if page.items else after, forgotten_seq=page.forgotten_seq
    )
    return Response(document.model_dump_json(), media_type="application/json")


def _last_event_id(request: Request) -> int | None:
    """Where a stream that broke goes on. Raises LeveretError `invalid_request` for what no stream has given out."""
    given = request.headers.get("last-event-id", "")
    if not given:
        return None
    if not re.fullmatch(r"[0-9]{1,19}", given) or int(given) > BIGINT_MAX:
        errors = [{"field": "Last-Event-ID", "message": "give the id of an event as it was told"}]
        raise fail(Code.INVALID_REQUEST, "The headers are not valid.", errors=errors)
    return int(given)


async def _must_be_known(service: Service, project: str, vm_id: UUID) -> None:
    sight = await look(service.database, project, vm_id)
    if sight.vm is None:
        raise Refusal(sight.refusal or not_found(sight))
