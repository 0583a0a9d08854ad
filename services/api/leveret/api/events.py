"""Events over REST: read on from where one was and wait for what comes, page by page or as a stream."""

import time
from uuid import UUID

from fastapi import Request
from starlette.responses import Response

from leveret.api import sse, views
from leveret.api.administering import Looking
from leveret.api.auth import Asker, Reader
from leveret.api.headers import last_event_id
from leveret.api.params import EventParams, Following, VmId
from leveret.api.problems import Refusal
from leveret.api.service import Service, service_of
from leveret.api.streaming import Streamed, begun
from leveret.api.vms import not_found
from leveret.api.waits import look, news
from leveret.shared.errors import Code, LeveretError, fail

_LOOK_S = 10.0


async def list_events(request: Request, identity: Reader, params: Following) -> Response:
    return await _answer(request, identity.project, params, None)


async def list_vm_events(request: Request, vm_id: VmId, identity: Reader, params: Following) -> Response:
    """A VM whose request is still queued has no events yet: its first one is waited for like any other."""
    return await _answer(request, identity.project, params, vm_id)


async def list_project_events(request: Request, desk: Looking, params: Following) -> Response:
    await desk.must_exist()
    return await _answer(request, desk.project, params, None)


async def _answer(request: Request, project: str, params: EventParams, vm_id: UUID | None) -> Response:
    seen = last_event_id(request)
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
            if after > page.last_seq:
                raise _never_was(after, page.last_seq)
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


def _never_was(after: int, last_seq: int) -> LeveretError:
    """The number is of another installation, or of a time that a restored database knows nothing of."""
    return fail(
        Code.STATE_CONFLICT,
        f"There is no event {after} in this project: its newest is {last_seq}.",
        hint="What you knew may be wrong. Read the VMs anew, then go on after `last_seq`.",
        after=after,
        last_seq=last_seq,
    )


async def _must_be_known(service: Service, project: str, vm_id: UUID) -> None:
    sight = await look(service.database, project, vm_id)
    if sight.vm is None:
        raise Refusal(sight.refusal or not_found(sight))
