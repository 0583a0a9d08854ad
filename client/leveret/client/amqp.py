"""`LeveretAmqp`: the same requests for programs that speak to the broker themselves (extra `leveret[amqp]`)."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from ipaddress import IPv4Address
from types import TracebackType
from typing import Self, TypeVar
from uuid import UUID

import aiormq.exceptions
import structlog

from leveret.client.amqp_watching import AmqpWatch
from leveret.client.broker import is_up, shown, user_of, why_down
from leveret.client.errors import ApiError, ClientError, EventGap, Unavailable, Unreachable, WaitTimedOut, refusal
from leveret.client.inputs import check_amqp_url, check_request_id, check_traceparent
from leveret.client.own_queue import brief, kept
from leveret.client.receipt import ANY, IfMatch, MadeVm, Receipt, all_of, one_of, tag_of
from leveret.client.sights import Sights, VmSight
from leveret.client.waiting import check_target
from leveret.client.watching import WATCH_RETRY_S, OnGap
from leveret.shared import documents as d
from leveret.shared import ids, topology
from leveret.shared.bus import Caller, Link
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.groups import CreateGroup, DeleteGroup
from leveret.shared.lifecycle import State
from leveret.shared.messages import TYPE_OF, Verdict
from leveret.shared.waiting import Target

__all__ = ["LeveretAmqp", "VmSight"]

Answer = TypeVar("Answer")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_AGAIN = frozenset({Code.UNAVAILABLE, Code.RATE_LIMITED})


class LeveretAmqp:
    """An async client of the broker. Use it as a context manager.

    The user of `url` is a broker user that an administrator lets speak for `project`. Every request has its ids before
    it is sent, and is sent again with them for up to `retry_for_s` seconds while its fate is not known: it is carried
    out once. A Receipt says `queued` when the broker has it safe and no verdict came within `verdict_wait_s`. Refusals
    are the errors that `Leveret` raises; Denied is raised at once for a wrong password, too; Unreachable: no broker.
    What cannot be sent at all is a ValueError, or ConfigError for the url.

    `name` names this program's queue, `client.<user>.<name>`: programs of one user that watch at the same time need
    different ones. With `waits` it listens from the beginning, so that no `wait` misses what happened before it.
    """

    def __init__(
        self,
        url: str,
        project: str,
        *,
        name: str = "main",
        waits: bool = True,
        retry_for_s: float = 30.0,
        verdict_wait_s: float = 5.0,
    ) -> None:
        _log_as_a_library_does()
        self._url = check_amqp_url(url)
        self._project = project
        self._name = name
        self._waits = waits
        self._retry_for_s = retry_for_s
        self._verdict_wait_s = verdict_wait_s
        self._caller = Caller(user_of(url))
        self._link = Link(url, f"client:{name}")
        self._link.add(self._caller)
        self._sights = Sights()
        self._listening: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._link.start()
        if self._waits:
            await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None
        await self._link.stop()

    # Requests.

    async def create(
        self,
        spec: d.CreateVm,
        *,
        vm_id: UUID | None = None,
        dry_run: bool = False,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Get me a VM. `dry_run` asks whether it would be accepted now; a refusal is raised all the same.

        With `count` it gets several, all or none: the receipt lists them (`made`), and `wait_all` waits for them.
        """
        headers = {"dry_run": "true"} if dry_run else {}
        return await self._request(vm_id or ids.new_id(), spec, request_id, headers | _headers(None, traceparent))

    async def update(
        self,
        vm_id: UUID,
        change: d.UpdateVm,
        *,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Call it otherwise, or label it anew: a label whose value is None goes, one that is not named stays."""
        return await self._request(vm_id, change, request_id, _headers(if_match, traceparent))

    async def delete(
        self,
        vm_id: UUID,
        *,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Make it go away, whatever state it is in."""
        return await self._request(vm_id, d.DeleteVm(), request_id, _headers(if_match, traceparent))

    async def start(
        self,
        vm_id: UUID,
        *,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        return await self._request(vm_id, d.StartVm(), request_id, _headers(if_match, traceparent))

    async def stop(
        self,
        vm_id: UUID,
        *,
        grace_s: int = 60,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Shut it down; after `grace_s` seconds it is switched off. 0 switches it off at once."""
        return await self._request(vm_id, d.StopVm(grace_s=grace_s), request_id, _headers(if_match, traceparent))

    async def reboot(
        self,
        vm_id: UUID,
        *,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Reset it, as the button on a machine does; once, however often the request has to be sent."""
        return await self._request(vm_id, d.RebootVm(), request_id, _headers(if_match, traceparent))

    async def retry(
        self,
        vm_id: UUID,
        *,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Try a VM in `error` again, on any host."""
        return await self._request(vm_id, d.RetryVm(), request_id, _headers(if_match, traceparent))

    async def create_group(self, group: CreateGroup, *, request_id: str | None = None) -> None:
        """A group. Again with the same document it is the same group; with another one it is Conflict `name_taken`."""
        await self._order(group, request_id)

    async def delete_group(self, name: str, *, request_id: str | None = None) -> None:
        """Forget a group that has no VMs any more."""
        await self._order(DeleteGroup(name=name), request_id)

    async def _order(self, document: d.Document, request_id: str | None) -> None:
        """Return when it is committed. Raises Unavailable when nobody said so in time."""
        request_id = str(ids.new_id()) if request_id is None else check_request_id(request_id)
        headers = {"request_id": request_id, "requested_at": str(time.time())}

        async def ask(left_s: float) -> None:
            if await self._verdict(document, headers, left_s) is None:
                raise refusal("unavailable", "No verdict came.", request_id=request_id)

        await self._again(ask)

    async def _request(
        self, vm_id: UUID, document: d.Document, request_id: str | None, headers: dict[str, str]
    ) -> Receipt:
        request_id = str(ids.new_id()) if request_id is None else check_request_id(request_id)
        headers = {"vm_id": str(vm_id), "request_id": request_id, "requested_at": str(time.time())} | headers

        async def ask() -> Receipt:
            receipt = await self._again(lambda left_s: self._ask_once(vm_id, document, headers, left_s))
            if receipt.verdict == "accepted" and not isinstance(document, d.UpdateVm):
                for asked in receipt.vm_ids:
                    self._sights.asked(asked, request_id)
            return receipt.asked_again_by(ask)

        return await ask()

    async def _again(self, ask: Callable[[float], Awaitable[Answer]]) -> Answer:
        """The answer, asked for again while it may be; `ask` is told how many seconds are left."""
        give_up_at = time.monotonic() + self._retry_for_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await ask(give_up_at - time.monotonic())
            except (Unavailable, Unreachable) as error:
                asked_s = (error.retry_after_s or 0.0) if isinstance(error, Unavailable) else 0.0
                wait_s = max(asked_s, pause_s * random.uniform(0.5, 1.0))
                if time.monotonic() + wait_s > give_up_at:
                    raise
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _ask_once(self, vm_id: UUID, document: d.Document, headers: dict[str, str], left_s: float) -> Receipt:
        """Raises Unavailable and Unreachable when it may be asked again, other errors when not."""
        count = document.count if isinstance(document, d.CreateVm) else 1
        verdict = await self._verdict(document, headers, left_s)
        if verdict is not None:
            return _receipt(verdict, vm_id, count)
        if "dry_run" in headers or not self._link.is_up:
            raise refusal("unavailable", "No verdict came.", request_id=headers["request_id"])
        return Receipt(request_id=headers["request_id"], vm_id=vm_id, verdict="queued", vm=None, count=count)

    async def _verdict(self, document: d.Document, headers: dict[str, str], left_s: float) -> Verdict | None:
        """What became of it, or None when it is queued and nobody said so in time. Raises as `_ask_once` does."""
        if not await is_up(self._link, max(0.0, left_s)):
            raise Unreachable(shown(self._url), why_down(self._link))
        try:
            answer = await self._caller.ask(
                topology.REQUESTS.name, TYPE_OF[type(document)], document, headers=headers, wait_s=self._verdict_wait_s
            )
        except LeveretError as error:
            if isinstance(error.__cause__, aiormq.exceptions.ChannelAccessRefused):
                raise refusal("forbidden", f"The broker does not let this user ask: {error.__cause__}") from error
            raise _refused(error.problem, headers["request_id"]) from error
        if isinstance(answer, Verdict) and answer.problem is not None:
            raise _refused(answer.problem, headers["request_id"])
        return answer if isinstance(answer, Verdict) else None

    # Events.

    async def watch(
        self,
        vm_id: UUID | None = None,
        *,
        after: int | None = None,
        give_up_s: float = WATCH_RETRY_S,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[d.EventView, None]:
        """The project's events from this program's own queue, for ever: each once and in order.

        The queue keeps what comes while nobody watches (100,000 events, a week). What this program had not finished
        when it ended comes again: give the number of the last event you know as `after`. It resumes by itself after
        broker restarts. When the queue was full, or is a new one, events are missing: it raises EventGap, or with
        `on_gap` tells it and goes on. A single VM's queue (`vm_id`) cannot notice gaps. Raises Unreachable without a
        broker for `give_up_s` seconds, and at once what the broker refuses.
        """
        watch = AmqpWatch(
            self._url,
            self._project,
            self._name if vm_id is None else f"{self._name}.{vm_id}",
            key="#" if vm_id is None else f"vm.{vm_id}.*",
            arguments=kept() if vm_id is None else brief(),
            after=after,
            give_up_s=give_up_s,
            on_gap=on_gap,
        )
        async with aclosing(watch.events()) as events:
            async for event in events:
                yield event

    async def wait(self, vm: UUID | Receipt, target: Target, *, timeout_s: float) -> VmSight:
        """What was heard of the VM once it is what was waited for.

        With a receipt it waits for what that request asked for: one that is queued is asked again, with the same ids,
        until there is a verdict. Raises its refusal, VmFailed as soon as it cannot come true by itself any more,
        WaitTimedOut when the time is over. The conductor is asked about a VM that was not heard of yet; whether its
        guest is ready it does not say, so that `ready` needs an event since this client was opened.
        """
        check_target(target)
        if not self._waits:
            raise ClientError("this client was opened with waits=False: it hears nothing to wait for")
        vm_id = one_of(vm)
        is_judged = False
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(vm, Receipt):
                    await vm.judged()
                is_judged = True
                if self._sights.get(vm_id) is None:
                    await self._look(vm_id)
                return await self._sights.until(vm_id, target)
        except TimeoutError:
            raise WaitTimedOut(self._sights.get(vm_id) if is_judged else None, target, timeout_s) from None

    async def wait_all(self, vms: Sequence[UUID] | Receipt, target: Target, *, timeout_s: float) -> tuple[VmSight, ...]:
        """What was heard of the VMs, in order, once all are what was waited for. Raises as `wait` does."""
        check_target(target)
        until = time.monotonic() + timeout_s
        vms = await all_of(vms, target, timeout_s)
        left_s = max(0.0, until - time.monotonic())
        waits = [asyncio.create_task(self.wait(vm_id, target, timeout_s=left_s)) for vm_id in vms]
        try:
            return tuple(await asyncio.gather(*waits))
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _look(self, vm_id: UUID) -> None:
        """A change of nothing is answered with how things stand. A request that is queued before it is answered too."""
        try:
            receipt = await self.update(vm_id, d.UpdateVm())
        except ApiError as error:
            if error.code == Code.VM_DELETED:
                self._sights.put(VmSight(vm_id, state=State.DELETED))
            elif error.status not in {403, 404, 409}:
                raise
            return
        if self._sights.get(vm_id) is None and receipt.state is not None:
            self._sights.put(VmSight(vm_id, receipt.name or "", receipt.state))

    async def _listen(self) -> None:
        """Begin to hear; returns when the queue is bound or was refused, or when that takes too long."""
        watch = AmqpWatch(
            self._url,
            self._project,
            f"{self._name}.waits-{ids.new_id().hex}",
            arguments=brief(),
            on_gap=self._doubt,
        )
        self._listening = asyncio.create_task(self._hear(watch), name="leveret-hearing")
        bound = asyncio.create_task(watch.link.wait_up(self._retry_for_s))
        await asyncio.wait({bound, self._listening}, return_when=asyncio.FIRST_COMPLETED)
        bound.cancel()

    async def _hear(self, watch: AmqpWatch) -> None:
        try:
            async with aclosing(watch.events()) as events:
                async for event in events:
                    self._sights.hear(event)
        except ClientError as error:
            self._sights.end(error)

    def _doubt(self, _gap: EventGap) -> None:
        self._sights.doubt()


def _headers(if_match: IfMatch | None, traceparent: str | None) -> dict[str, str]:
    """A request for a VM that is not there is refused anyway: every other one meets `*`."""
    tag = ANY if if_match is None else tag_of(if_match)
    headers = {} if tag == ANY else {"if_match": tag}
    return headers if traceparent is None else headers | {"traceparent": check_traceparent(traceparent)}


def _receipt(verdict: Verdict, vm_id: UUID, count: int) -> Receipt:
    return Receipt(
        request_id=verdict.request_id,
        vm_id=vm_id,
        verdict="would_be_accepted" if verdict.dry_run else "accepted",
        vm=None,
        generation=verdict.generation,
        state=verdict.state,
        name=verdict.name,
        address=IPv4Address(verdict.address) if verdict.address else None,
        count=count,
        made=tuple(MadeVm.model_validate(one.model_dump()) for one in verdict.vms),
    )


def _refused(problem: Problem, request_id: str) -> ApiError:
    """The error that REST would have raised."""
    details = dict(problem.details)
    faults = details.pop("errors", [])
    retry_after_s = details.get("retry_after_s")
    return refusal(
        str(problem.code),
        problem.message,
        hint=problem.hint,
        request_id=request_id,
        errors=faults if isinstance(faults, list) else [],
        details=details,
        retry_after_s=float(retry_after_s) if isinstance(retry_after_s, int | float) else None,
    )


def _log_as_a_library_does() -> None:
    """Through Python's logging, unless the program has set structlog up: nothing of ours goes to standard output."""
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[structlog.stdlib.add_log_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
