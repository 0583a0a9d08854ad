"""`create`: get me a VM, and tell me how it goes."""

import base64
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leveret.client.cli import values
from leveret.client.cli.building import Build, Builds
from leveret.client.cli.failing import Exit
from leveret.client.cli.output import Format, Output, emit_document
from leveret.client.cli.session import (
    complete_group,
    complete_host,
    complete_image,
    complete_zone,
    config,
    connect,
    run,
)

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret
    from leveret.shared.documents import CreateVm, VmView

_CREATE_RETRY_S = 15.0


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
    count: Annotated[int, typer.Option(metavar="N", help="So many at once, all or none: NAME-1, NAME-2, ...")] = 1,
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
    zone: Annotated[
        list[str] | None,
        typer.Option(metavar="ZONE", help="Zones it may go to; any if omitted.", autocompletion=complete_zone),
    ] = None,
    require_label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Labels that its host must have.")
    ] = None,
    forbid_label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Labels that its host must not have.")
    ] = None,
    tolerate: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Taints that its host may have.")
    ] = None,
    on_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="On one of these, by name or id; for administrators.", autocompletion=complete_host
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="GROUP", help="Placed with the others of `leveret group`.", autocompletion=complete_group),
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
    wait_for_capacity: Annotated[
        bool,
        typer.Option("--wait-for-capacity", help="Without room, stay pending until there is some, up to an hour."),
    ] = False,
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
            "tolerate": values.pairs(tolerate or [], option="--tolerate"),
            "hosts": on_host or [],
            "group": group,
            "strategy": strategy.value,
        },
        "network": network,
        "running": not stopped,
        "on_host_failure": on_host_failure.value,
        "count": count,
        "wait_for_capacity": wait_for_capacity,
        **_user_data(user_data),
    }
    from leveret.client.cli.faults import checked
    from leveret.shared.documents import CreateVm

    target = None if no_wait else "stopped" if stopped else (wait.value if wait else "auto")
    build = Build(target, timeout) if count == 1 else Builds(target, timeout)

    async def body() -> "tuple[VmView, ...]":
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
    elif isinstance(build, Builds):
        _show_all(made, build, output)
    else:
        _show(made[0] if made else None, build, output)


async def _rehearse(leveret: "Leveret", spec: "CreateVm") -> "tuple[VmView, ...]":
    """The VMs as they would be, as far as the API tells. What would be refused is raised."""
    receipt = await leveret.create(spec, dry_run=True)
    return (receipt.vm,) if receipt.vm is not None else receipt.vms


def _show_rehearsal(vms: "tuple[VmView, ...]", form: Format) -> None:
    vm = vms[0] if vms else None
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


def _show(vm: "VmView | None", build: Build, form: Format) -> None:
    """The hint for people on standard error, the VM for programs on standard output."""
    from leveret.shared.lifecycle import WAITING

    name = vm.name if vm else str(build.name)
    if vm is not None and vm.state == "running":
        forwarded = vm.ssh is not None and vm.ssh.host != str(vm.address)
        at = "" if forwarded or vm.address is None else f" at {vm.address}"
        print(f"\n{name} is running{at}. Log in:  leveret ssh {name}", file=sys.stderr)
    elif vm is not None and build.target is None:
        does = "waits for room" if vm.step == WAITING else "is being built"
        print(f"{name} {does}. Follow it:  leveret events -f {name}", file=sys.stderr)
    if form in {Format.JSON, Format.YAML}:
        emit_document(vm.model_dump(mode="json") if vm else {"id": str(build.vm_id), "name": name}, form)
    elif form is Format.NAME or not os.isatty(sys.stdout.fileno()):
        print(name)


def _show_all(vms: "tuple[VmView, ...]", build: Builds, form: Format) -> None:
    """As of one, for each."""
    from leveret.shared.lifecycle import WAITING

    if build.target is None:
        first, *_, last = build.names
        are = "wait for room" if any(vm.step == WAITING for vm in vms) else "are being built"
        print(f"{len(build.names)} VMs {are}, {first} to {last}. Follow them:  leveret events -f", file=sys.stderr)
    for vm in vms if build.target is not None else ():
        if vm.state == "running":
            at = f" at {vm.address}" if vm.address is not None else ""
            print(f"{vm.name} is running{at}. Log in:  leveret ssh {vm.name}", file=sys.stderr)
    if form in {Format.JSON, Format.YAML}:
        emit_document([vm.model_dump(mode="json") for vm in vms] or [{"name": name} for name in build.names], form)
    elif form is Format.NAME or not os.isatty(sys.stdout.fileno()):
        print("\n".join(build.names))
