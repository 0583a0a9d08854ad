"""Writing: every change is a request that is given to the broker; the conductor judges it."""

import asyncio
import time
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import structlog
from pydantic import BaseModel

from leveret.api.metrics import Metrics
from leveret.shared import documents, topology
from leveret.shared.bus import Caller, Link, Unroutable
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.headers import traceparent_in
from leveret.shared.messages import TYPE_OF, Verdict

log = structlog.get_logger()

Answer = TypeVar("Answer", bound=BaseModel)

_RENEW_EVERY_S = 5.0

#: A broker that does not confirm within this time is away: a user has the answer within five seconds.
CONFIRM_TIMEOUT_S = 4.0
#: How long a request waits that has no answer but its verdict.
JUDGED_WITHIN_S = 4.0
ASK_AGAIN = "Ask again in a moment; that is safe."
_UNJUDGED = "The request is queued, and was not judged in time."


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of one user. `project` is the one it is about, `actor` says who asks.

    `at` is when it arrived, in seconds since the epoch.
    """

    project: str
    actor: str
    request_id: str
    document: documents.Document
    at: float
    traceparent: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        headers = {
            "request_id": self.request_id,
            "requested_at": str(self.at),
            "project": self.project,
            "actor": self.actor,
        }
        if (traceparent := traceparent_in(self.traceparent)) is not None:
            headers["traceparent"] = traceparent
        return headers


@dataclass(frozen=True, slots=True, kw_only=True)
class VmAsk(Ask):
    """A request about a VM. `if_match` is an ETag without its quotes; a `dry_run` is judged and not carried out."""

    vm_id: UUID
    if_match: str | None = None
    dry_run: bool = False

    @property
    def headers(self) -> dict[str, str]:
        # Not super() without arguments: a dataclass with slots is another class than the one it was written as.
        headers = {**super(VmAsk, self).headers, "vm_id": str(self.vm_id)}
        if self.if_match is not None:
            headers["if_match"] = self.if_match
        if self.dry_run:
            headers["dry_run"] = "true"
        return headers


class Requests:
    """Gives requests to the broker, and waits a little for what the conductor says."""

    def __init__(self, caller: Caller, link: Link, metrics: Metrics, *, verdict_wait_s: float) -> None:
        self._caller = caller
        self._link = link
        self._metrics = metrics
        self._verdict_wait_s = verdict_wait_s
        self._renewed_at = float("-inf")

    async def send(self, ask: Ask, *, wait_s: float | None = None) -> Verdict | None:
        """The verdict, or None when the request is queued and was not judged within `wait_s` (or the usual time).

        Raises LeveretError `unavailable` when it is not known to be queued: asking again with the same id is safe.
        """
        began = time.monotonic()
        message_type = TYPE_OF[type(ask.document)]
        outcome = "unavailable"
        try:
            verdict = await self._send(message_type, ask, self._verdict_wait_s if wait_s is None else wait_s)
            outcome = "queued" if verdict is None else "accepted" if verdict.accepted else "rejected"
            return verdict
        finally:
            self._metrics.publishes.labels(message_type, outcome).inc()
            self._metrics.publish_seconds.observe(time.monotonic() - began)

    async def judge(self, ask: Ask, *, hint: str = ASK_AGAIN, unjudged: str = _UNJUDGED) -> Verdict:
        """The verdict of a request that is worth nothing without one.

        Raises LeveretError with the refusal, or `unavailable` with these words when nobody judged it in time.
        """
        verdict = await self.send(ask, wait_s=JUDGED_WITHIN_S)
        if verdict is None:
            raise fail(Code.UNAVAILABLE, unjudged, hint=hint)
        if not verdict.accepted:
            raise refused(verdict)
        return verdict

    async def ask(self, ask: Ask, kind: type[Answer], *, wait_s: float) -> Answer | None:
        """The answer to what is no request for a change; None when none of this kind came within `wait_s`.

        Raises LeveretError with the refusal, or `unavailable` when it could not be queued.
        """
        answer = await self._publish(TYPE_OF[type(ask.document)], ask, wait_s)
        if isinstance(answer, Verdict) and answer.problem is not None:
            raise refused(answer)
        return answer if isinstance(answer, kind) else None

    async def _send(self, message_type: str, ask: Ask, wait_s: float) -> Verdict | None:
        answer = await self._publish(message_type, ask, wait_s)
        return answer if isinstance(answer, Verdict) else None

    async def _publish(self, message_type: str, ask: Ask, wait_s: float) -> BaseModel | None:
        """What was answered, if anything was; it is queued in any case."""
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_S + wait_s + 0.5):
                return await self._caller.ask(
                    topology.REQUESTS.name,
                    message_type,
                    ask.document,
                    headers=ask.headers,
                    wait_s=wait_s,
                    publish_timeout_s=CONFIRM_TIMEOUT_S,
                )
        except TimeoutError:
            raise fail(Code.UNAVAILABLE, "The request is not known to be queued.", hint=ASK_AGAIN) from None
        except Unroutable:
            self._renew()
            raise
        except LeveretError as error:
            if error.problem.code is Code.UNAVAILABLE:
                raise
            log.warning("verdict.unreadable", code=error.problem.code)
            return None  # it was queued; only the answer could not be read

    def _renew(self) -> None:
        """The queue of requests is gone: coming up again, the link declares it. Not oftener than every few seconds."""
        if time.monotonic() - self._renewed_at > _RENEW_EVERY_S:
            self._renewed_at = time.monotonic()
            self._link.renew()


def refused(verdict: Verdict) -> LeveretError:
    """What the conductor refused, with its reason."""
    if verdict.problem is None:
        return fail(Code.INTERNAL, "The request was refused without a reason.")
    return LeveretError(verdict.problem)
