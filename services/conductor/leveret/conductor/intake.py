"""Intake: whose messages these are, whether they ask too often, and what they ask for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import structlog

from leveret.conductor import dispatch
from leveret.conductor.database import Pool, statement
from leveret.conductor.identities import Identities, Sender
from leveret.conductor.order import Order
from leveret.conductor.request import Request, read
from leveret.conductor.rows import Fact, told
from leveret.conductor.store import projects
from leveret.conductor.store.refusals import Rejection
from leveret.shared.bus import DONE, Delivery, Outcome, Reject
from leveret.shared.documents import CreateVm
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.fault_points import fault_point
from leveret.shared.messages import ADMINISTRATION, REQUESTS, Verdict

log = structlog.get_logger()


@dataclass(slots=True)
class Refusal:
    """A message that is not carried out: whose it is, as far as it can be told, and why."""

    delivery: Delivery
    problem: Problem
    sender: Sender | None = None

    @property
    def outcome(self) -> Outcome:
        """A client that is told what it did wrong is no case for an operator: what nobody is told is kept."""
        is_ours = self.problem.code is Code.HANDLER_CRASHED
        told = self.sender is not None and dispatch.is_answerable(self.delivery)
        return DONE if told and not is_ours else Reject(self.problem)

    @property
    def verdict(self) -> Verdict:
        return Verdict(request_id=self._request_id, vm_id=self._vm_id, accepted=False, problem=self.problem)

    def fact(self) -> Fact | None:
        """What the project's log says of it, so that its clients can read why; floods leave nothing in it."""
        if self.sender is None or self.problem.code is Code.RATE_LIMITED:
            return None
        data = {"problem": told(self.problem), "by": self.sender.by, "request_id": self._request_id}
        return Fact(self.sender.project, "rejected", data, self._vm_id)

    def rejection(self) -> Rejection | None:
        """What is kept of a create, so that its id can be asked about; None when it had none."""
        if self.sender is None or self._vm_id is None or REQUESTS.get(self.delivery.type or "") is not CreateVm:
            return None
        if self.problem.code is Code.RATE_LIMITED and not self.sender.is_gateway:
            return None  # its sender was told, or did not ask
        return Rejection(self._vm_id, self.sender.project, self._request_id, self.problem)

    @property
    def _request_id(self) -> str:
        """The request's name as far as it can be shown."""
        name = (self.delivery.header("request_id") or self.delivery.message_id or "")[:128]
        return name if name.isascii() and name.isprintable() else ""

    @property
    def _vm_id(self) -> UUID | None:
        try:
            return UUID(self.delivery.header("vm_id") or "")
        except ValueError:
            return None


class Intake:
    """The way in for every request, of clients and of the API alike."""

    def __init__(self, pool: Pool, identities: Identities) -> None:
        self._pool = pool
        self._identities = identities

    async def open(self, batch: Sequence[Delivery]) -> list[Request | Order | Refusal]:
        """What each message turns out to be. Raises Paused when Postgres is away."""
        senders = await self._identities.of(batch)
        allowance = await self._draw(batch, senders)
        opened: list[Request | Order | Refusal] = []
        for delivery, sender in zip(batch, senders, strict=True):
            if isinstance(sender, LeveretError):
                opened.append(Refusal(delivery, sender.problem))
            elif _counts(delivery, sender) and (problem := allowance.spend(sender.project)):
                opened.append(Refusal(delivery, problem, sender))
            else:
                opened.append(_read(delivery, sender))
        return opened

    async def refuse(self, delivery: Delivery, problem: Problem) -> Refusal:
        """The refusal of a message for a reason that its handler did not see itself."""
        [sender] = await self._identities.of([delivery])
        return Refusal(delivery, problem, sender if isinstance(sender, Sender) else None)

    @fault_point("requests.draw")
    async def _draw(self, batch: Sequence[Delivery], senders: Sequence[Sender | LeveretError]) -> "_Allowance":
        """Draw what this batch asks for on every project's allowance, which all conductors share."""
        counted = Counter(
            sender.project
            for delivery, sender in zip(batch, senders, strict=True)
            if isinstance(sender, Sender) and _counts(delivery, sender)
        )
        if not counted:
            return _Allowance({})
        async with statement(self._pool) as connection:
            return _Allowance(await projects.take_requests(connection, counted))


class _Allowance:
    """How many of a batch each project may still have carried out. A project that is not there has no limit."""

    def __init__(self, granted: dict[str, tuple[int, float]]) -> None:
        self._left = {project: count for project, (count, _) in granted.items()}
        self._retry_after_s = {project: wait_s for project, (_, wait_s) in granted.items()}

    def spend(self, project: str) -> Problem | None:
        """Spend one; the problem when there is none left."""
        if project not in self._left:
            return None
        self._left[project] -= 1
        if self._left[project] >= 0:
            return None
        wait_s = max(round(self._retry_after_s[project], 3), 0.001)
        return Problem.of(Code.RATE_LIMITED, "This project asks for too much at once.", retry_after_s=wait_s)


def _counts(delivery: Delivery, sender: Sender) -> bool:
    """Administration is not held up by what its project does; nor is what lay in the queue while nobody could work."""
    return not delivery.waited and not (sender.is_gateway and delivery.type in ADMINISTRATION)


def _read(delivery: Delivery, sender: Sender) -> Request | Order | Refusal:
    try:
        return read(delivery, sender)
    except LeveretError as error:
        return Refusal(delivery, error.problem, sender)
    except Exception:  # a defect of ours must not hold up whoever came in the same batch
        log.exception("intake.crashed", type=delivery.type, project=sender.project)
        return Refusal(delivery, Problem.of(Code.HANDLER_CRASHED, "This message cannot be read here."), sender)
