"""`list`, `show`, `explain`: what there is and why."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.output import Format, Output, emit, emit_document, paint, write_facts
from leveret.client.cli.session import VmName, connect, run

if TYPE_CHECKING:
    from leveret.shared.documents import EventView, VmView

#: Events that `explain` shows: the newest say why.
_EXPLAINED_EVENTS = 12


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
    label: Annotated[list[str] | None, typer.Option("-l", "--label", help="Only VMs with key=value.")] = None,
    host: Annotated[str | None, typer.Option(help="Only VMs on this host.")] = None,
    output: Output = Format.TABLE,
) -> None:
    """List VMs."""
    from leveret.client.cli.columns import VM_COLUMNS
    from leveret.client.cli.values import pairs
    from leveret.shared.lifecycle import State

    labels = pairs(label or [])

    async def body() -> "list[VmView]":
        async with connect(ctx) as leveret:
            found = leveret.list(state=State(state.value) if state else None, labels=labels, host=host)
            return [vm async for vm in found]

    emit(run(body()), VM_COLUMNS, output)


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
        ("host", f"{vm.host} in zone {vm.zone}" if vm.host else ""),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(vm.labels.items()))),
        ("attempts", str(vm.attempts) if vm.attempts > 1 else ""),
        ("created", f"{vm.created_at.astimezone():%Y-%m-%d %H:%M:%S} ({age_text(vm.created_at)} ago)"),
    ]


def explain(ctx: typer.Context, vm: VmName, output: Output = Format.TABLE) -> None:
    """Say why a VM is as it is, and what can be done."""

    async def body() -> "tuple[VmView, list[EventView]]":
        async with connect(ctx) as leveret:
            found = await leveret.find(vm)
            return found, [event async for event in leveret.events(vm_id=found.id)]

    found, events = run(body())
    if output is Format.TABLE:
        _explain(found, events)
    elif output is Format.NAME:
        print(found.name)
    else:
        story = [event.model_dump(mode="json") for event in events]
        emit_document({"vm": found.model_dump(mode="json"), "events": story}, output)


def _explain(vm: "VmView", events: "list[EventView]") -> None:
    from leveret.client.cli.columns import event_line, state_style, state_text
    from leveret.client.cli.failing import problem_lines

    print(f"{paint(vm.name, 'bold')} is {paint(state_text(vm), state_style(vm.state))} and is wanted {vm.desired}.")
    if vm.problem:
        print(f"\n{paint('why', 'bold')}\n  {vm.problem.message} ({vm.problem.code})")
        for line in problem_lines(vm.problem):
            print(line)
    elif vm.observed_generation < vm.generation:
        where = f"host {vm.host}" if vm.host else "a host"
        print(f"\n{paint('why', 'bold')}\n  Waiting for {where} to confirm. Leveret repeats the command until it does.")
    else:
        print("Nothing is wrong with it.")
    print(f"\n{paint('events', 'bold')}")
    if len(events) > _EXPLAINED_EVENTS:
        print(f"  ... {len(events) - _EXPLAINED_EVENTS} before: leveret events {vm.name}")
    for event in events[-_EXPLAINED_EVENTS:]:
        print(f"  {event_line(event, with_name=False)}")
