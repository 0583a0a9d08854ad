"""Creating VMs: a wave of creates becomes rows, placements, addresses, events and verdicts in one transaction."""

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from ipaddress import IPv4Address
from uuid import UUID

from leveret.conductor import decisions
from leveret.conductor.administration import project_not_found
from leveret.conductor.database import Connection
from leveret.conductor.decisions import Limits
from leveret.conductor.placing import Outcome, Placed, Scheduler
from leveret.conductor.request import Request
from leveret.conductor.rows import Change, Event, Vm
from leveret.conductor.store import addresses, events, hosts, refusals, vms
from leveret.conductor.store.projects import Room
from leveret.conductor.store.surroundings import Surroundings, look
from leveret.shared.documents import CreateVm, ImageByName
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import mac_for, name_for
from leveret.shared.lifecycle import Desired, State, Step


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a create asks for: rows that are made all together, or not at all. Most ask for one."""

    request: Request
    vms: tuple[Vm, ...]


@dataclass(frozen=True, slots=True)
class _Birth:
    """The rows of a create as they are to be written, one change for each."""

    request: Request
    changes: tuple[Change, ...]


async def create(
    connection: Connection,
    creates: Sequence[Request],
    known: Mapping[UUID, Vm],
    rooms: Mapping[str, Room],
    now: datetime,
    limits: Limits,
    scheduler: Scheduler,
) -> list[Change]:
    """Make the VMs that can be made, and set every verdict, but for those that lost a race and come again.

    `rooms` says what each project may still have; a project that is not in it is not there.
    """
    around = await _look_around(connection, creates)
    fresh = [request for request in creates if _is_new(request, known, around)]
    wanted, too_much = _within_quota(_describe(fresh, around, now, limits), rooms)
    # Before anybody looks for room: what comes about later is looked for again.
    seen = await hosts.rooms(connection) if any(_waits(one) for one in wanted) else 0
    outcomes = await scheduler.place(connection, [one.vms for one in wanted], now)
    births = [
        _Birth(one.request, changes)
        for one, outcome in zip(wanted, outcomes, strict=True)
        if (changes := _judge(one, outcome, vms.looked_at(seen, len(one.vms)), now, limits))
    ]
    written = [one async for one in _write(connection, await _with_addresses(connection, births))]
    await _finish(connection, written, around)
    for birth in written:
        birth.request.accept_all([replace(change.after, updated_at=now) for change in birth.changes])
    _refuse_too_much(too_much, unmade=len(wanted) - len(written))
    await _record_refusals(connection, creates)
    return [change for birth in written for change in birth.changes]


def _within_quota(
    described: Sequence[_Wanted], rooms: Mapping[str, Room]
) -> tuple[list[_Wanted], list[tuple[Request, Problem]]]:
    """Those that their projects have room for, one after the other, and the rest with the reason."""
    fitting: list[_Wanted] = []
    too_much: list[tuple[Request, Problem]] = []
    for one in described:
        project = one.request.project
        room = rooms.get(project)
        if room is None:
            one.request.refuse(project_not_found(project).problem)
        elif exceeded := room.exceeded_by(*one.vms):
            message = f"This would be more than project {project!r} may have of {', '.join(exceeded)}."
            too_much.append((one.request, Problem.of(Code.QUOTA_EXCEEDED, message, quota=exceeded)))
        else:
            room.take(*one.vms)
            fitting.append(one)
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
        [
            (id_, request.project, name)
            for request in creates
            for id_, name in ((request.vm_id, _names(request)[0]), *zip(request.vm_ids, _names(request), strict=True))
        ],
        {body.network for body in bodies},
        {body.image.name for body in bodies if isinstance(body.image, ImageByName)},
    )


def _is_new(request: Request, known: Mapping[UUID, Vm], around: Surroundings) -> bool:
    """Whether there is something to make; the verdict of a repetition or a clash is set here."""
    there = [known[id_] for id_ in sorted(request.claimed_ids) if id_ in known]
    own = [known[id_] for id_ in request.vm_ids if id_ in known]
    if not there:
        return _is_unheard_of(request, around)
    if own and all(vm.project_id == request.project and vm.spec_hash == request.spec_hash for vm in there):
        request.accept_all(own)
    elif all(vm.project_id == request.project and vm.state is State.DELETED for vm in there):
        request.refuse(Problem.of(Code.VM_DELETED, f"VM {there[0].id} existed and was deleted."))
    else:
        request.refuse(Problem.of(Code.ID_CONFLICT, f"The id {request.vm_id} belongs to another request."))
    return False


def _is_unheard_of(request: Request, around: Surroundings) -> bool:
    """Whether nobody has yet refused it, or deleted what it would make."""
    request_id, problem = around.rejected.get((request.vm_id, request.project), (None, None))
    if request_id == request.request_id and problem is not None and problem.code is not Code.RATE_LIMITED:
        request.refuse(problem)  # said already: never "failed, then created"
        return False
    if buried := [id_ for id_ in request.vm_ids if (id_, request.project) in around.buried]:
        request.refuse(Problem.of(Code.VM_DELETED, f"VM {buried[0]} was deleted before it was created."))
        return False
    return True


def _describe(fresh: Sequence[Request], around: Surroundings, now: datetime, limits: Limits) -> list[_Wanted]:
    """The rows that these requests ask for. Those that cannot be are refused.

    Who wants a name that another gets in this very wave comes again: that one may not be made after all.
    """
    described = []
    claimed: set[tuple[str, str]] = set()
    for request in fresh:
        body, names = _body(request), [(request.project, name) for name in _names(request)]
        image = around.images.get(body.image.name) if isinstance(body.image, ImageByName) else body.image.model_dump()
        if image is None:
            request.refuse(Problem.of(Code.IMAGE_UNKNOWN, f"No image is registered as {_image_name(body)!r}."))
        elif body.network not in around.networks:
            request.refuse(Problem.of(Code.NETWORK_UNKNOWN, f"There is no network {body.network!r}."))
        elif taken := [name for project, name in names if (project, name) in around.taken]:
            request.refuse(Problem.of(Code.NAME_TAKEN, f"Another VM of this project is called {taken[0]!r}."))
        elif claimed.isdisjoint(names):
            claimed.update(names)
            described.append(_Wanted(request, tuple(_rows(request, image, now, limits))))
    return described


def _rows(request: Request, image: dict[str, str], now: datetime, limits: Limits) -> Iterator[Vm]:
    body = _body(request)
    spec = body.model_dump(mode="json", exclude={"user_data", "user_data_base64", "count"}, exclude_defaults=True)
    for vm_id, name in zip(request.vm_ids, _names(request), strict=True):
        yield Vm(
            id=vm_id,
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
            mac=mac_for(vm_id),
            address=None,
            group_name=body.placement.group,
            bundle=request.vm_id if body.count > 1 else None,
            desired=Desired.RUNNING if body.running else Desired.STOPPED,
            state=State.PENDING,
            step=Step.SCHEDULING,
            created_at=now,
            deadline=now + limits.build,
            recent_requests=(request.mark,),
        )


def _judge(one: _Wanted, outcome: Outcome, looked: int, now: datetime, limits: Limits) -> tuple[Change, ...]:
    """What is to be written of it; nothing when it is refused, or comes again."""
    match outcome:
        case Placed(changes):
            return changes
        case Problem() as problem if problem.code is Code.NO_CAPACITY and _waits(one):
            return tuple(decisions.wait(vm, problem, looked, now, limits) for vm in one.vms)
        case Problem() as problem:
            one.request.refuse(problem)
    return ()


async def _with_addresses(connection: Connection, births: Sequence[_Birth]) -> list[_Birth]:
    """Give every VM an address; who gets none is refused, and its placement is not recorded."""
    free = await addresses.reserve(connection, Counter(c.after.network for birth in births for c in birth.changes))
    given = []
    for birth in births:
        network = _body(birth.request).network
        if len(birth.changes) > len(free[network]):
            birth.request.refuse(Problem.of(Code.NO_ADDRESS, f"Network {network!r} has too few free addresses."))
            continue
        changes = (replace(c, after=replace(c.after, address=free[network].pop(0))) for c in birth.changes)
        given.append(_Birth(birth.request, tuple(_born(change, birth.request) for change in changes)))
    return given


def _born(change: Change, request: Request) -> Change:
    """The events of a new VM: accepted, then what its placement logged, all about the row as it is inserted."""
    vm = change.after
    requested = datetime.fromtimestamp(request.requested_at, UTC).isoformat()
    pending = replace(vm, state=State.PENDING)
    accepted = Event(pending, "accepted", {"requested_at": requested, **request.stamp()})
    return Change(None, vm, (accepted, *(replace(event, vm=vm) for event in change.events)))


async def _write(connection: Connection, births: Sequence[_Birth]) -> AsyncIterator[_Birth]:
    """Those that could be written: nobody else had taken an id or a name in the meantime."""
    single = {birth.changes[0].after.id: birth for birth in births if len(birth.changes) == 1}
    for change in await vms.record(connection, [birth.changes[0] for birth in single.values()]):
        yield single[change.after.id]
    for birth in births:
        if len(birth.changes) > 1 and await _write_all(connection, birth.changes):
            yield birth


async def _write_all(connection: Connection, changes: Sequence[Change]) -> bool:
    """Write all of these, or none."""
    try:
        async with connection.transaction():
            if len(await vms.record(connection, changes)) < len(changes):
                raise _Incomplete
    except _Incomplete:
        return False
    return True


class _Incomplete(Exception):
    """Some of several could not be written."""


async def _finish(connection: Connection, births: Sequence[_Birth], around: Surroundings) -> None:
    """What belongs to new rows: their addresses, their user-data, and the end of any earlier rejection."""
    taken: list[tuple[str, IPv4Address, UUID]] = []
    user_data: dict[UUID, bytes] = {}
    for birth in births:
        data = _body(birth.request).user_data_bytes()
        for change in birth.changes:
            vm = change.after
            if vm.address is not None:
                taken.append((vm.network, vm.address, vm.id))
            if data is not None:
                user_data[vm.id] = data
    await addresses.take(connection, taken)
    await vms.put_user_data(connection, user_data)
    born = [(birth.request.vm_id, birth.request.project) for birth in births]
    await refusals.forgive(connection, [one for one in born if one in around.rejected])


def _waits(one: _Wanted) -> bool:
    return _body(one.request).wait_for_capacity


def _body(request: Request) -> CreateVm:
    assert isinstance(request.body, CreateVm)
    return request.body


def _names(request: Request) -> list[str]:
    """What its VMs are called: as asked, numbered when there are several, or pleasantly by their ids."""
    body = _body(request)
    if body.name is None:
        return [name_for(vm_id) for vm_id in request.vm_ids]
    return [body.name] if body.count == 1 else [f"{body.name}-{number}" for number in range(1, body.count + 1)]


def _image_name(body: CreateVm) -> str:
    return body.image.name if isinstance(body.image, ImageByName) else body.image.url
