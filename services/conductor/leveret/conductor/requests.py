"""Requests: from AMQP clients and the API, in micro-batches, each batch one transaction and one acknowledgement.

Killed before the commit, the batch comes again and nothing has happened; killed after it, the batch comes again and
finds its rows: the same answer is given, and nothing is done twice.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import cast
from uuid import UUID

import structlog

from leveret.conductor import administration, capacity, dispatch, metrics
from leveret.conductor.checking import CheckDesk
from leveret.conductor.creating import create
from leveret.conductor.database import Connection, Pool, statement, transaction
from leveret.conductor.decisions import Limits, Verb, is_known, on_request, remember
from leveret.conductor.dispatch import Answers, Command
from leveret.conductor.intake import Intake, Refusal
from leveret.conductor.order import Order
from leveret.conductor.placing import Scheduler
from leveret.conductor.request import Request
from leveret.conductor.rows import Change, Fact, Vm
from leveret.conductor.store import events, hosts, projects, refusals, vms
from leveret.shared import topology
from leveret.shared.bus import DONE, Delivery, Outcome, Publisher, Retry
from leveret.shared.checks import RunCheck
from leveret.shared.documents import CreateProject, CreateVm, DeleteVm, RetryVm, UpdateVm
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.fault_points import fault_point, take
from leveret.shared.loop import Loop
from leveret.shared.messages import ADMINISTRATION, GROUPS, REQUESTS, Verdict
from leveret.shared.placements import AskCapacity, CapacityReport

log = structlog.get_logger()

#: Snapshots a create may lose before its batch is given another turn.
ROUNDS = 8


class RequestHandler:
    """Handles `leveret.conductor.requests`."""

    def __init__(
        self,
        pool: Pool,
        publisher: Publisher,
        limits: Limits,
        intake: Intake,
        answers: Answers,
        desk: CheckDesk,
        *,
        relay: Loop,
        scheduler: Scheduler,
    ) -> None:
        self._pool = pool
        self._publisher = publisher
        self._limits = limits
        self._intake = intake
        self._answers = answers
        self._desk = desk
        self._relay = relay
        self._scheduler = scheduler

    async def handle(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        """Whose are they, are they allowed so many, what do they ask for; then carry it out, or say why not."""
        opened = await self._intake.open(batch)
        for delivery, item in zip(batch, opened, strict=True):
            if isinstance(item, Order):
                await self._administer(delivery, item)
        requests = [item for item in opened if isinstance(item, Request)]
        await self._rehearse([request for request in requests if request.dry_run])
        await self._carry_out([request for request in requests if not request.dry_run])
        await self._tell_off([item for item in opened if isinstance(item, Refusal)])
        return [_outcome(item) for item in opened]

    async def _tell_off(self, refused: Sequence[Refusal]) -> None:
        """Say why: by direct reply, or else in the log of the project that asked, where its clients read it.

        A gateway may have stopped waiting for the answer: what it asked for can be asked about.
        """
        unheard = [refusal for refusal in refused if not dispatch.is_answerable(refusal.delivery)]
        delayed = [refusal for refusal in refused if refusal.problem.code is Code.RATE_LIMITED]
        await self._record(unheard, [*unheard, *delayed])
        for refusal in refused:
            metrics.REQUESTS.labels(verb=_verb(refusal.delivery), verdict=refusal.problem.code).inc()
            await self._answers.give(refusal.delivery, refusal.verdict)

    async def lament(self, delivery: Delivery, problem: Problem) -> None:
        """A message that crashes its handler is told like any refusal, so that whoever asked is not left waiting."""
        refusal = await self._intake.refuse(delivery, problem)
        await self._record([refusal], [refusal])
        await self._answers.give(delivery, refusal.verdict)

    async def _record(self, logged: Sequence[Refusal], kept: Sequence[Refusal]) -> None:
        """Put facts in the logs of these, and keep the reason of those that were creates."""
        facts = [fact for refusal in logged if (fact := refusal.fact())]
        rejections = [rejection for refusal in kept if (rejection := refusal.rejection())]
        if facts or rejections:
            await self._write_down(facts, rejections)
            self._relay.wake()

    @fault_point("requests.record")
    async def _write_down(self, facts: Sequence[Fact], rejections: Sequence[refusals.Rejection]) -> None:
        named = {fact.project_id for fact in facts} | {rejection.project_id for rejection in rejections}
        async with transaction(self._pool) as connection:
            known = await projects.open_ids(connection, among=named)
            await events.append_refusals(connection, [fact for fact in facts if fact.project_id in known])
            await refusals.reject(connection, [r for r in rejections if r.project_id in known])

    async def _administer(self, delivery: Delivery, order: Order) -> None:
        if isinstance(order.body, RunCheck):
            self._desk.ask(delivery, order.body)  # answered in its own time: it changes nothing
            return
        if isinstance(order.body, AskCapacity):
            await self._answers.give(delivery, await self._measure(order.body))
            return
        problem = await self._obey(order, heard=dispatch.is_answerable(delivery))
        self._relay.wake()
        if isinstance(order.body, CreateProject) and problem is None:
            await self._furnish(order.project)
        verdict = Verdict(request_id=order.request_id, vm_id=None, accepted=problem is None, problem=problem)
        metrics.REQUESTS.labels(verb=_verb(delivery), verdict=_word(verdict)).inc()
        await self._answers.give(delivery, verdict)

    async def _measure(self, ask: AskCapacity) -> CapacityReport:
        async with statement(self._pool) as connection:
            return await capacity.measure(connection, ask)

    @fault_point("requests.administer")
    async def _obey(self, order: Order, *, heard: bool) -> Problem | None:
        async with transaction(self._pool) as connection:
            return await administration.carry_out(connection, order, heard=heard)

    @fault_point("requests.furnish")
    async def _furnish(self, project: str) -> None:
        """Have the project's exchange at once; should the broker be away, the relay makes it later."""
        try:
            await self._publisher.declare_exchange(topology.events_exchange(project))
        except LeveretError as error:
            log.warning("project.unfurnished", project=project, why=error.problem.message)

    async def _rehearse(self, requests: Sequence[Request]) -> None:
        """Dry runs: the very same, each in a transaction of its own that is never committed."""
        for request in requests:
            await self._play_through(request)
            await self._tell(request)

    @fault_point("requests.rehearse")
    async def _play_through(self, request: Request) -> None:
        with suppress(_Curtain):
            async with transaction(self._pool) as connection:
                for _ in range(ROUNDS):
                    if request.verdict is None:
                        await self._write(connection, [request])
                raise _Curtain

    async def _carry_out(self, requests: Sequence[Request]) -> None:
        """Waves in which every VM occurs once, so that the requests for one VM keep their order."""
        waiting = list(requests)
        rounds = 0
        while waiting and rounds < ROUNDS:
            wave: list[Request] = []
            about: set[UUID] = set()
            for request in waiting:
                if about.isdisjoint(request.claimed_ids):
                    wave.append(request)
                about |= request.claimed_ids
            await self._carry_out_wave(wave)
            answered = [request for request in wave if request.verdict is not None]
            rounds = 0 if answered else rounds + 1
            waiting = [request for request in waiting if request.verdict is None]

    async def _carry_out_wave(self, wave: list[Request]) -> None:
        commands = await self._commit(wave)
        # From here on it is committed: what follows may be lost without harm.
        self._relay.wake()
        if commands:
            await take("requests.send", dispatch.send, self._publisher, commands)
        for request in wave:
            await self._tell(request)

    @fault_point("requests.carry_out")
    async def _commit(self, wave: Sequence[Request]) -> list[Command]:
        """Carry a wave out for good. Returns what its hosts are to be told."""
        async with transaction(self._pool) as connection:
            written = await self._write(connection, wave)
            lagging = [change.after.id for change in written if change.after.is_lagging]
            commands = await dispatch.commands_for(connection, lagging) if lagging else []
            await vms.mark_sent(connection, [c.after.id for c in written if c.after.sent_at is None])
        return commands

    async def _write(self, connection: Connection, wave: Sequence[Request]) -> list[Change]:
        """Carry a wave out in the caller's transaction: one request a VM, verdicts set."""
        unborn = [request for request in wave if isinstance(request.body, CreateVm | DeleteVm)]
        now = await vms.claim_ids(connection, {vm_id for request in unborn for vm_id in request.claimed_ids})
        known = await vms.lock(connection, {vm_id for request in wave for vm_id in request.claimed_ids})
        rooms = await projects.lock_rooms(connection, _touched(wave, known))
        taken = await _taken_names(connection, wave, known)
        fenced = await _fenced_hosts(connection, wave, known)
        changes: list[Change] = []
        unheard: list[Fact] = []
        for request in wave:
            if not isinstance(request.body, CreateVm):
                vm = known.get(request.vm_id)
                changes += self._change(request, vm, taken, fenced, now)
                unheard += _unheard(request, vm)
        await self._bury_unborn(connection, wave)
        written = await vms.record(connection, changes)
        await events.append_refusals(connection, unheard)
        creates = [request for request in wave if isinstance(request.body, CreateVm)]
        if creates:
            written += await create(connection, creates, known, rooms, now, self._limits, self._scheduler)
        return written

    async def _tell(self, request: Request) -> None:
        if request.verdict is None:
            return
        metrics.REQUESTS.labels(verb=_verb(request.delivery), verdict=_word(request.verdict)).inc()
        await self._answers.give(request.delivery, request.verdict)

    def _change(
        self, request: Request, vm: Vm | None, taken: set[tuple[str, str]], fenced: Collection[UUID], now: datetime
    ) -> list[Change]:
        """The change that a request other than a create asks for; its verdict is set."""
        if vm is None or vm.project_id != request.project:
            request.refuse(Problem.of(Code.VM_NOT_FOUND, f"There is no VM {request.vm_id}."))
            return []
        known = is_known(vm, request.mark)
        try:
            if not known:
                request.check_revision(vm)
                _take_name(request, vm, taken)
            is_fenced = vm.host_id in fenced
            change = on_request(vm, cast(Verb, request.body), request.mark, now, self._limits, host_is_fenced=is_fenced)
        except LeveretError as error:
            request.refuse(error.problem)
            return [] if known else [remember(vm, request.mark, error.problem.code)]
        request.accept(replace(change.after, updated_at=now) if change and change.is_visible else vm)
        return [request.signed(change)] if change else []

    async def _bury_unborn(self, connection: Connection, wave: Sequence[Request]) -> None:
        """A delete of an id that nobody knows may have overtaken its create."""
        unborn = [
            (request.vm_id, request.project)
            for request in wave
            if isinstance(request.body, DeleteVm) and request.is_refused(Code.VM_NOT_FOUND)
        ]
        await refusals.bury(connection, unborn)


class _Curtain(Exception):
    """The end of a dry run: whatever was done is undone."""


async def _taken_names(connection: Connection, wave: Sequence[Request], known: dict[UUID, Vm]) -> set[tuple[str, str]]:
    """Which of the new names that are asked for other VMs have, each with its project."""
    wanted = [
        (request.project, request.body.name)
        for request in wave
        if isinstance(request.body, UpdateVm) and request.body.name is not None and request.vm_id in known
    ]
    return await vms.taken_names(connection, wanted) if wanted else set()


async def _fenced_hosts(connection: Connection, wave: Sequence[Request], known: dict[UUID, Vm]) -> Collection[UUID]:
    """Which of the hosts of VMs that are to be retried are fenced."""
    ids = {
        host_id
        for request in wave
        if isinstance(request.body, RetryVm) and request.vm_id in known and (host_id := known[request.vm_id].host_id)
    }
    return await hosts.fenced(connection, ids, hold=True) if ids else ()


def _take_name(request: Request, vm: Vm, taken: set[tuple[str, str]]) -> None:
    """Raises LeveretError `name_taken` when another has it, or gets it in this very wave."""
    if not isinstance(request.body, UpdateVm) or request.body.name in {None, vm.name}:
        return
    name = (request.project, str(request.body.name))
    if name in taken:
        raise fail(Code.NAME_TAKEN, f"Another VM of this project is called {name[1]!r}.")
    taken.add(name)


def _unheard(request: Request, vm: Vm | None) -> list[Fact]:
    """The fact that a change was refused, when nobody waits for its verdict; said once."""
    if request.problem is None or dispatch.is_answerable(request.delivery):
        return []
    return [] if vm is not None and is_known(vm, request.mark) else [request.refusal()]


def _outcome(item: Request | Order | Refusal) -> Outcome:
    if isinstance(item, Refusal):
        return item.outcome
    if isinstance(item, Request) and item.verdict is None:
        return Retry(0.05)
    return DONE


def _touched(wave: Sequence[Request], known: dict[UUID, Vm]) -> set[str]:
    """The projects whose counters may move: by VMs that are made, and by those that go at once."""
    return {
        request.project
        for request in wave
        if isinstance(request.body, CreateVm)
        or (isinstance(request.body, DeleteVm) and request.vm_id in known and known[request.vm_id].host_id is None)
    }


def _verb(delivery: Delivery) -> str:
    return delivery.type.rpartition(".v")[0] if delivery.type in REQUESTS | GROUPS | ADMINISTRATION else "unknown"


def _word(verdict: Verdict) -> str:
    return verdict.problem.code if verdict.problem else "accepted"
