"""Creating VMs: a wave of creates becomes rows, placements, addresses, events and verdicts in one transaction."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import IPv4Address
from uuid import UUID

from leveret.conductor.administration import project_not_found
from leveret.conductor.database import Connection
from leveret.conductor.decisions import Limits
from leveret.conductor.placing import place
from leveret.conductor.request import Request
from leveret.conductor.rows import Change, Event, Vm
from leveret.conductor.store import addresses, events, refusals, vms
from leveret.conductor.store.projects import Room
from leveret.conductor.store.surroundings import Surroundings, look
from leveret.shared.documents import CreateVm, ImageByName
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import mac_for, name_for
from leveret.shared.lifecycle import Desired, State, Step


async def create(
    connection: Connection,
    creates: Sequence[Request],
    known: Mapping[UUID, Vm],
    rooms: Mapping[str, Room],
    now: datetime,
    limits: Limits,
    rng: random.Random,
) -> list[Change]:
    """Make the VMs that can be made, and set every verdict, but for those that lost a race and come again.

    `rooms` says what each project may still have; a project that is not in it is not there.
    """
    around = await _look_around(connection, creates)
    fresh = [request for request in creates if _is_new(request, known.get(request.vm_id), around)]
    wanted, too_much = _within_quota(_describe(fresh, around, now, limits), rooms)
    placements = await place(connection, [vm for _, vm in wanted], now, rng)
    by_id = {request.vm_id: request for request in fresh}
    for vm_id, problem in placements.refused.items():
        by_id[vm_id].refuse(problem)
    born = await _with_addresses(connection, placements.placed, by_id)
    written = await vms.record(connection, [_birth(change, by_id[change.after.id]) for change in born])
    await _finish(connection, written, by_id, around)
    for change in written:
        by_id[change.after.id].accept(replace(change.after, updated_at=now))
    _refuse_too_much(too_much, unmade=len(wanted) - len(written))
    await _record_refusals(connection, creates)
    return written


def _within_quota(
    described: Sequence[tuple[Request, Vm]], rooms: Mapping[str, Room]
) -> tuple[list[tuple[Request, Vm]], list[tuple[Request, Problem]]]:
    """Those that their projects have room for, one after the other, and the rest with the reason."""
    fitting: list[tuple[Request, Vm]] = []
    too_much: list[tuple[Request, Problem]] = []
    for request, vm in described:
        room = rooms.get(vm.project_id)
        if room is None:
            request.refuse(project_not_found(vm.project_id).problem)
        elif exceeded := room.exceeded_by(vm):
            message = f"This would be more than project {vm.project_id!r} may have of {', '.join(exceeded)}."
            too_much.append((request, Problem.of(Code.QUOTA_EXCEEDED, message, quota=exceeded)))
        else:
            room.take(vm)
            fitting.append((request, vm))
    return fitting, too_much


def _refuse_too_much(too_much: Sequence[tuple[Request, Problem]], unmade: int) -> None:
    """Unless others before them took room and were not made after all: then they come again, and are judged anew."""
    for request, problem in too_much if not unmade else ():
        request.refuse(problem)


async def _record_refusals(connection: Connection, creates: Sequence[Request]) -> None:
    """Every refused create leaves its reason and a fact in the log; one that is only asked again leaves nothing new."""
    refused = [
        request
        for request in creates
        if request.problem is not None and not request.is_refused(Code.PROJECT_NOT_FOUND)  # there is nobody to tell
    ]
    await refusals.reject(
        connection,
        [refusals.Rejection(r.vm_id, r.project, r.request_id, r.problem) for r in refused if r.problem is not None],
    )
    await events.append_refusals(connection, [request.refusal() for request in refused])


async def _look_around(connection: Connection, creates: Sequence[Request]) -> Surroundings:
    bodies = [_body(request) for request in creates]
    return await look(
        connection,
        [(request.vm_id, request.project, _name(request)) for request in creates],
        {body.network for body in bodies},
        {body.image.name for body in bodies if isinstance(body.image, ImageByName)},
    )


def _is_new(request: Request, vm: Vm | None, around: Surroundings) -> bool:
    """Whether there is something to make; the verdict of a repetition or a clash is set here."""
    request_id, problem = around.rejected.get((request.vm_id, request.project), (None, None))
    said = request_id == request.request_id and problem is not None and problem.code is not Code.RATE_LIMITED
    if vm is None and said and problem is not None:
        request.refuse(problem)  # said already: never "failed, then created"
        return False
    if vm is None and (request.vm_id, request.project) not in around.buried:
        return True
    if vm is None:
        request.refuse(Problem.of(Code.VM_DELETED, f"VM {request.vm_id} was deleted before it was created."))
    elif vm.project_id == request.project and vm.spec_hash == request.spec_hash:
        request.accept(vm)
    elif vm.project_id == request.project and vm.state is State.DELETED:
        request.refuse(Problem.of(Code.VM_DELETED, f"VM {request.vm_id} existed and was deleted."))
    else:
        request.refuse(Problem.of(Code.ID_CONFLICT, f"The id {request.vm_id} belongs to another request."))
    return False


def _describe(
    fresh: Sequence[Request], around: Surroundings, now: datetime, limits: Limits
) -> list[tuple[Request, Vm]]:
    """The rows that these requests ask for. Those that cannot be are refused.

    Who wants a name that another gets in this very wave comes again: that one may not be made after all.
    """
    described = []
    claimed: set[tuple[str, str]] = set()
    for request in fresh:
        body, name = _body(request), _name(request)
        image = around.images.get(body.image.name) if isinstance(body.image, ImageByName) else body.image.model_dump()
        if image is None:
            request.refuse(Problem.of(Code.IMAGE_UNKNOWN, f"No image is registered as {_image_name(body)!r}."))
        elif body.network not in around.networks:
            request.refuse(Problem.of(Code.NETWORK_UNKNOWN, f"There is no network {body.network!r}."))
        elif (request.project, name) in around.taken:
            request.refuse(Problem.of(Code.NAME_TAKEN, f"Another VM of this project is called {name!r}."))
        elif (request.project, name) not in claimed:
            claimed.add((request.project, name))
            described.append((request, _row(request, name, image, now, limits)))
    return described


def _row(request: Request, name: str, image: dict[str, str], now: datetime, limits: Limits) -> Vm:
    body = _body(request)
    spec = body.model_dump(mode="json", exclude={"user_data", "user_data_base64"}, exclude_defaults=True)
    return Vm(
        id=request.vm_id,
        project_id=request.project,
        name=name,
        spec=spec,
        spec_hash=request.spec_hash,
        labels=body.labels,
        vcpus=body.vcpus,
        memory_mib=body.memory_mib,
        disk_gib=body.disk_gib,
        image=image,
        network=body.network,
        mac=mac_for(request.vm_id),
        address=None,
        desired=Desired.RUNNING if body.running else Desired.STOPPED,
        state=State.PENDING,
        step=Step.SCHEDULING,
        created_at=now,
        deadline=now + limits.build,
        recent_requests=(request.mark,),
    )


async def _with_addresses(
    connection: Connection, placed: Sequence[Change], by_id: Mapping[UUID, Request]
) -> list[Change]:
    """Give every placed VM an address; who gets none is refused, and its placement is not recorded."""
    free = await addresses.reserve(connection, Counter(change.after.network for change in placed))
    given = []
    for change in placed:
        left = free[change.after.network]
        if left:
            given.append(replace(change, after=replace(change.after, address=left.pop(0))))
        else:
            message = f"Network {change.after.network!r} has no free address."
            by_id[change.after.id].refuse(Problem.of(Code.NO_ADDRESS, message))
    return given


def _birth(change: Change, request: Request) -> Change:
    """The events of a new VM: accepted, then what its placement logged, all about the row as it is inserted."""
    vm = change.after
    requested = datetime.fromtimestamp(request.requested_at, UTC).isoformat()
    pending = replace(vm, state=State.PENDING)
    accepted = Event(pending, "accepted", {"requested_at": requested, **request.stamp()})
    return Change(None, vm, (accepted, *(replace(event, vm=vm) for event in change.events)))


async def _finish(
    connection: Connection, written: Sequence[Change], by_id: Mapping[UUID, Request], around: Surroundings
) -> None:
    """What belongs to a new row: its address, its user-data, and the end of any earlier rejection."""
    taken: list[tuple[str, IPv4Address, UUID]] = []
    user_data: dict[UUID, bytes] = {}
    for change in written:
        vm = change.after
        if vm.address is not None:
            taken.append((vm.network, vm.address, vm.id))
        data = _body(by_id[vm.id]).user_data_bytes()
        if data is not None:
            user_data[vm.id] = data
    await addresses.take(connection, taken)
    await vms.put_user_data(connection, user_data)
    born = [(change.after.id, change.after.project_id) for change in written]
    await refusals.forgive(connection, [one for one in born if one in around.rejected])


def _body(request: Request) -> CreateVm:
    assert isinstance(request.body, CreateVm)
    return request.body


def _name(request: Request) -> str:
    return _body(request).name or name_for(request.vm_id)


def _image_name(body: CreateVm) -> str:
    return body.image.name if isinstance(body.image, ImageByName) else body.image.url
