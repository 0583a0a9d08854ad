"""Creations as they are watched: one line for each thing that is done."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID

from leveret.client.cli import values
from leveret.client.cli.guest import plain
from leveret.client.cli.progress import Steps
from leveret.client.errors import ClientError, WaitTimedOut

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret, Receipt
    from leveret.shared.documents import CreateVm, EventView, VmView

#: Not every image can say that it is ready. Unless asked to, nobody waits longer than this for one that runs.
READY_PATIENCE_S = 90.0
_CONSOLE_LINES = 8


class Build:
    """One creation as it is watched: what is known of it when it ends, times out or is interrupted."""

    def __init__(self, target: str | None, timeout_s: float, *, steps: Steps | None = None, whose: str = "") -> None:
        self.target = target
        self.timeout_s = timeout_s
        self.steps = steps or Steps()
        self._whose = whose
        self.vm_id: UUID | None = None
        self.name: str | None = None
        self._seen = 0
        self._told: set[tuple[int, str]] = set()
        self._attempt = 0

    async def run(self, leveret: "Leveret", spec: "CreateVm") -> "tuple[VmView, ...]":
        """The VM as far as it was waited for; none when it is queued and nobody waits."""
        from leveret.shared import ids

        vm_id = ids.new_id()
        self.vm_id = vm_id
        self.name = spec.name or ids.name_for(vm_id)
        self.steps.doing(f"asking for {self.name}")
        receipt = await leveret.create(spec, vm_id=vm_id)
        if receipt.verdict == "queued":
            self.steps.done("queued", f"{self.name}: Leveret has the request and answers later")
        if self.target is None:
            return (receipt.vm,) if receipt.vm is not None else ()
        if self.target in {"stopped", "ready"}:
            return (await self._wait(leveret, receipt, self.target, self.timeout_s),)
        vm = await self._wait(leveret, receipt, "running", self.timeout_s)
        return (await self._wait_a_little(leveret, vm) if self.target == "auto" else vm,)

    async def _wait(self, leveret: "Leveret", receipt: "Receipt", target: Any, timeout_s: float) -> "VmView":
        try:
            return await leveret.wait(receipt, target, timeout_s=timeout_s, on_event=self.tell)
        except WaitTimedOut as error:
            if target == "ready" and error.vm is not None:
                await self._console_tail(leveret, receipt.vm_id)
            raise

    async def _wait_a_little(self, leveret: "Leveret", vm: "VmView") -> "VmView":
        left_s = min(READY_PATIENCE_S, self.timeout_s - self.steps.elapsed_s)
        try:
            return await leveret.wait(vm.id, "ready", timeout_s=max(left_s, 0.1), on_event=self.tell)
        except WaitTimedOut:
            self.steps.done("running", "the guest has not announced that it is ready; some images cannot")
            return await leveret.get(vm.id)

    async def _console_tail(self, leveret: "Leveret", vm_id: UUID) -> None:
        try:
            text = await leveret.console_log(vm_id, max_bytes=4096)
        except ClientError:
            return
        lines = [line for line in plain(text).splitlines() if line.strip()][-_CONSOLE_LINES:]
        self.steps.say("The end of its console:\n" + "\n".join(f"  | {line}" for line in lines))

    def tell(self, event: "EventView") -> None:
        """One line for each thing that is done; what is under way ticks below."""
        if event.seq <= self._seen:
            return
        self._seen = event.seq
        if event.type == "scheduled":
            self._attempt += 1
        for step in event.data.get("steps") or ():
            if (self._attempt, step["step"]) not in self._told:
                self._told.add((self._attempt, step["step"]))
                took = values.duration(float(step["seconds"]))
                self.steps.done(step["step"].replace("_", " "), f"took {took}", whose=self._whose)
        if event.type in _LINES:
            name, note = _LINES[event.type]
            is_fine = event.type not in {"error", "build_failed"}
            self.steps.done(name, note(self, event), ok=is_fine, whose=self._whose)
        doing = event.data.get("step") or _DOING.get(event.type)
        if doing:
            self.steps.doing(str(doing).replace("_", " "))

    def interrupted(self) -> str:
        self.steps.hush()
        if self.vm_id is None:
            return "Interrupted: nothing was asked for."
        if not self._seen:
            return f"Interrupted. Whether {self.name} was accepted: leveret show {self.vm_id}"
        return f"Interrupted: {self.name} goes on being built.\nFollow it:  leveret events -f {self.name}"


_DOING = {"accepted": "finding a host", "waiting": "waiting for room", "running": "booting"}


def _problem(event: "EventView") -> str:
    problem = event.data.get("problem") or {}
    return f"{problem.get('message', '')} ({problem.get('code', '?')})"


#: The events that get a line of their own.
_LINES: dict[str, tuple[str, Callable[[Build, "EventView"], str]]] = {
    "accepted": ("accepted", lambda build, _: str(build.name or "")),
    "waiting": ("no room yet", lambda _, event: _problem(event)),
    "scheduled": ("scheduled", lambda _, event: f"on {event.data.get('host', '?')}"),
    "running": ("running", lambda _, __: ""),
    "stopped": ("stopped", lambda _, __: "built and not started"),
    "guest_ready": ("guest ready", lambda _, __: ""),
    "build_failed": ("build failed", lambda _, event: _problem(event)),
    "error": ("error", lambda _, event: _problem(event)),
}


class Builds:
    """Several VMs of one request as they are watched: every line says whose it is."""

    def __init__(self, target: str | None, timeout_s: float) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self.steps = Steps()
        self.names: tuple[str, ...] = ()
        self._of: dict[UUID, Build] = {}
        self._width = 0

    async def run(self, leveret: "Leveret", spec: "CreateVm") -> "tuple[VmView, ...]":
        """The VMs as far as they were waited for; none when they are queued and nobody waits."""
        self.steps.doing(f"asking for {spec.count} VMs")
        # Before anything is asked, so that no event of theirs is missed.
        _, after = await leveret.events_page(after="latest")
        receipt = await leveret.create(spec)
        self.names = tuple(one.name for one in receipt.made) or _names(spec, receipt.vm_ids)
        self._width = max(map(len, self.names))
        if receipt.verdict == "queued":
            self.steps.done("queued", f"{', '.join(self.names)}: Leveret has the request and answers later")
        if self.target is None:
            return receipt.vms
        target: Any = "running" if self.target == "auto" else self.target
        vms = await leveret.wait_all(receipt, target, timeout_s=self.timeout_s, after=after, on_event=self.tell)
        return await self._wait_a_little(leveret, vms) if self.target == "auto" else vms

    async def _wait_a_little(self, leveret: "Leveret", vms: "tuple[VmView, ...]") -> "tuple[VmView, ...]":
        left_s = min(READY_PATIENCE_S, self.timeout_s - self.steps.elapsed_s)
        _, after = await leveret.events_page(after="latest")
        vm_ids = [vm.id for vm in vms]
        try:
            return await leveret.wait_all(vm_ids, "ready", timeout_s=max(left_s, 0.1), after=after, on_event=self.tell)
        except WaitTimedOut:
            self.steps.done("running", "not every guest has announced that it is ready; some images cannot")
            return tuple([await leveret.get(vm_id) for vm_id in vm_ids])

    def tell(self, event: "EventView") -> None:
        if event.vm_id is None:
            return
        build = self._of.get(event.vm_id)
        if build is None:
            whose = (event.vm_name or str(event.vm_id)).ljust(self._width)
            build = self._of[event.vm_id] = Build(None, self.timeout_s, steps=self.steps, whose=whose)
        build.tell(event)

    def interrupted(self) -> str:
        self.steps.hush()
        if not self.names:
            return "Interrupted: whether anything was accepted, says `leveret list`."
        names = ", ".join(self.names)
        return f"Interrupted: {names} go on being built.\nFollow them:  leveret events -f"


def _names(spec: "CreateVm", vm_ids: tuple[UUID, ...]) -> tuple[str, ...]:
    """What they are called, whoever has made them by now."""
    from leveret.shared import ids

    if spec.name is None:
        return tuple(map(ids.name_for, vm_ids))
    return tuple(f"{spec.name}-{number}" for number in range(1, len(vm_ids) + 1))
