"""Events over REST: read on from where one was, and wait for what comes."""

import time
from uuid import UUID

from fastapi import Request
from starlette.responses import Response

from leveret.api import queries, views
from leveret.api.auth import Identity, Reader
from leveret.api.params import EventParams, Following
from leveret.api.problems import Refusal
from leveret.api.service import Service, service_of
from leveret.api.vms import not_found
from leveret.api.waits import look

_LOOK_S = 10.0


async def list_events(request: Request, identity: Reader, params: Following) -> Response:
    return await _follow(request, identity, params, None)


async def list_vm_events(request: Request, vm_id: UUID, identity: Reader, params: Following) -> Response:
    """A VM whose request is still queued has no events yet: its first one is waited for like any other."""
    return await _follow(request, identity, params, vm_id)


async def _follow(request: Request, identity: Identity, params: EventParams, vm_id: UUID | None) -> Response:
    service = service_of(request)
    until = time.monotonic() + params.wait_s
    with service.feed.watch(identity.project, vm_id) as watch:
        after = await _start(service, identity.project, params)
        while True:
            page = await _read(service, identity.project, after, params.limit, vm_id)
            left_s = until - time.monotonic()
            if page.items or left_s <= 0 or service.feed.is_closed or await request.is_disconnected():
                break
            await watch.wait(min(left_s, _LOOK_S))
    if vm_id is not None and not page.items:
        await _must_be_known(service, identity.project, vm_id)
    return Response(page.model_dump_json(), media_type="application/json")


async def _start(service: Service, project: str, params: EventParams) -> int:
    if params.after != "latest":
        return params.after
    row = await service.database.row(queries.LAST_SEQ, project)
    return row["last_seq"] if row is not None else 0


async def _read(service: Service, project: str, after: int, limit: int, vm_id: UUID | None) -> views.EventPage:
    if vm_id is None:
        rows = await service.database.rows(queries.LIST_EVENTS, project, after, limit)
    else:
        rows = await service.database.rows(queries.LIST_VM_EVENTS, project, after, limit, vm_id)
    items = tuple(views.event(row) for row in rows)
    return views.EventPage(items=items, next=items[-1].seq if items else after)


async def _must_be_known(service: Service, project: str, vm_id: UUID) -> None:
    sight = await look(service.database, project, vm_id)
    if sight.vm is None:
        raise Refusal(sight.refusal or not_found(sight))
