"""VMs that one request asks for: accepted all or none, shown in order, waited for together."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from leveret.api import queries, views
from leveret.api.auth import Asker
from leveret.api.database import Database
from leveret.api.params import WaitParams
from leveret.api.requests import VmAsk, refused
from leveret.api.service import Service
from leveret.api.waits import Sight, look
from leveret.shared import ids
from leveret.shared.documents import RequestView, VmView
from leveret.shared.errors import LeveretError
from leveret.shared.messages import Verdict
from leveret.shared.waiting import Outcome, Standing, Target, judge


@dataclass(frozen=True, slots=True)
class Sights:
    """What was found of them. `of_request` is what there is under the request's own id: at most a refusal."""

    vms: tuple[VmView, ...] = ()
    of_request: Sight = field(default_factory=Sight)

    @property
    def is_there(self) -> bool:
        return bool(self.vms)


async def create(
    service: Service, ask: VmAsk, count: int, params: WaitParams, asker: Asker
) -> tuple[RequestView, Outcome | None]:
    """What became of a request for so many VMs, and of the wait for them if one was asked for. Raises its refusal."""
    verdict = await service.requests.send(ask)
    if verdict is not None and not verdict.accepted:
        raise refused(verdict)
    vm_ids = ids.ids_of(ask.vm_id, count)
    if params.wait is None:
        return _view(ask, verdict, await _glance(service, ask, vm_ids, verdict)), None
    target = params.wait
    outcome, sights = await service.waits.until_seen(
        ask.project,
        None,
        lambda: look_at_all(service.database, ask.project, ask.vm_id, vm_ids),
        lambda seen: outcome_of(seen, count, target, verdict, ask.request_id),
        nothing=Sights(),
        timeout_s=params.timeout_s,
        asker=asker,
    )
    if sights.of_request.refusal is not None and outcome is Outcome.FAILED and not sights.vms:
        raise LeveretError(sights.of_request.refusal)
    return _view(ask, verdict, sights.vms), outcome


async def look_at_all(database: Database, project: str, request: UUID, vm_ids: Sequence[UUID]) -> Sights:
    """Those that are there, in the order of these ids."""
    rows = await database.rows(project, queries.GET_VMS, project, list(vm_ids))
    found = {row["id"]: views.vm(row) for row in rows}
    sights = Sights(tuple(found[vm_id] for vm_id in vm_ids if vm_id in found))
    if sights.vms:
        return sights
    return replace(sights, of_request=await look(database, project, request))


def outcome_of(seen: Sights, count: int, target: Target, verdict: Verdict | None, request_id: str) -> Outcome | None:
    """Failed as soon as one of them is, reached when all are; None while that may still come."""
    if not seen.vms:
        of_request = seen.of_request
        is_refused = of_request.refusal is not None and of_request.refused_request_id == request_id
        return Outcome.FAILED if verdict is None and is_refused else None
    outcomes = [judge(Standing.of(vm), target) for vm in seen.vms]
    if Outcome.FAILED in outcomes:
        return Outcome.FAILED
    return Outcome.REACHED if outcomes == [Outcome.REACHED] * count else None


async def _glance(service: Service, ask: VmAsk, vm_ids: Sequence[UUID], verdict: Verdict | None) -> tuple[VmView, ...]:
    """Their rows, if they can be read now. The request is made already, so their absence is no failure."""
    if verdict is None:
        return ()
    try:
        return (await look_at_all(service.database, ask.project, ask.vm_id, vm_ids)).vms
    except LeveretError:
        return ()


def _view(ask: VmAsk, verdict: Verdict | None, vms: tuple[VmView, ...]) -> RequestView:
    """A request whose rows are there was accepted, even if nobody heard the verdict."""
    judged = "queued" if verdict is None and not vms else "accepted"
    return RequestView.model_validate(
        {"request_id": ask.request_id, "vm_id": ask.vm_id, "verdict": judged, "vm": None, "vms": vms}
    )
