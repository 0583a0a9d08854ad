"""`list`, `show`, `explain`: what there is and why."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from leveret.client.cli.output import Format, Output, emit, emit_document, paint, write_facts
from leveret.client.cli.session import VmName, complete_group, complete_host, complete_vm, connect, run
from leveret.client.errors import ApiError, ClientError, NotFound

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret
    from leveret.shared.documents import EventView, VmView
    from leveret.shared.placements import PlacementView

#: Events that `explain` shows: the newest say why.
_EXPLAINED_EVENTS = 12
#: How many of a project's newest events are looked through for a request that was refused.
_SEARCHED_EVENTS = 5000


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that was not carried out: what is known of it under the id that was given."""

    id: str
    problem: dict[str, Any]


class StateChoice(StrEnum):
    """The states of `leveret.shared.lifecycle.State`, which would load pydantic for `--help`; a test compares them."""

    PENDING = "pending"
    BUILDING = "building"
    RUNNING = "running"
    STOPPED = "stopped"
    DELETING = "deleting"
    DELETED = "deleted"
    ERROR = "error"


def list_(
    ctx: typer.Context,
    state: Annotated[StateChoice | None, typer.Option(help="Only VMs in this state.", metavar="STATE")] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option(
            "-l", "--selector", metavar="SELECTOR", help="Only VMs whose labels fit: 'app=web,tier!=db,zone in (a,b)'."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help="Only VMs on this host.", autocompletion=complete_host)
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Only VMs of this group.", autocompletion=complete_group)
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """List VMs."""
    from leveret.client.cli.columns import VM_COLUMNS
    from leveret.shared.lifecycle import State

    async def body() -> "list[VmView]":
        async with connect(ctx) as leveret:
            wanted = ",".join(selector) if selector else None
            found = leveret.list(state=State(state.value) if state else None, selector=wanted, host=host, group=group)
            vms = [vm async for vm in found]
            if host and not vms:
                await _warn_of_unknown_host(leveret, host)
            return vms

    emit(run(body()), VM_COLUMNS, output)


async def _warn_of_unknown_host(leveret: "Leveret", host: str) -> None:
    """Only administrators may see the hosts: others are told nothing."""
    try:
        known = {one.name for one in await leveret.hosts()}
    except ClientError:
        return
    if host not in known:
        print(f"There is no host {host!r}: `leveret hosts` lists those that there are.", file=sys.stderr)


def show(ctx: typer.Context, vm: VmName, output: Output = Format.TABLE) -> None:
    """Show everything about one VM."""

    async def body() -> "VmView":
        async with connect(ctx) as leveret:
            return await leveret.find(vm)

    found = run(body())
    if output is Format.TABLE:
        write_facts(facts(found))
    elif output is Format.NAME:
        print(found.name)
    else:
        emit_document(found.model_dump(mode="json"), output)


def facts(vm: "VmView") -> list[tuple[str, str]]:
    from leveret.client.cli.columns import age_text, size_text, state_style, state_text
    from leveret.client.cli.failing import problem_lines

    state = paint(state_text(vm), state_style(vm.state))
    wish = "" if vm.desired.value == vm.state.value else f", wanted {vm.desired}"
    ready = ", guest ready" if vm.guest_ready else ""
    waiting = "" if vm.observed_generation >= vm.generation else ", the host has not confirmed it yet"
    problem = ""
    if vm.problem:
        problem = "\n".join([f"{vm.problem.message} ({vm.problem.code})", *problem_lines(vm.problem)])
    return [
        ("name", paint(vm.name, "bold")),
        ("id", str(vm.id)),
        ("state", f"{state}{ready}{wish}{waiting}"),
        ("problem", problem),
        ("size", size_text(vm)),
        ("image", vm.image),
        ("address", f"{vm.address} on network {vm.network}, {vm.mac}" if vm.address else ""),
        ("ssh", f"{vm.ssh.host}:{vm.ssh.port}" if vm.ssh else ""),
        ("host", f"{vm.host} in zone {vm.zone}{_silence(vm)}" if vm.host else ""),
        ("group", vm.group or ""),
        ("if host fails", "made anew elsewhere, without its disk" if vm.on_host_failure == "restart" else ""),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(vm.labels.items()))),
        ("attempts", str(vm.attempts) if vm.attempts > 1 else ""),
        ("created", f"{vm.created_at.astimezone():%Y-%m-%d %H:%M:%S} ({age_text(vm.created_at)} ago)"),
    ]


def explain(
    ctx: typer.Context,
    vm: Annotated[
        str,
        typer.Argument(metavar="VM|ID", help="Name or id of a VM, or the id of a request.", autocompletion=complete_vm),
    ],
    output: Output = Format.TABLE,
) -> None:
    """Say why a VM is as it is, or a request was refused."""

    async def body() -> "tuple[VmView | Refused, list[EventView], PlacementView | None]":
        async with connect(ctx) as leveret:
            try:
                found = await leveret.find(vm)
            except ApiError as error:
                # What is said of an id under which no VM came to be is why the request for it was refused.
                return *await _refused(leveret, vm, error), None
            except NotFound as error:
                return *await _refused(leveret, vm, error), None
            return found, [event async for event in leveret.events(vm_id=found.id)], await _placement(leveret, found)

    found, events, placement = run(body())
    if isinstance(found, Refused):
        _explain_refusal(found, events, output)
    elif output is Format.TABLE:
        _explain(found, events, placement)
    elif output is Format.NAME:
        print(found.name)
    else:
        story = [event.model_dump(mode="json") for event in events]
        told = placement.model_dump(mode="json") if placement else None
        emit_document({"vm": found.model_dump(mode="json"), "placement": told, "events": story}, output)


async def _placement(leveret: "Leveret", vm: "VmView") -> "PlacementView | None":
    """Where it stands and why; None of an API that is too old to say so, and of a VM that has gone meanwhile."""
    try:
        return await leveret.placement(vm.id)
    except ApiError as error:
        if error.status != 404:
            raise
        return None


async def _refused(leveret: "Leveret", text: str, error: ApiError | NotFound) -> "tuple[Refused, list[EventView]]":
    """The refusal that an id is about, of a VM or of a request. Raises the error when there is none."""
    try:
        asked = UUID(text)
    except ValueError:
        raise error from None
    if isinstance(error, ApiError) and error.code not in {"vm_not_found", "not_found"} and error.status in {409, 422}:
        return Refused(text, {"code": error.code, "message": error.message, "hint": error.hint, **error.details}), []
    _, last = await leveret.events_page(after="latest")
    found = [
        event
        async for event in leveret.events(after=max(0, last - _SEARCHED_EVENTS))
        if event.type == "rejected" and (event.vm_id == asked or event.data.get("request_id") == text)
    ]
    if not found:
        raise error
    return Refused(text, found[-1].data.get("problem") or {}), found


def _explain_refusal(refused: Refused, events: "list[EventView]", form: Format) -> None:
    from leveret.client.cli.failing import problem_lines
    from leveret.shared.errors import Problem

    if form is Format.NAME:
        print(refused.id)
        return
    if form is not Format.TABLE:
        story = [event.model_dump(mode="json") for event in events]
        emit_document({"vm": None, "problem": refused.problem, "events": story}, form)
        return
    problem = Problem.model_validate({"code": "internal", "message": "No reason was kept."} | refused.problem)
    print(f"This request was {paint('refused', 'red')}: no VM was made or changed by it.")
    print(f"\n{paint('why', 'bold')}\n  {problem.message} ({problem.code})")
    for line in problem_lines(problem):
        print(line)
    if events:
        print(f"\n{paint('events', 'bold')}")
    _print_newest(events)


def _explain(vm: "VmView", events: "list[EventView]", placement: "PlacementView | None" = None) -> None:
    from leveret.client.cli.columns import state_style, state_text
    from leveret.client.cli.failing import problem_lines
    from leveret.client.cli.where import placement_lines

    print(f"{paint(vm.name, 'bold')} is {paint(state_text(vm), state_style(vm.state))} and is wanted {vm.desired}.")
    if vm.host_silent_since is not None and vm.state.value != StateChoice.ERROR:
        print(f"\n{paint('why', 'bold')}")
        for line in silence_lines(vm):
            print(f"  {line}")
    elif vm.problem:
        print(f"\n{paint('why', 'bold')}\n  {vm.problem.message} ({vm.problem.code})")
        for line in problem_lines(vm.problem):
            print(line)
    elif vm.state.value == StateChoice.DELETED:
        pass  # a host confirmed that, and what was asked of it before does not matter any more
    elif vm.observed_generation < vm.generation:
        where = f"host {vm.host}" if vm.host else "a host"
        print(f"\n{paint('why', 'bold')}\n  Waiting for {where} to confirm. Leveret repeats the command until it does.")
    else:
        print("Nothing is wrong with it.")
    if placement is not None:
        print(f"\n{paint('where', 'bold')}")
        for line in placement_lines(placement):
            print(f"  {line}")
    print(f"\n{paint('events', 'bold')}")
    if len(events) > _EXPLAINED_EVENTS:
        print(f"  ... {len(events) - _EXPLAINED_EVENTS} before: leveret events {vm.name}")
    _print_newest(events)


def _silence(vm: "VmView") -> str:
    from leveret.client.cli.columns import age_text

    since = vm.host_silent_since
    return f", silent since {since.astimezone():%Y-%m-%d %H:%M:%S} ({age_text(since)} ago)" if since else ""


def silence_lines(vm: "VmView") -> list[str]:
    """What is known of a VM whose host is not heard of, and what can be done."""
    if vm.on_host_failure == "restart":
        then = "this VM is then made anew on another host, without what was on its disk."
    else:
        then = "this VM then waits for the host with its disk, and `leveret retry` makes it anew elsewhere."
    return [
        f"Host {vm.host} is{_silence(vm).removeprefix(',')}: the VM may run or not; this is how it was seen last.",
        "Nothing on a silent host is touched. When it is heard of again, all goes on by itself.",
        f'If it is certainly off, an administrator can say so: leveret host fence {vm.host} --proof "...";',
        then,
    ]


def _print_newest(events: "list[EventView]") -> None:
    from leveret.client.cli.event_lines import EventLines

    writer = EventLines(with_subject=False, indent="  ")
    lines = [writer.line(event) for event in events]
    for line in lines[-_EXPLAINED_EVENTS:]:
        print(line)
