"""`Leveret`: every verb of the REST API, for programs."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Literal, Self
from uuid import UUID

import httpx2

from leveret.client.errors import Ambiguous, ApiError, NotFound, VmFailed, WaitTimedOut
from leveret.client.http import Http
from leveret.shared import ids
from leveret.shared.documents import CreateVm, EventView, HostView, ImageView, RequestView, StopVm, VmView
from leveret.shared.lifecycle import Desired, State

Target = Literal["running", "ready", "stopped", "deleted"]
WaitOutcome = Literal["reached", "failed", "timed_out"]

#: How long the API may hold a long poll; it allows 55 s.
POLL_S = 25.0
#: How long a watcher keeps knocking at an API that went away: a restart takes 2 s, a machine's reboot a minute.
WATCH_RETRY_S = 90.0
_QUEUED_PAUSE_S = 0.2
_EARLY_S = 0.3
#: The event with which a wait ends, and how long to wait for it when the VM is there already.
_LAST_WORD: dict[Target, str] = {
    "running": "running",
    "ready": "guest_ready",
    "stopped": "stopped",
    "deleted": "deleted",
}
_LAST_WORD_S = 1.0


class Receipt(RequestView):
    """What the API says to a write. `queued`: the broker has it, and the conductor has not answered yet.

    `wait` is set when the API was asked to wait.
    """

    wait: WaitOutcome | None = None


class Leveret:
    """An async client. Use it as a context manager. Every method raises ApiError or Unreachable."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        retry_for_s: float = 10.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = Http(url, token, retry_for_s=retry_for_s, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.close()

    # Writes.

    async def create(
        self, spec: CreateVm, *, vm_id: UUID | None = None, wait: Target | None = None, timeout_s: float = 60.0
    ) -> Receipt:
        """Get me a VM. The id is made before the first attempt, so that another attempt means the same VM."""
        path = f"/v1/vms/{vm_id or ids.new_id()}"
        return await self._write(
            "PUT", path, body=spec.model_dump_json(exclude_defaults=True), wait=wait, timeout_s=timeout_s
        )

    async def delete(self, vm_id: UUID, *, wait: bool = False, timeout_s: float = 60.0) -> Receipt:
        return await self._write("DELETE", f"/v1/vms/{vm_id}", wait="deleted" if wait else None, timeout_s=timeout_s)

    async def start(self, vm_id: UUID) -> Receipt:
        return await self._act(vm_id, "start")

    async def stop(self, vm_id: UUID, *, grace_s: int = 60) -> Receipt:
        """Shut it down; after `grace_s` seconds it is switched off. 0 switches it off at once."""
        return await self._act(vm_id, "stop", body=StopVm(grace_s=grace_s).model_dump_json())

    async def reboot(self, vm_id: UUID) -> Receipt:
        """Not sent again when its fate is unknown: two reboots are not one."""
        return await self._act(vm_id, "reboot", repeatable=False)

    async def retry(self, vm_id: UUID) -> Receipt:
        return await self._act(vm_id, "retry", repeatable=False)

    async def _act(self, vm_id: UUID, verb: str, *, body: str = "{}", repeatable: bool = True) -> Receipt:
        return await self._write("POST", f"/v1/vms/{vm_id}/actions/{verb}", body=body, repeatable=repeatable)

    async def _write(
        self,
        method: str,
        path: str,
        *,
        body: str | None = None,
        wait: Target | None = None,
        timeout_s: float = 0.0,
        repeatable: bool = True,
    ) -> Receipt:
        params = {"wait": wait, "timeout_s": f"{timeout_s:g}"} if wait else None
        response = await self._http.send(
            method, path, params=params, body=body, wait_s=timeout_s if wait else 0.0, repeatable=repeatable
        )
        return Receipt.model_validate(response.json() | {"wait": response.headers.get("leveret-wait")})

    # Reads.

    async def get(self, vm_id: UUID) -> VmView:
        response = await self._http.send("GET", f"/v1/vms/{vm_id}")
        return VmView.model_validate_json(response.content)

    async def find(self, name_or_id: str) -> VmView:
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
        host: str | None = None,
        name: str | None = None,
        page_size: int = 500,
    ) -> AsyncIterator[VmView]:
        """Every VM that matches, page after page; a page is only asked for when it is reached."""
        asked = {
            "state": state,
            "host": host,
            "name": name,
            "label": [f"{key}={value}" for key, value in (labels or {}).items()],
            "limit": page_size,
        }
        params = {key: value for key, value in asked.items() if value}
        while True:
            page = (await self._http.send("GET", "/v1/vms", params=params)).json()
            for item in page["items"]:
                yield VmView.model_validate(item)
            if not page.get("next"):
                return
            params["cursor"] = page["next"]

    async def events_page(
        self,
        *,
        vm_id: UUID | None = None,
        after: int | Literal["latest"] = 0,
        limit: int = 200,
        wait_s: float = 0.0,
        retry_for_s: float | None = None,
    ) -> tuple[tuple[EventView, ...], int]:
        """Events after the `after`th of the project, and the number to go on from. Waits up to `wait_s` for one.

        `latest` means: only those that are still to come.
        """
        path = f"/v1/vms/{vm_id}/events" if vm_id else "/v1/events"
        params: dict[str, Any] = {"after": after, "limit": limit}
        if wait_s > 0:
            params["wait_s"] = f"{wait_s:g}"
        asked_at = time.monotonic()
        page = (await self._http.send("GET", path, params=params, wait_s=wait_s, retry_for_s=retry_for_s)).json()
        if not page["items"] and time.monotonic() - asked_at < min(wait_s, _EARLY_S):
            # An API that is about to stop lets its watchers go at once: they must not come back in a storm.
            await asyncio.sleep(_EARLY_S)
        return tuple(EventView.model_validate(item) for item in page["items"]), int(page["next"])

    async def events(
        self, *, vm_id: UUID | None = None, after: int = 0, follow: bool = False
    ) -> AsyncIterator[EventView]:
        """Events in order, without a gap or a repetition, however often the connection breaks; with `follow` for ever.

        A follower outlasts an API that is away for up to WATCH_RETRY_S, then raises what it last saw.
        """
        wait_s, patience_s = (POLL_S, WATCH_RETRY_S) if follow else (0.0, None)
        while True:
            page, after = await self.events_page(vm_id=vm_id, after=after, wait_s=wait_s, retry_for_s=patience_s)
            for event in page:
                yield event
            if not page and not follow:
                return

    async def wait(
        self,
        vm_id: UUID,
        target: Target,
        *,
        timeout_s: float,
        on_event: Callable[[EventView], None] | None = None,
    ) -> VmView:
        """The VM once it is what was waited for; returns within one event of it, and shows each event on the way.

        `running` and `stopped` mean that the newest wish has come true, not an older one. Raises VmFailed as soon as
        it cannot come true by itself any more, WaitTimedOut when the time is over.
        """
        vm: VmView | None = None
        after, wait_s = 0, 0.0
        heard: set[str] = set()

        def tell(page: tuple[EventView, ...]) -> None:
            for event in page:
                heard.add(event.type)
                if on_event is not None:
                    on_event(event)

        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    # What happens after this answer ends the next poll at once, so the look between is not too early.
                    page, after = await self._poll(vm_id, after, wait_s, patience_s=timeout_s)
                    tell(page)
                    vm = await self._get_if_any(vm_id, patience_s=timeout_s)
                    if vm is not None and reached(vm, target):
                        break
                    wait_s = POLL_S
            if on_event is not None and _LAST_WORD[target] not in heard:
                # A row is there some milliseconds before the events that tell of it.
                page, _ = await self._poll(vm_id, after, _LAST_WORD_S, patience_s=_LAST_WORD_S)
                tell(page)
        except TimeoutError:
            raise WaitTimedOut(vm, target, timeout_s) from None
        return vm

    async def _poll(
        self, vm_id: UUID, after: int, wait_s: float, *, patience_s: float
    ) -> tuple[tuple[EventView, ...], int]:
        """The VM's next events, after waiting for one. A VM whose request is still queued has none."""
        try:
            return await self.events_page(vm_id=vm_id, after=after, wait_s=wait_s, retry_for_s=patience_s)
        except ApiError as error:
            if error.status != 404:
                raise
            await asyncio.sleep(_QUEUED_PAUSE_S)
            return (), after

    async def _get_if_any(self, vm_id: UUID, *, patience_s: float) -> VmView | None:
        try:
            response = await self._http.send("GET", f"/v1/vms/{vm_id}", retry_for_s=patience_s)
        except ApiError as error:
            if error.status != 404:
                raise
            return None
        return VmView.model_validate_json(response.content)

    async def console_log(self, vm_id: UUID, *, max_bytes: int = 65536) -> str:
        """The end of the guest's serial console."""
        response = await self._http.send("GET", f"/v1/vms/{vm_id}/console-log", params={"max_bytes": max_bytes})
        return response.text

    async def hosts(self) -> tuple[HostView, ...]:
        return tuple(HostView.model_validate(item) for item in await self._items("/v1/hosts"))

    async def images(self) -> tuple[ImageView, ...]:
        return tuple(ImageView.model_validate(item) for item in await self._items("/v1/images"))

    async def _items(self, path: str) -> tuple[Any, ...]:
        return tuple((await self._http.send("GET", path)).json()["items"])

    async def version(self) -> dict[str, Any]:
        document: dict[str, Any] = (await self._http.send("GET", "/version")).json()
        return document


def reached(vm: VmView, target: Target) -> bool:
    """Whether a VM is what is waited for. Raises VmFailed when it will not be by itself."""
    settled = vm.observed_generation >= vm.generation
    stands = {
        "running": vm.state is State.RUNNING and settled and vm.desired is Desired.RUNNING,
        "ready": vm.state is State.RUNNING and settled and vm.guest_ready,
        "stopped": vm.state is State.STOPPED and settled,
        "deleted": vm.state is State.DELETED,
    }
    if stands[target]:
        return True
    will_not_run = vm.desired is not Desired.RUNNING or (vm.state is State.STOPPED and settled)
    hopeless = {
        "running": will_not_run,
        "ready": will_not_run,
        "stopped": vm.desired is Desired.DELETED,
        "deleted": vm.desired is not Desired.DELETED,
    }
    if hopeless[target] or vm.state is State.ERROR:
        raise VmFailed(vm, target)
    return False
