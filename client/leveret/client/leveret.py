"""`Leveret`: every verb of the REST API, for programs."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote
from uuid import UUID

import httpx2
from pydantic import BaseModel

from leveret.client.errors import Ambiguous, ApiError, Conflict, EventGap, NotFound
from leveret.client.http import Http, OnRetry, unreadable
from leveret.client.inputs import check_traceparent
from leveret.client.receipt import ANY, IfMatch, Receipt, all_of, one_of, tag_of
from leveret.client.waiting import OnEvent, Wait, check_target
from leveret.client.waiting_all import WaitAll
from leveret.client.watching import WATCH_RETRY_S, OnGap, Watch
from leveret.shared import documents as d
from leveret.shared import ids
from leveret.shared.checks import CheckReport, RunCheck
from leveret.shared.groups import CreateGroup, GroupView
from leveret.shared.lifecycle import State
from leveret.shared.placements import AskCapacity, CapacityReport, PlacementView
from leveret.shared.waiting import Target

__all__ = ["Leveret", "Receipt", "Target"]

_EARLY_S = 0.3
#: How long the API may hold a long poll; it allows 55 s.
POLL_S = 25.0
#: How long the API waits for the report of a check.
CHECK_WAIT_S = 25.0

After = int | Literal["latest"]
Model = TypeVar("Model", bound=BaseModel)


class Leveret:
    """An async client. Use it as a context manager. Every method raises ApiError (or a subclass) or Unreachable.

    Every write carries a request id that stays the same over its retries, so that it is carried out once. Pass
    `request_id` to go on with a write whose fate is unknown, even in another process.
    `if_match` (a VM as it was read, its ETag or its generation): the write is refused with Conflict
    `precondition_failed` when the VM is not that any more. `traceparent` (W3C Trace Context) goes with a write to
    whatever comes of it. What cannot be sent at all is a ValueError, or ConfigError for url and token.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        retry_for_s: float = 10.0,
        transport: httpx2.AsyncBaseTransport | None = None,
        on_retry: OnRetry | None = None,
    ) -> None:
        self._http = Http(url, token, retry_for_s=retry_for_s, transport=transport, on_retry=on_retry)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.close()

    # VMs: writes.

    async def create(
        self,
        spec: d.CreateVm,
        *,
        vm_id: UUID | None = None,
        dry_run: bool = False,
        wait: Target | None = None,
        timeout_s: float = 60.0,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Get me a VM. The id is made before the first attempt, so that another attempt means the same VM.

        `dry_run` asks whether it would be accepted now, and claims nothing; a refusal is raised all the same.
        With `count` it gets several, all or none: the receipt lists them, and `wait_all` waits for them. `vm_id` is
        no VM's then: it only makes another attempt mean the same VMs.
        """
        vm_id = vm_id or ids.new_id()
        several = spec.count > 1
        return await self._write(
            "POST" if several else "PUT",
            "/v1/vms" if several else _vm(vm_id),
            key=str(vm_id) if several else None,
            count=spec.count,
            body=spec.model_dump_json(exclude_defaults=True),
            params={"dry_run": "true"} if dry_run else None,
            wait=None if dry_run else wait,
            timeout_s=timeout_s,
            request_id=request_id,
            traceparent=traceparent,
        )

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
        body = change.model_dump_json(exclude_unset=True)
        return await self._write(
            "PATCH", _vm(vm_id), body=body, if_match=if_match, request_id=request_id, traceparent=traceparent
        )

    async def delete(
        self,
        vm_id: UUID,
        *,
        wait: bool = False,
        timeout_s: float = 60.0,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Make it go away, whatever state it is in."""
        return await self._write(
            "DELETE",
            _vm(vm_id),
            wait="deleted" if wait else None,
            timeout_s=timeout_s,
            if_match=if_match,
            request_id=request_id,
            traceparent=traceparent,
        )

    async def start(
        self,
        vm_id: UUID,
        *,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        return await self._act(vm_id, "start", d.StartVm(), if_match, request_id, traceparent)

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
        return await self._act(vm_id, "stop", d.StopVm(grace_s=grace_s), if_match, request_id, traceparent)

    async def reboot(
        self,
        vm_id: UUID,
        *,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Reset it, as the button on a machine does; once, however often the request has to be sent."""
        return await self._act(vm_id, "reboot", d.RebootVm(), if_match, request_id, traceparent)

    async def retry(
        self,
        vm_id: UUID,
        *,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Receipt:
        """Try a VM in `error` again, on any host."""
        return await self._act(vm_id, "retry", d.RetryVm(), if_match, request_id, traceparent)

    async def _act(
        self,
        vm_id: UUID,
        verb: str,
        document: d.Document,
        if_match: IfMatch | None,
        request_id: str | None,
        traceparent: str | None,
    ) -> Receipt:
        path, body = f"{_vm(vm_id)}/actions/{verb}", document.model_dump_json()
        return await self._write(
            "POST", path, body=body, if_match=if_match, request_id=request_id, traceparent=traceparent
        )

    async def _write(
        self,
        method: str,
        path: str,
        *,
        body: str | None = None,
        params: dict[str, Any] | None = None,
        wait: Target | None = None,
        timeout_s: float = 0.0,
        if_match: IfMatch | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
        key: str | None = None,
        count: int = 1,
    ) -> Receipt:
        if wait is not None:
            check_target(wait)
        waiting = {"wait": wait, "timeout_s": f"{timeout_s:g}"} if wait else {}
        request_id = str(ids.new_id()) if request_id is None else request_id
        headers = _if_match(if_match) | _trace(traceparent) | ({} if key is None else {"Idempotency-Key": key})

        async def ask() -> Receipt:
            response = await self._http.send(
                method,
                path,
                params={**(params or {}), **waiting} or None,
                body=body,
                headers=headers,
                request_id=request_id,
                wait_s=timeout_s if wait else 0.0,
            )
            receipt = _read(Receipt, response, wait=response.headers.get("leveret-wait"), count=count)
            return receipt.asked_again_by(ask)

        return await ask()

    # VMs: reads.

    async def get(self, vm_id: UUID) -> d.VmView:
        return await self._get(d.VmView, _vm(vm_id))

    async def find(self, name_or_id: str) -> d.VmView:
        """The VM that a person means. Raises NotFound, or Ambiguous when a name has several VMs."""
        try:
            return await self.get(UUID(name_or_id))
        except ValueError:
            pass
        except ApiError as error:
            # A name may have the form of an id.
            if error.status != 404:
                raise
        found = [vm async for vm in self.list(name=name_or_id)]
        if not found:
            raise NotFound("VM", name_or_id)
        if len(found) > 1:
            raise Ambiguous(name_or_id, [str(vm.id) for vm in found])
        return found[0]

    async def list(
        self,
        *,
        state: State | None = None,
        labels: dict[str, str] | None = None,
        selector: str | None = None,
        host: str | None = None,
        name: str | None = None,
        group: str | None = None,
        page_size: int = 500,
    ) -> AsyncIterator[d.VmView]:
        """Every VM that matches, page after page; a page is only asked for when it is reached.

        `selector` is as Kubernetes has it: `app=web, env!=prod, tier in (a, b), !legacy`.
        """
        asked = {
            "state": state,
            "host": host,
            "name": name,
            "group": group,
            "label": [f"{key}={value}" for key, value in (labels or {}).items()]
            + ([selector] if selector is not None else []),
            "limit": page_size,
        }
        async for vm in self._list(d.VmView, "/v1/vms", **{key: value for key, value in asked.items() if value}):
            yield vm

    async def wait(
        self,
        vm: UUID | Receipt,
        target: Target,
        *,
        timeout_s: float,
        generation: int = 0,
        on_event: OnEvent | None = None,
    ) -> d.VmView:
        """The VM once it is what was waited for; returns within one event of it, and shows each event on the way.

        With a receipt it waits for what that request asked for: one that is queued is asked again, with the same ids,
        until there is a verdict. With an id it goes by the newest wish that Leveret has accepted, and by none of before
        `generation`; a request of which only the id is known may not be among them yet. Raises the refusal of a queued
        request, VmFailed as soon as it cannot come true by itself any more, WaitTimedOut when the time is over.
        """
        vm_id = one_of(vm)

        async def judged() -> int:
            told = (await vm.judged()).generation if isinstance(vm, Receipt) else None
            return max(generation, told or 0)

        async def look() -> d.VmView | None:
            return await self._look(vm_id, timeout_s)

        def hear() -> AsyncGenerator[d.EventView, None]:
            return Watch(self._http, f"{_vm(vm_id)}/events", 0, give_up_s=timeout_s, on_gap=_unheeded).events()

        return await Wait(target, judged=judged, look=look, hear=hear, on_event=on_event).outcome(timeout_s)

    async def wait_all(
        self,
        vms: Sequence[UUID] | Receipt,
        target: Target,
        *,
        timeout_s: float,
        after: After = "latest",
        on_event: OnEvent | None = None,
    ) -> tuple[d.VmView, ...]:
        """The VMs, in order, once all of them are what was waited for.

        As `wait`, over one stream of the project's events: those after the `after`th that are about these VMs are shown
        to `on_event`. Raises VmFailed as soon as one of them cannot become so by itself any more.
        """
        check_target(target)
        until = time.monotonic() + timeout_s
        vms = await all_of(vms, target, timeout_s)
        if after == "latest":
            _, after = await self.events_page(after="latest")
        watch = Watch(self._http, _events(None), after, give_up_s=timeout_s, on_gap=_unheeded)
        wait = WaitAll(
            target, vms, look=lambda vm_id: self._look(vm_id, timeout_s), hear=watch.events, on_event=on_event
        )
        return await wait.outcome(max(0.0, until - time.monotonic()))

    async def _look(self, vm_id: UUID, retry_for_s: float) -> d.VmView | None:
        """The VM, or None while there is none."""
        try:
            return _read(d.VmView, await self._http.send("GET", _vm(vm_id), retry_for_s=retry_for_s))
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    async def placement(self, vm_id: UUID) -> PlacementView:
        """Where it stands and why: every host that was chosen for it, and what came of that."""
        return await self._get(PlacementView, f"{_vm(vm_id)}/placement")

    async def console_log(self, vm_id: UUID, *, max_bytes: int = 65536) -> str:
        """The end of the guest's serial console."""
        response = await self._http.send("GET", f"{_vm(vm_id)}/console-log", params={"max_bytes": max_bytes})
        return response.text

    # Events.

    async def watch(
        self,
        vm_id: UUID | None = None,
        *,
        after: After = 0,
        give_up_s: float = WATCH_RETRY_S,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[d.EventView, None]:
        """Every event with a greater number than `after`, for ever: each exactly once and in order.

        It resumes by itself where it was, however the connection breaks or the API restarts. `latest` begins with what
        is still to come. Remember `event.seq` to go on from there in another process. When events are gone that were
        not yet seen it raises EventGap; with `on_gap` it tells that and goes on behind the gap. Raises Unreachable or
        the last ApiError when there was no API for `give_up_s` seconds; what is refused, at once.
        """
        if after == "latest":
            _, after = await self.events_page(vm_id=vm_id, after="latest")
        watch = Watch(self._http, _events(vm_id), after, give_up_s=give_up_s, on_gap=on_gap)
        async with aclosing(watch.events()) as events:
            async for event in events:
                yield event

    async def events(
        self, *, vm_id: UUID | None = None, after: int = 0, follow: bool = False
    ) -> AsyncIterator[d.EventView]:
        """The events that are there, in order; with `follow` those that come too, as `watch` has them."""
        if follow:
            async with aclosing(self.watch(vm_id, after=after)) as watched:
                async for event in watched:
                    yield event
            return
        async with aclosing(self._page_through(_events(vm_id), after)) as events:
            async for event in events:
                yield event

    async def project_events(self, project: str, *, after: int = 0, follow: bool = False) -> AsyncIterator[d.EventView]:
        """The events of any project, for administrators; with `follow` those that come too, as `watch` has them."""
        path = f"{_project(project)}/events"
        found = Watch(self._http, path, after).events() if follow else self._page_through(path, after)
        async with aclosing(found) as events:
            async for event in events:
                yield event

    async def _page_through(self, path: str, after: int) -> AsyncGenerator[d.EventView, None]:
        while True:
            page, after = await self._events_page(path, after, limit=200)
            for event in page:
                yield event
            if not page:
                return

    async def events_page(
        self, *, vm_id: UUID | None = None, after: After = 0, limit: int = 200, wait_s: float = 0.0
    ) -> tuple[tuple[d.EventView, ...], int]:
        """Events after the `after`th of the project, and the number to go on from. Waits up to `wait_s` for one.

        `latest` means: only those that are still to come.
        """
        return await self._events_page(_events(vm_id), after, limit=limit, wait_s=wait_s)

    async def _events_page(
        self, path: str, after: After, *, limit: int, wait_s: float = 0.0
    ) -> tuple[tuple[d.EventView, ...], int]:
        params: dict[str, Any] = {"after": after, "limit": limit}
        if wait_s > 0:
            params["wait_s"] = f"{wait_s:g}"
        asked_at = time.monotonic()
        try:
            response = await self._http.send("GET", path, params=params, wait_s=wait_s)
        except Conflict as error:
            last = error.details.get("last_seq")
            if isinstance(after, int) and isinstance(last, int):
                raise EventGap(after, last) from error
            raise
        items, following = _page(response)
        if not isinstance(following, int):
            raise unreadable(response, "it does not say where the next page begins")
        if not items and time.monotonic() - asked_at < min(wait_s, _EARLY_S):
            # An API that is about to stop lets its watchers go at once: they must not come back in a storm.
            await asyncio.sleep(_EARLY_S)
        return tuple(_parse(d.EventView, item, response) for item in items), following

    # The installation.

    async def whoami(self) -> dict[str, Any]:
        """Whose token this is: its name, project and role."""
        return _object(await self._http.send("GET", "/v1/whoami"))

    async def hosts(self) -> tuple[d.HostView, ...]:
        """For administrators."""
        return await self._all(d.HostView, "/v1/hosts")

    async def host(self, name_or_id: str) -> d.HostView:
        """For administrators. Raises Conflict `host_conflict` when several hosts have this name."""
        return await self._get(d.HostView, _host(name_or_id))

    async def cordon_host(
        self, name_or_id: str, *, reason: str | None = None, request_id: str | None = None
    ) -> d.HostView:
        """Give it no new VMs; those that it has stay. For administrators, as all that is ordered of hosts."""
        order = d.CordonHost() if reason is None else d.CordonHost(reason=reason)
        return await self._order(name_or_id, "cordon", order, request_id)

    async def uncordon_host(self, name_or_id: str, *, request_id: str | None = None) -> d.HostView:
        """Let it take VMs again. Raises Conflict `host_conflict` when it was fenced and has not come back clean."""
        return await self._order(name_or_id, "uncordon", d.UncordonHost(), request_id)

    async def fence_host(self, name_or_id: str, proof: str, *, request_id: str | None = None) -> d.HostView:
        """Declare that it is off, and stays off until it is back as an empty host: its VMs may be made anew elsewhere.

        `proof` says how that was made sure. A host that is said to be off and is not may run a VM a second time.
        """
        return await self._order(name_or_id, "fence", d.FenceHost(proof=proof), request_id)

    async def retire_host(self, name_or_id: str, *, request_id: str | None = None) -> d.HostView:
        """Give it up for good, with what a fenced host still had. Raises Conflict when it has VMs and is not fenced."""
        return await self._order(name_or_id, "retire", d.RetireHost(), request_id)

    async def _order(self, host: str, verb: str, order: d.Document, request_id: str | None) -> d.HostView:
        path, body = f"{_host(host)}/actions/{verb}", order.model_dump_json()
        return _read(d.HostView, await self._http.send("POST", path, body=body, request_id=request_id))

    async def check(self, *, hosts: bool = True) -> CheckReport:
        """Look at every invariant, and, unless told otherwise, ask the hosts what they have. For administrators."""
        body = RunCheck(hosts=hosts).model_dump_json()
        return _read(CheckReport, await self._http.send("POST", "/v1/checks", body=body, wait_s=CHECK_WAIT_S))

    async def capacity(self, shape: AskCapacity | None = None) -> CapacityReport:
        """How many more VMs of this shape there is room for now; not of named hosts, and not for a group."""
        return _read(
            CapacityReport, await self._http.send("GET", "/v1/capacity", params=_shape(shape or AskCapacity()))
        )

    # Groups of VMs that are placed with regard to each other.

    async def groups(self) -> tuple[GroupView, ...]:
        return await self._all(GroupView, "/v1/groups")

    async def group(self, name: str) -> GroupView:
        return await self._get(GroupView, _group(name))

    async def create_group(self, group: CreateGroup) -> GroupView:
        """A group. Again with the same document it is the same group; with another one it is Conflict `name_taken`."""
        return _read(GroupView, await self._http.send("POST", "/v1/groups", body=group.model_dump_json()))

    async def delete_group(self, name: str) -> None:
        """Forget a group that has no VMs any more."""
        await self._http.send("DELETE", _group(name), missing_is_done=True)

    async def images(self) -> tuple[d.ImageView, ...]:
        return await self._all(d.ImageView, "/v1/images")

    async def version(self) -> dict[str, Any]:
        return _object(await self._http.send("GET", "/version"))

    # Projects, tokens and broker users: for administrators, but everybody may look at the own project.

    async def list_projects(self) -> tuple[d.ProjectView, ...]:
        return await self._all(d.ProjectView, "/v1/projects")

    async def project(self, project: str) -> d.ProjectView:
        return await self._get(d.ProjectView, _project(project))

    async def create_project(self, project: str, quota: d.UpdateQuota | None = None) -> d.ProjectView:
        """A project with these limits. Again with the same limits it is the same project."""
        document = d.CreateProject(quota=quota) if quota is not None else d.CreateProject()
        body = document.model_dump_json(exclude_unset=True)
        return _read(d.ProjectView, await self._http.send("PUT", _project(project), body=body))

    async def set_quota(self, project: str, quota: d.UpdateQuota) -> d.ProjectView:
        """Other limits. What was not given to `quota` stays as it is; None lifts a limit."""
        body = quota.model_dump_json(exclude_unset=True)
        return _read(d.ProjectView, await self._http.send("PATCH", f"{_project(project)}/quota", body=body))

    async def delete_project(self, project: str) -> None:
        """Close a project without VMs. Its tokens and broker users end; its id is never used again."""
        await self._http.send("DELETE", _project(project), missing_is_done=True)

    async def tokens(self, project: str) -> tuple[d.TokenView, ...]:
        return await self._all(d.TokenView, f"{_project(project)}/tokens")

    async def create_token(self, project: str, token: d.CreateToken) -> d.NewTokenView:
        """A token; its secret is told this once.

        Not sent again when its fate is unknown, since the secret would be lost: look into `tokens`, revoke, make
        another.
        """
        path, body = f"{_project(project)}/tokens", token.model_dump_json(exclude_unset=True)
        return _read(d.NewTokenView, await self._http.send("POST", path, body=body, repeatable=False))

    async def revoke_token(self, project: str, token_id: UUID) -> None:
        """End a token. It works nowhere five seconds later."""
        await self._http.send("DELETE", f"{_project(project)}/tokens/{token_id}", missing_is_done=True)

    async def amqp_users(self, project: str) -> tuple[d.AmqpUserView, ...]:
        return await self._all(d.AmqpUserView, f"{_project(project)}/amqp-users")

    async def add_amqp_user(self, project: str, user: str, *, role: d.AmqpRole = "member") -> d.AmqpUserView:
        """Let this broker user speak for the project. The broker must know it: Leveret makes no accounts there."""
        body = d.AddAmqpUser(role=role).model_dump_json()
        return _read(d.AmqpUserView, await self._http.send("PUT", _amqp_user(project, user), body=body))

    async def remove_amqp_user(self, project: str, user: str) -> None:
        """Let this broker user speak for nobody."""
        await self._http.send("DELETE", _amqp_user(project, user), missing_is_done=True)

    # How documents are read.

    async def _get(self, model: type[Model], path: str) -> Model:
        return _read(model, await self._http.send("GET", path))

    async def _all(self, model: type[Model], path: str) -> tuple[Model, ...]:
        return tuple([item async for item in self._list(model, path)])

    async def _list(self, model: type[Model], path: str, **params: Any) -> AsyncIterator[Model]:
        while True:
            response = await self._http.send("GET", path, params=params)
            items, following = _page(response)
            for item in items:
                yield _parse(model, item, response)
            if not following:
                return
            params["cursor"] = following


def _vm(vm_id: UUID) -> str:
    return f"/v1/vms/{vm_id}"


def _events(vm_id: UUID | None) -> str:
    return "/v1/events" if vm_id is None else f"{_vm(vm_id)}/events"


def _if_match(if_match: IfMatch | None) -> dict[str, str]:
    """An ETag stands in quotes, `*` does not."""
    if if_match is None:
        return {}
    tag = tag_of(if_match)
    return {"If-Match": tag if tag == ANY else f'"{tag}"'}


def _trace(traceparent: str | None) -> dict[str, str]:
    return {} if traceparent is None else {"Traceparent": check_traceparent(traceparent)}


def _host(name_or_id: str) -> str:
    return f"/v1/hosts/{quote(name_or_id, safe='')}"


def _group(name: str) -> str:
    return f"/v1/groups/{quote(name, safe='')}"


def _shape(shape: AskCapacity) -> dict[str, Any]:
    """The question as parameters. Raises ValueError for what cannot be asked over REST."""
    where = shape.placement
    if where.hosts or where.group:
        raise ValueError("capacity is asked for by size, zone, label and taint, and neither of a host nor for a group")
    asked: dict[str, Any] = shape.model_dump(include={"vcpus", "memory_mib", "disk_gib"})
    asked["zones"] = list(where.zones)
    for field in ("require_labels", "forbid_labels", "tolerate"):
        asked[field] = [f"{key}={value}" for key, value in getattr(where, field).items()]
    return {name: value for name, value in asked.items() if value}


def _project(project: str) -> str:
    return f"/v1/projects/{quote(project, safe='')}"


def _amqp_user(project: str, user: str) -> str:
    return f"{_project(project)}/amqp-users/{quote(user, safe='')}"


def _unheeded(_gap: object) -> None:
    """A wait looks at the VM itself: it needs no event that it has not heard."""


def _read(model: type[Model], response: httpx2.Response, **more: Any) -> Model:
    return _parse(model, _object(response) | more, response)


def _parse(model: type[Model], document: Any, response: httpx2.Response) -> Model:
    try:
        return model.model_validate(document)
    except ValueError as error:
        raise unreadable(response, f"it is no {model.__name__}") from error


def _page(response: httpx2.Response) -> tuple[Sequence[Any], Any]:
    """The items of a page, and where the next one begins."""
    document = _object(response)
    items = document.get("items")
    if not isinstance(items, list):
        raise unreadable(response, "it is no page of a list")
    return items, document.get("next")


def _object(response: httpx2.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError as error:
        raise unreadable(response, "it is not JSON") from error
    if not isinstance(document, dict):
        raise unreadable(response, "it is no JSON object")
    return document
