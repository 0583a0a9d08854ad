"""VMs over REST: asking for a change, and reading what became of it."""

import time
from collections.abc import Awaitable, Callable
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request
from starlette.responses import Response

from leveret.api import etags, listing, several, views
from leveret.api.auth import Asker, Identity, Reader, Writer
from leveret.api.bodies import body_of
from leveret.api.headers import idempotency_key, if_match
from leveret.api.params import BIGINT_MAX, CreateParams, Creating, Deleting, Listing, Nothing, VmId, Waiting, WaitParams
from leveret.api.problems import Refusal
from leveret.api.requests import VmAsk, refused
from leveret.api.service import Service, service_of
from leveret.api.streaming import Streamed
from leveret.api.waits import Sight, look
from leveret.shared import ids
from leveret.shared.documents import CreateVm, DeleteVm, Document, RequestView, UpdateVm, VmView
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.messages import Verdict, invalid
from leveret.shared.waiting import Outcome, Standing, Target, judge

WAIT_HEADER = "Leveret-Wait"

#: A delete that is queued will be carried out: until it is judged, no row says that nobody deletes the VM.
_NEVER = BIGINT_MAX
_ONE_ID = "the id in the address is that of one VM: ask for several with POST /v1/vms, and an Idempotency-Key"
_NOT_TRIED = "Nobody said in time whether this would be accepted. It was only a dry run: nothing was made."

IfMatch = Annotated[str | None, Depends(if_match)]


async def put_vm(
    request: Request,
    vm_id: VmId,
    identity: Writer,
    document: Annotated[CreateVm, Depends(body_of(CreateVm))],
    params: Creating,
) -> Response:
    if document.count > 1:
        raise invalid(_ONE_ID, field="count")
    return await _create(request, identity, vm_id, document, params)


async def post_vm(
    request: Request, identity: Writer, document: Annotated[CreateVm, Depends(body_of(CreateVm))], params: Creating
) -> Response:
    key = idempotency_key(request)
    vm_id = ids.new_id() if key is None else ids.id_for_key(identity.project, key)
    return await _create(request, identity, vm_id, document, params, by_key=key is not None)


async def patch_vm(
    request: Request,
    vm_id: VmId,
    identity: Writer,
    condition: IfMatch,
    document: Annotated[UpdateVm, Depends(body_of(UpdateVm))],
    _params: Nothing,
) -> Response:
    return await _change(request, _ask(request, identity, vm_id, document, if_match=condition), WaitParams())


async def delete_vm(request: Request, vm_id: VmId, identity: Writer, condition: IfMatch, params: Deleting) -> Response:
    ask = _ask(request, identity, vm_id, DeleteVm(), if_match=condition)
    return await _change(request, ask, params, newer_than=_NEVER)


def action(model: type[Document]) -> Callable[..., Awaitable[Response]]:
    """The handler of one action, whose body is this document and may be left out."""

    async def act(
        request: Request,
        vm_id: VmId,
        identity: Writer,
        condition: IfMatch,
        document: Annotated[Document, Depends(body_of(model, optional=True))],
        params: Waiting,
    ) -> Response:
        newer_than = await _generation(request, identity, vm_id, params)
        ask = _ask(request, identity, vm_id, document, if_match=condition)
        return await _change(request, ask, params, newer_than=newer_than)

    return act


async def get_vm(request: Request, vm_id: VmId, identity: Reader, params: Waiting) -> Response:
    service = service_of(request)
    headers = {}
    if params.wait is None:
        sight = await look(service.database, identity.project, vm_id)
    else:
        target = params.wait
        outcome, sight = await service.waits.until(
            identity.project,
            vm_id,
            lambda seen: _outcome(seen, target),
            timeout_s=params.timeout_s,
            asker=Asker(request),
        )
        headers[WAIT_HEADER] = outcome.value
    if sight.vm is None:
        raise Refusal(sight.refusal or not_found(sight), headers=headers)
    headers["ETag"] = views.etag(sight.vm)
    if etags.has_it(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return _json(sight.vm, headers=headers)


async def list_vms(request: Request, _identity: Reader, params: Listing) -> Response:
    batches = listing.batches(service_of(request).database, Asker(request), params)
    first = await anext(batches)
    if first.is_last:
        return Response(listing.whole(first), media_type="application/json")
    return Streamed(listing.pieces(first, batches), media_type="application/json")


def not_found(sight: Sight) -> Problem:
    why = "was deleted before it was created" if sight.tombstone else "is not there"
    return Problem.of(Code.VM_NOT_FOUND, f"This VM {why}.")


async def _create(
    request: Request, identity: Identity, vm_id: UUID, document: CreateVm, params: CreateParams, *, by_key: bool = False
) -> Response:
    if document.placement.hosts and identity.role != "admin":
        raise fail(Code.FORBIDDEN, "Only an administrator's token may say which hosts (`placement.hosts`).")
    ask = _ask(request, identity, vm_id, document, dry_run=params.dry_run)
    if params.dry_run:
        return await _try(request, ask, by_key=by_key)
    if document.count > 1:
        return await _create_several(request, ask, document.count, params, by_key=by_key)
    return await _change(request, ask, params, by_key=by_key)


async def _create_several(request: Request, ask: VmAsk, count: int, params: CreateParams, *, by_key: bool) -> Response:
    """They have neither one address nor one ETag: each stands in the answer with its own id."""
    try:
        view, outcome = await several.create(service_of(request), ask, count, params, Asker(request))
    except LeveretError as error:
        raise _told(error, by_key=by_key) from error
    return _json(view, status=202, headers={} if outcome is None else {WAIT_HEADER: outcome.value})


def _ask(
    request: Request,
    identity: Identity,
    vm_id: UUID,
    document: Document,
    *,
    if_match: str | None = None,
    dry_run: bool = False,
) -> VmAsk:
    return VmAsk(
        project=identity.project,
        actor=identity.actor,
        vm_id=vm_id,
        request_id=request.state.request_id,
        document=document,
        at=time.time(),
        if_match=if_match,
        dry_run=dry_run,
        traceparent=request.headers.get("traceparent"),
    )


async def _try(request: Request, ask: VmAsk, *, by_key: bool) -> Response:
    """Only ask what the answer would be. Nothing is queued that could come true later, so it is judged now or not."""
    try:
        await service_of(request).requests.judge(ask, unjudged=_NOT_TRIED)
    except LeveretError as error:
        raise _told(error, by_key=by_key) from error
    view = RequestView(request_id=ask.request_id, vm_id=ask.vm_id, verdict="would_be_accepted", vm=None)
    return _json(view)


async def _change(
    request: Request, ask: VmAsk, params: WaitParams, *, by_key: bool = False, newer_than: int = -1
) -> Response:
    """Ask, wait for the verdict, then for the VM if that was asked for too."""
    service = service_of(request)
    headers = {"Location": f"/v1/vms/{ask.vm_id}"}
    try:
        verdict = await service.requests.send(ask)
    except LeveretError as error:
        details = {**error.problem.details, "vm_id": str(ask.vm_id)}
        raise Refusal(error.problem.model_copy(update={"details": details}), headers=headers) from error
    if verdict is not None and not verdict.accepted:
        raise _told(refused(verdict), by_key=by_key)
    if params.wait is None:
        sight = await _glance(service, ask.project, ask.vm_id, verdict)
    else:
        target = params.wait
        generation = newer_than + 1 if verdict is None else verdict.generation or 0
        outcome, sight = await service.waits.until(
            ask.project,
            ask.vm_id,
            lambda seen: _outcome_of_change(seen, target, generation, verdict, ask.request_id),
            timeout_s=params.timeout_s,
            asker=Asker(request),
        )
        if sight.vm is None and outcome is Outcome.FAILED:
            raise _told(LeveretError(sight.refusal or not_found(sight)), by_key=by_key)
        headers[WAIT_HEADER] = outcome.value
    if sight.vm is not None:
        headers["ETag"] = views.etag(sight.vm)
    return _json(_view(ask, verdict, sight.vm), status=202, headers=headers)


def _view(ask: VmAsk, verdict: Verdict | None, vm: VmView | None) -> RequestView:
    """A create whose row is there was accepted, even if nobody heard the verdict."""
    accepted = verdict is not None or (vm is not None and isinstance(ask.document, CreateVm))
    return RequestView(request_id=ask.request_id, vm_id=ask.vm_id, verdict="accepted" if accepted else "queued", vm=vm)


def _outcome(sight: Sight, target: Target) -> Outcome | None:
    """Waiting without a request of one's own: what is refused or gone will not come."""
    if sight.vm is not None:
        return judge(Standing.of(sight.vm), target)
    return Outcome.FAILED if sight.refusal is not None or sight.tombstone else None


def _outcome_of_change(
    sight: Sight, target: Target, generation: int, verdict: Verdict | None, request_id: str
) -> Outcome | None:
    if sight.vm is not None:
        return judge(Standing.of(sight.vm), target, generation)
    if target == "deleted" and verdict is not None:
        return Outcome.REACHED  # it is gone so long that even its row is
    if verdict is None and sight.refusal is not None and sight.refused_request_id == request_id:
        return Outcome.FAILED
    if verdict is None and target == "deleted" and sight.tombstone:
        return Outcome.FAILED  # as the verdict would have said: there was none, and now there will be none
    return None


def _told(error: LeveretError, *, by_key: bool) -> LeveretError:
    """A refusal as HTTP tells it: one key with two bodies is 422 and one id with two bodies 409, as is usual."""
    if by_key and error.problem.code is Code.ID_CONFLICT:
        return Refusal(error.problem, status=422)
    return error


async def _glance(service: Service, project: str, vm_id: UUID, verdict: Verdict | None) -> Sight:
    """The row, if it can be read now. The request is made already, so its absence is no failure."""
    if verdict is None:
        return Sight()
    try:
        return await look(service.database, project, vm_id)
    except LeveretError:
        return Sight()


async def _generation(request: Request, identity: Identity, vm_id: UUID, params: WaitParams) -> int:
    """The generation before a change: until that is judged the row tells of an older wish, and a wait looks for more.

    Nobody needs it who does not wait; -1 then, and for a VM that is not there.
    """
    if params.wait is None:
        return -1
    sight = await look(service_of(request).database, identity.project, vm_id)
    return sight.vm.generation if sight.vm is not None else -1


def _json(document: Document, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(document.model_dump_json(), status_code=status, headers=headers, media_type="application/json")
