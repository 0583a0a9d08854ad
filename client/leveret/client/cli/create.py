"""`create`: get me a VM, and tell me how it goes."""

import base64
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from leveret.client.cli import values
from leveret.client.cli.failing import Exit
from leveret.client.cli.guest import plain
from leveret.client.cli.output import Format, Output, emit_document
from leveret.client.cli.progress import Steps
from leveret.client.cli.session import complete_image, config, connect, run
from leveret.client.errors import ClientError, WaitTimedOut

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret, Receipt
    from leveret.shared.documents import CreateVm, EventView, VmView

#: Not every image can say that it is ready. Unless asked to, nobody waits longer than this for one that runs.
READY_PATIENCE_S = 90.0
_CREATE_RETRY_S = 15.0
_CONSOLE_LINES = 8


class WaitChoice(StrEnum):
    RUNNING = "running"
    READY = "ready"


class Strategy(StrEnum):
    SPREAD = "spread"
    PACK = "pack"


class OnHostFailureChoice(StrEnum):
    """`leveret.shared.documents.OnHostFailure`; a test compares them."""

    NONE = "none"
    RESTART = "restart"


def create(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A pleasant one is made if omitted.")] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|URL", help="A registered image, or where to fetch one.", autocompletion=complete_image
        ),
    ] = None,
    sha256: Annotated[str | None, typer.Option(metavar="HEX", help="What a fetched image must hash to.")] = None,
    image_format: Annotated[str, typer.Option(metavar="FORMAT", help="Of a fetched image: qcow2 or raw.")] = "qcow2",
    vcpus: Annotated[int, typer.Option(metavar="N")] = 1,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="512M, 2G.")] = "1G",
    disk: Annotated[str, typer.Option(metavar="SIZE", help="10G.")] = "10G",
    ssh_key: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Public keys. Default: ~/.ssh/id_*.pub and the local stack's own."),
    ] = None,
    user_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Script or cloud-config for the guest; - for standard input.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option("-l", "--label", metavar="KEY=VALUE")] = None,
    zone: Annotated[list[str] | None, typer.Option(metavar="ZONE", help="Zones it may go to; any if omitted.")] = None,
    require_label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Labels that its host must have.")
    ] = None,
    forbid_label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Labels that its host must not have.")
    ] = None,
    strategy: Annotated[
        Strategy, typer.Option(metavar="spread|pack", help="Spread over hosts or pack them.")
    ] = Strategy.SPREAD,
    network: Annotated[str, typer.Option(metavar="NAME")] = "default",
    stopped: Annotated[bool, typer.Option("--stopped", help="Build it, do not start it.")] = False,
    on_host_failure: Annotated[
        OnHostFailureChoice,
        typer.Option(
            metavar="none|restart",
            help="When its host is declared to be off: wait for the host, or make it anew elsewhere, without its disk.",
        ),
    ] = OnHostFailureChoice.NONE,
    wait: Annotated[
        WaitChoice | None,
        typer.Option(
            help="Be strict: time out (exit code 6) unless it is so. Default: running, and ready if it can be."
        ),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return when the request is accepted.")] = False,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="How long to wait.")] = 300,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say whether it would be accepted now; nothing is claimed.")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Get me a VM."""
    if no_wait and wait:
        raise typer.BadParameter("--wait and --no-wait exclude each other.")
    if stopped and wait:
        raise typer.BadParameter("a VM that is not started will be neither running nor ready.")
    asked: dict[str, Any] = {
        "name": name,
        "vcpus": vcpus,
        "memory_mib": values.size(memory, unit="M", option="--memory"),
        "disk_gib": values.size(disk, unit="G", option="--disk"),
        "ssh_keys": values.public_keys(_key_files(ctx) if ssh_key is None else ssh_key),
        "labels": values.pairs(label or [], option="--label"),
        "placement": {
            "zones": zone or [],
            "require_labels": values.pairs(require_label or [], option="--require-label"),
            "forbid_labels": values.pairs(forbid_label or [], option="--forbid-label"),
            "strategy": strategy.value,
        },
        "network": network,
        "running": not stopped,
        "on_host_failure": on_host_failure.value,
        **_user_data(user_data),
    }
    from leveret.client.cli.faults import checked
    from leveret.shared.documents import CreateVm

    build = _Build(None if no_wait else "stopped" if stopped else (wait.value if wait else "auto"), timeout)

    async def body() -> "VmView | None":
        async with connect(ctx, retry_for_s=_CREATE_RETRY_S) as leveret:
            asked["image"] = await _image(leveret, image, sha256, image_format)
            spec = checked(CreateVm, asked)
            if dry_run:
                return await _rehearse(leveret, spec)
            return await build.run(leveret, spec)

    try:
        with build.steps:
            made = run(body())
    except KeyboardInterrupt:
        print(build.interrupted(), file=sys.stderr)
        raise typer.Exit(Exit.INTERRUPTED) from None
    if dry_run:
        _show_rehearsal(made, output)
    else:
        _show(made, build, output)


async def _rehearse(leveret: "Leveret", spec: "CreateVm") -> "VmView | None":
    """The VM as it would be, as far as the API tells. What would be refused is raised."""
    return (await leveret.create(spec, dry_run=True)).vm


def _show_rehearsal(vm: "VmView | None", form: Format) -> None:
    on = f" on host {vm.host}" if vm and vm.host else ""
    print(f"It would be accepted now{on}. Nothing was made.", file=sys.stderr)
    if form in {Format.JSON, Format.YAML}:
        emit_document({"would_be_accepted": True, "vm": vm.model_dump(mode="json") if vm else None}, form)


def _user_data(file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"cannot read it: {error}", param_hint="--user-data") from error
    try:
        return {"user_data": data.decode()}
    except UnicodeDecodeError:
        return {"user_data_base64": base64.b64encode(data).decode()}


def _key_files(ctx: typer.Context) -> list[Path]:
    files = sorted(Path("~/.ssh").expanduser().glob("id_*.pub"))
    own = config(ctx).ssh_key
    if own and own.with_name(f"{own.name}.pub").exists():
        files.append(own.with_name(f"{own.name}.pub"))
    return files


async def _image(leveret: "Leveret", image: str | None, sha256: str | None, image_format: str) -> dict[str, str]:
    if image and "://" in image:
        if not sha256:
            raise typer.BadParameter(
                "an image by url needs it: what arrives is held against it.", param_hint="--sha256"
            )
        return {"url": image, "sha256": sha256.lower(), "format": image_format}
    if sha256:
        raise typer.BadParameter(
            "it belongs to an image by url; a registered image has its own.", param_hint="--sha256"
        )
    if image:
        return {"name": image}
    registered = [known.name for known in await leveret.images()]
    if len(registered) == 1:
        return {"name": registered[0]}
    which = ", ".join(registered) or "none is registered, give a url and --sha256"
    raise typer.BadParameter(f"which image? One of: {which}", param_hint="--image")


class _Build:
    """One creation as it is watched: what is known of it when it ends, times out or is interrupted."""

    def __init__(self, target: str | None, timeout_s: float) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self.steps = Steps()
        self.vm_id: UUID | None = None
        self.name: str | None = None
        self._seen = 0
        self._told: set[tuple[int, str]] = set()
        self._attempt = 0

    async def run(self, leveret: "Leveret", spec: "CreateVm") -> "VmView | None":
        """The VM as far as it was waited for; None when it is queued and nobody waits."""
        from leveret.shared import ids

        vm_id = ids.new_id()
        self.vm_id = vm_id
        self.name = spec.name or ids.name_for(vm_id)
        self.steps.doing(f"asking for {self.name}")
        receipt = await leveret.create(spec, vm_id=vm_id)
        if receipt.verdict == "queued":
            self.steps.done("queued", f"{self.name}: Leveret has the request and answers later")
        if self.target is None:
            return receipt.vm
        if self.target in {"stopped", "ready"}:
            return await self._wait(leveret, receipt, self.target, self.timeout_s)
        vm = await self._wait(leveret, receipt, "running", self.timeout_s)
        if self.target == "auto":
            return await self._wait_a_little(leveret, vm)
        return vm

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
                self.steps.done(step["step"].replace("_", " "), f"took {took}")
        if event.type in _LINES:
            name, note = _LINES[event.type]
            self.steps.done(name, note(self, event), ok=event.type not in {"error", "build_failed"})
        doing = event.data.get("step") or {"accepted": "finding a host", "running": "booting"}.get(event.type)
        if doing:
            self.steps.doing(str(doing).replace("_", " "))

    def interrupted(self) -> str:
        self.steps.hush()
        if self.vm_id is None:
            return "Interrupted: nothing was asked for."
        if not self._seen:
            return f"Interrupted. Whether {self.name} was accepted: leveret show {self.vm_id}"
        return f"Interrupted: {self.name} goes on being built.\nFollow it:  leveret events -f {self.name}"


def _problem(event: "EventView") -> str:
    problem = event.data.get("problem") or {}
    return f"{problem.get('message', '')} ({problem.get('code', '?')})"


#: The events that get a line of their own.
_LINES: dict[str, tuple[str, Callable[[_Build, "EventView"], str]]] = {
    "accepted": ("accepted", lambda build, _: str(build.name)),
    "scheduled": ("scheduled", lambda _, event: f"on {event.data.get('host', '?')}"),
    "running": ("running", lambda _, __: ""),
    "stopped": ("stopped", lambda _, __: "built and not started"),
    "guest_ready": ("guest ready", lambda _, __: ""),
    "build_failed": ("build failed", lambda _, event: _problem(event)),
    "error": ("error", lambda _, event: _problem(event)),
}


def _show(vm: "VmView | None", build: _Build, form: Format) -> None:
    """The hint for people on standard error, the VM for programs on standard output."""
    name = vm.name if vm else str(build.name)
    if vm is not None and vm.state == "running":
        forwarded = vm.ssh is not None and vm.ssh.host != str(vm.address)
        at = "" if forwarded or vm.address is None else f" at {vm.address}"
        print(f"\n{name} is running{at}. Log in:  leveret ssh {name}", file=sys.stderr)
    elif vm is not None and build.target is None:
        print(f"{name} is being built. Follow it:  leveret events -f {name}", file=sys.stderr)
    if form in {Format.JSON, Format.YAML}:
        emit_document(vm.model_dump(mode="json") if vm else {"id": str(build.vm_id), "name": name}, form)
    elif form is Format.NAME or not os.isatty(sys.stdout.fileno()):
        print(name)
