"""Requests: from AMQP clients and the API, in micro-batches, each batch one transaction and one acknowledgement.

Killed before the commit, the batch comes again and nothing has happened; killed after it, the batch comes again and
finds its rows: the same answer is given, and nothing is done twice.
"""

import random
from collections.abc import Sequence
from datetime import datetime
from typing import cast
from uuid import UUID

import structlog

from leveret.conductor import dispatch, metrics
from leveret.conductor.creating import create
from leveret.conductor.database import Connection, Pool, transaction
from leveret.conductor.decisions import Limits, Verb, on_request, remember
from leveret.conductor.request import Request, read
from leveret.conductor.rows import Change, Vm
from leveret.conductor.store import refusals, vms
from leveret.shared.bus import DONE, Delivery, Outcome, Publisher, Reject, Retry
from leveret.shared.documents import CreateVm, DeleteVm
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.loop import Loop
from leveret.shared.messages import REQUESTS, Verdict

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
        gateways: Sequence[str],
        *,
        relay: Loop,
        rng: random.Random | None = None,
    ) -> None:
        self._pool = pool
        self._publisher = publisher
        self._limits = limits
        self._gateways = frozenset(gateways)
        self._relay = relay
        self._rng = rng or random.Random()

    async def handle(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        requests: list[Request] = []
        for delivery in batch:
            try:
                requests.append(read(delivery, self._gateways))
                outcomes.append(DONE)
            except LeveretError as error:
                outcomes.append(Reject(error.problem))
        await self._carry_out(requests)
        for delivery, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Reject):
                await self._refuse_unread(delivery, outcome.problem)
        unanswered = {id(request.delivery) for request in requests if request.verdict is None}
        return [
            Retry(0.05) if id(delivery) in unanswered else outcome
            for delivery, outcome in zip(batch, outcomes, strict=True)
        ]

    async def _refuse_unread(self, delivery: Delivery, problem: Problem) -> None:
        metrics.REQUESTS.labels(verb=_verb(delivery), verdict=problem.code).inc()
        verdict = Verdict(request_id=delivery.header("request_id") or "", vm_id=None, accepted=False, problem=problem)
        await dispatch.answer(self._publisher, delivery, verdict)

    async def _carry_out(self, requests: Sequence[Request]) -> None:
        """Waves in which every VM occurs once, so that the requests for one VM keep their order."""
        waiting = list(requests)
        rounds = 0
        while waiting and rounds < ROUNDS:
            wave: dict[UUID, Request] = {}
            for request in waiting:
                wave.setdefault(request.vm_id, request)
            await self._carry_out_wave(list(wave.values()))
            answered = [request for request in wave.values() if request.verdict is not None]
            rounds = 0 if answered else rounds + 1
            waiting = [request for request in waiting if request.verdict is None]

    async def _carry_out_wave(self, wave: list[Request]) -> None:
        async with transaction(self._pool) as connection:
            now = await vms.database_now(connection)
            known = await vms.lock(connection, [request.vm_id for request in wave])
            changes: list[Change] = []
            for request in wave:
                if not isinstance(request.body, CreateVm):
                    changes += self._change(request, known.get(request.vm_id), now)
            await self._bury_unborn(connection, wave)
            written = await vms.record(connection, changes)
            creates = [request for request in wave if isinstance(request.body, CreateVm)]
            if creates:
                written += await create(connection, creates, known, now, self._limits, self._rng)
            lagging = [change.after.id for change in written if change.after.is_lagging]
            commands = await dispatch.commands_for(connection, lagging) if lagging else []
            await vms.mark_sent(connection, [c.after.id for c in written if c.after.sent_at is None])
        # From here on it is committed: what follows may be lost without harm.
        self._relay.wake()
        await dispatch.send(self._publisher, commands)
        for request in wave:
            if request.verdict is not None:
                metrics.REQUESTS.labels(verb=_verb(request.delivery), verdict=_word(request.verdict)).inc()
                await dispatch.answer(self._publisher, request.delivery, request.verdict)

    def _change(self, request: Request, vm: Vm | None, now: datetime) -> list[Change]:
        """The change that a request other than a create asks for; its verdict is set."""
        if vm is None or vm.project_id != request.project:
            request.refuse(Problem.of(Code.VM_NOT_FOUND, f"There is no VM {request.vm_id}."))
            return []
        try:
            change = on_request(vm, cast(Verb, request.body), request.request_id, now, self._limits)
        except LeveretError as error:
            request.refuse(error.problem)
            return [remember(vm, request.request_id)]
        request.accept(change.after if change else vm)
        return [change] if change else []

    async def _bury_unborn(self, connection: Connection, wave: Sequence[Request]) -> None:
        """A delete of an id that nobody knows may have overtaken its create."""
        unborn = [
            (request.vm_id, request.project)
            for request in wave
            if isinstance(request.body, DeleteVm) and request.verdict is not None and not request.verdict.accepted
        ]
        await refusals.bury(connection, unborn)


def _verb(delivery: Delivery) -> str:
    return delivery.type if delivery.type in REQUESTS else "unknown"


def _word(verdict: Verdict) -> str:
    return verdict.problem.code if verdict.problem else "accepted"
