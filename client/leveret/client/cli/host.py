"""`host`: look after the machines that VMs run on, and say what is certain of one that is silent."""

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli import hosts
from leveret.client.cli.output import Format, Output, emit, emit_document, paint, write_facts
from leveret.client.cli.session import HostName, HostNames, confirm, connect, run, somebody_can_be_asked
from leveret.client.cli.together import outcome
from leveret.client.cli.values import count

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret
    from leveret.shared.documents import HostView, VmView

    Order = Callable[[Leveret, str], Awaitable[HostView]]

Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]

#: Of VMs that a question names; the count says the rest.
_NAMED = 8
#: Who was heard of this recently, in seconds, is hardly off.
_JUST_NOW_S = 60

app = typer.Typer(
    help="Take hosts out of use, and say of silent ones what is certain.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command("list")(hosts.hosts)


@app.command()
def show(ctx: typer.Context, host: HostName, output: Output = Format.TABLE) -> None:
    """Show a host: how it is, why, and what can be done."""

    async def body() -> "HostView":
        async with connect(ctx) as leveret:
            return await leveret.host(host)

    found = run(body())
    if output is Format.TABLE:
        write_facts(facts(found))
    else:
        _emit(found, output)


@app.command()
def cordon(
    ctx: typer.Context,
    names: HostNames,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why; shown with the host.")] = None,
    output: Output = Format.TABLE,
) -> None:
    """Give hosts no new VMs. Those that they have stay."""
    from leveret.client.cli.faults import checked
    from leveret.shared.documents import CordonHost

    if reason is not None:
        checked(CordonHost, {"reason": reason})

    def told(host: "HostView") -> str:
        return (
            f"cordoned; its {count(host.vms, 'VM')} {'stays' if host.vms == 1 else 'stay'}" if host.vms else "cordoned"
        )

    _order(ctx, names, lambda leveret, host: leveret.cordon_host(host, reason=reason), told, output)


@app.command()
def uncordon(ctx: typer.Context, names: HostNames, output: Output = Format.TABLE) -> None:
    """Let hosts take VMs again.

    A host that was fenced must have come back first, and have nothing left of what is over: its worker sees to that by
    itself, some seconds after it was started.
    """
    _order(ctx, names, lambda leveret, host: leveret.uncordon_host(host), lambda _: "takes VMs again", output)


@app.command()
def fence(
    ctx: typer.Context,
    host: HostName,
    proof: Annotated[
        str, typer.Option(metavar="TEXT", help='How it was made sure that it is off: "power cut at the PDU, outlet 7".')
    ],
    yes: Yes = False,
    output: Output = Format.TABLE,
) -> None:
    """Declare that a host is off and stays off.

    Cut its power first, or see that it is cut. Nothing here can find out whether that is so, and a host that is not off
    may run a VM a second time, on the same address and with the same data. That a host is silent proves nothing.

    Its VMs that were made with --on-host-failure restart are made anew on other hosts, without what was on their
    disks; so are those that were still being built. All others wait for the host, with their disks, in error
    (host_fenced): `leveret retry` makes one of them anew elsewhere.

    When the host comes back, its worker removes what is over by itself; then `leveret host uncordon` lets it work. When
    it never comes back: `leveret host retire`.
    """
    from leveret.client.cli.faults import checked
    from leveret.shared.documents import FenceHost

    checked(FenceHost, {"proof": proof})
    somebody_can_be_asked(yes)

    async def body() -> "HostView":
        async with connect(ctx) as leveret:
            found = await leveret.host(host)
            own = [vm async for vm in leveret.list(host=str(found.id))]
            for line in what_follows(found, own):
                print(line, file=sys.stderr)
            confirm(f"Is {found.name} certainly off, and will it stay off?", yes)
            fenced = await leveret.fence_host(str(found.id), proof)
            print(f"{paint(fenced.name, 'bold', sys.stderr)}: fenced", file=sys.stderr)
            print(f"  {next_step(fenced)}", file=sys.stderr)
            return fenced

    _emit(run(body()), output)


@app.command()
def retire(ctx: typer.Context, host: HostName, yes: Yes = False, output: Output = Format.TABLE) -> None:
    """Give a host up for good.

    It must have no VMs, or be fenced: VMs that wait for it end in error (host_retired), and their disks are lost. A
    machine that is put to use again later is another host, with an id of its own.
    """
    somebody_can_be_asked(yes)

    async def body() -> "HostView":
        async with connect(ctx) as leveret:
            found = await leveret.host(host)
            lost = f" {count(found.vms, 'VM')} of it will be lost, disk and all." if found.vms else ""
            confirm(f"Give up {found.name} for ever?{lost}", yes)
            retired = await leveret.retire_host(str(found.id))
            print(f"{retired.name}: retired", file=sys.stderr)
            return retired

    _emit(run(body()), output)


def _order(
    ctx: typer.Context, names: list[str], order: "Order", told: "Callable[[HostView], str]", form: Format
) -> None:
    """One order for every host, at the same time; a failure with one does not keep the others from it."""
    import asyncio

    async def one(leveret: "Leveret", name: str) -> "HostView":
        host = await order(leveret, name)
        print(f"{host.name}: {told(host)}", file=sys.stderr)
        return host

    async def all_of_them() -> "list[HostView | BaseException]":
        async with connect(ctx) as leveret:
            return await asyncio.gather(*(one(leveret, name) for name in names), return_exceptions=True)

    results = run(all_of_them())
    if form is not Format.TABLE:
        emit([host for host in results if not isinstance(host, BaseException)], (), form)
    outcome(results)


def _emit(host: "HostView", form: Format) -> None:
    if form is Format.NAME:
        print(host.name)
    elif form is not Format.TABLE:
        emit_document(host.model_dump(mode="json"), form)


def facts(host: "HostView") -> list[tuple[str, str]]:
    from leveret.client.cli.columns import age_text, host_state_text, state_style, used_memory_text

    state = paint(host_state_text(host), state_style(host.state))
    anew = f", {host.vms_to_restart} of them made anew elsewhere once it is fenced" if host.vms_to_restart else ""
    return [
        ("name", paint(host.name, "bold")),
        ("id", str(host.id)),
        ("state", state),
        ("why", host.state_reason or ""),
        ("problem", f"{host.problem.message} ({host.problem.code})" if host.problem else ""),
        ("next", next_step(host)),
        ("heard", f"{age_text(host.heartbeat_at)} ago, {host.heartbeat_at.astimezone():%Y-%m-%d %H:%M:%S}"),
        ("zone", host.zone),
        ("type", host.virt_type),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(host.labels.items()))),
        ("taints", ", ".join(f"{key}={value}" for key, value in sorted(host.taints.items()))),
        ("VMs", f"{host.vms}{'' if host.vms_max is None else f' of {host.vms_max}'}{anew}"),
        ("vCPUs", f"{host.vcpus_used} of {host.vcpus}"),
        ("memory", used_memory_text(host)),
        ("disk", f"{host.disk_gib_used} of {host.disk_gib}G"),
    ]


def next_step(host: "HostView") -> str:
    """What can be done about a host as it is; nothing when all is well."""
    match host.state:
        case "up" if host.problem:
            return f"It gets no new VMs until that is over. {host.problem.hint}"
        case "silent":
            return (
                "Nothing on it is touched; it works again when it is heard of. If it is certainly off, say so: "
                f'leveret host fence {host.name} --proof "..."'
            )
        case "cordoned":
            return f"leveret host uncordon {host.name}"
        case "fenced" if host.clean:
            return f"It is back, and clean: leveret host uncordon {host.name}"
        case "fenced":
            return (
                "When it is back and its worker has cleaned up, which it does by itself: "
                f"leveret host uncordon {host.name}. If it never comes back: leveret host retire {host.name}"
            )
    return ""


def what_follows(host: "HostView", own: "list[VmView]") -> list[str]:
    """What fencing this host means for its VMs. `own` are those of the asker's project: only they can be named."""
    from leveret.client.cli.columns import age_text, seconds_since

    why = f" ({host.state_reason})" if host.state_reason else ""
    lines = [f"{host.name} is {host.state}{why}, and was heard of {age_text(host.heartbeat_at)} ago."]
    if host.state != "silent" and seconds_since(host.heartbeat_at) < _JUST_NOW_S:
        lines.append(paint("It does not look as if it was off.", "bold red", sys.stderr))
    if not host.vms:
        return [*lines, "No VM stands on it."]
    anew = [vm.name for vm in own if _is_made_anew(vm)]
    waiting = [vm.name for vm in own if not _is_made_anew(vm) and vm.state != "deleting"]
    lines.append(f"On it {'is' if host.vms == 1 else 'are'} {count(host.vms, 'VM')}, of all projects:")
    if host.vms_to_restart:
        lines.append(f"  {host.vms_to_restart} to be made anew elsewhere, without what was on the disk{_of_ours(anew)}")
    if left := host.vms - host.vms_to_restart:
        lines.append(f"  {left} to wait for it, in error, or to be gone if that was asked for{_of_ours(waiting)}")
    return lines


def _is_made_anew(vm: "VmView") -> bool:
    return vm.state == "building" or (vm.state in {"running", "stopped"} and vm.on_host_failure == "restart")


def _of_ours(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"; of this project {', '.join(names[:_NAMED])}{more}"
