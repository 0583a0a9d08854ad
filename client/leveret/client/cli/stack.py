"""`up`, `status`, `down`: all of Leveret on this machine."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.output import Column, Format, Output, emit_document, paint, write_table
from leveret.client.cli.progress import Steps
from leveret.client.cli.values import age, duration
from leveret.client.config import DEFAULT, Config, Context, config_path, owned_by, read_contexts, save, write_contexts
from leveret.client.errors import ConfigError

if TYPE_CHECKING:
    from leveret.stack.layout import Layout
    from leveret.stack.up import Summary

#: The context that `leveret up` makes.
LOCAL = "local"

StateDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where everything is kept. Default: LEVERET_STATE_DIR, then /var/lib/leveret for root and "
        "~/.local/state/leveret for others.",
    ),
]


def up(
    state_dir: StateDir = None,
    fake_hosts: Annotated[
        int | None,
        typer.Option(
            min=0, max=10000, metavar="N", help="Simulated hosts, in place of this machine; with --libvirt, beside it."
        ),
    ] = None,
    fake_zones: Annotated[
        int | None, typer.Option(min=1, max=100, metavar="N", help="Zones that simulated hosts are in. Default: 1.")
    ] = None,
    libvirt: Annotated[
        bool | None, typer.Option("--libvirt/--no-libvirt", help="Run guests on this machine. Default: yes.")
    ] = None,
    virt_type: Annotated[
        str | None, typer.Option(metavar="auto|kvm|qemu", help="How guests run; auto proves KVM by running one.")
    ] = None,
    conductors: Annotated[int | None, typer.Option(min=1, max=16, metavar="N", help="Default: 1.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="N", help="Of the API. Default: 8420 if free.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Guest images to register. Default: script/guest-images' own.")
    ] = None,
) -> None:
    """Start everything that is missing on this machine.

    What runs is left alone, and what is not given stays as it was the last time.
    """
    if virt_type not in {None, "auto", "kvm", "qemu"}:
        raise typer.BadParameter(f"{virt_type!r} is none of auto, kvm, qemu.")
    layout = _layout(state_dir)
    from leveret.shared import logs
    from leveret.stack.up import up as start

    logs.configure("leveret up", level="warning", style="console")

    options = layout.options().changed(
        conductors=conductors,
        fake_hosts=fake_hosts,
        fake_zones=fake_zones,
        libvirt=libvirt,
        virt_type=virt_type,
        api_port=port,
        image_dir=str(images.absolute()) if images else None,
    )
    with Steps() as steps:
        summary = start(layout, options, steps)
        elapsed_s = steps.elapsed_s
    unused = _write_config(layout, summary)
    _summarise(layout, summary, elapsed_s, unused)


def status(state_dir: StateDir = None, output: Output = Format.TABLE) -> None:
    """Show every process: since when, whether it is ready, its log."""
    from datetime import UTC, datetime

    layout = _layout(state_dir)
    from leveret.stack.standing import standing

    found = standing(layout)
    if output is Format.TABLE:
        now = datetime.now(UTC)
        styles = {"ready": "green", "not ready": "magenta", "stopped": "red"}
        write_table(
            found,
            (
                Column("PROCESS", lambda one: one.name, style=lambda _: "bold"),
                Column("STATE", lambda one: one.state, style=lambda text: styles[text]),
                Column("PID", lambda one: str(one.pid or "-"), rank=2),
                Column("UP", lambda one: age((now - one.since).total_seconds()) if one.since else "-", rank=1),
                Column("LOG", lambda one: str(one.log), rank=3),
            ),
        )
    elif output is Format.NAME:
        print("\n".join(one.name for one in found))
    else:
        emit_document(
            [
                {
                    "name": one.name,
                    "state": one.state,
                    "pid": one.pid,
                    "since": one.since.isoformat() if one.since else None,
                    "log": str(one.log),
                }
                for one in found
            ],
            output,
        )
    if any(one.state != "ready" for one in found):
        raise typer.Exit(5)


def down(
    state_dir: StateDir = None,
    purge: Annotated[bool, typer.Option("--purge", help="Delete the data too: VMs, database, keys, token.")] = False,
) -> None:
    """Stop everything on this machine, and keep the data."""
    layout = _layout(state_dir)
    from leveret.stack.down import down as stop

    with Steps() as steps:
        stop(layout, steps, purge=purge)
    if purge:
        _forget(layout)


def _layout(state_dir: Path | None) -> "Layout":
    try:
        from leveret.stack.layout import Layout
    except ImportError as error:
        raise ConfigError(
            f"this installation has the client only ({error.name} is missing): pip install 'leveret[stack]'"
        ) from error
    return Layout(state_dir)


def _write_config(layout: "Layout", summary: "Summary") -> str | None:
    """Let `leveret` find this installation: as the context in use, unless another is. That one's name, if so.

    Other contexts stay; one that `leveret up` made for another directory gives its name up to this one.
    """
    ssh_key = layout.ssh_key if layout.ssh_key.exists() else None
    save(Config(summary.url, summary.token, layout.root, ssh_key), layout.client_config, LOCAL)
    path = config_path(os.environ)
    contexts = read_contexts(path)
    current = contexts.by_name.get(contexts.current or "")
    ours = owned_by(contexts, layout.root) or _free_name(contexts.by_name)
    use = current is None or current.state_dir is not None
    made = Context(summary.url, summary.token, None, layout.root, ssh_key)
    changed = contexts.with_context(ours, made, use=use)
    if changed != contexts:
        write_contexts(changed, path)
    return None if use else ours


def _free_name(taken: Mapping[str, Context]) -> str:
    """`local`, or what `leveret up` called it for another directory; else the next that is free."""
    for name in (LOCAL, *(f"{LOCAL}-{number}" for number in range(2, 1000))):
        if name not in taken or taken[name].state_dir is not None:
            return name
    return DEFAULT


def _forget(layout: "Layout") -> None:
    """The installation is gone: its context too."""
    path = config_path(os.environ)
    contexts = read_contexts(path)
    ours = owned_by(contexts, layout.root)
    if ours is None:
        return
    left = contexts.without(ours)
    if left.by_name:
        write_contexts(left, path)
    else:
        path.unlink(missing_ok=True)


def _summarise(layout: "Layout", summary: "Summary", elapsed_s: float, unused: str | None) -> None:
    lines = [
        ("API", summary.url),
        ("state", str(layout.root)),
        ("token", str(layout.token)),
        ("hosts", ", ".join(f"{host.name} ({host.virt_type})" for host in summary.hosts[:3]) + _more(summary)),
        ("images", ", ".join(summary.images) or "none: script/guest-images builds one"),
    ]
    verb = "is up" if summary.started else "was up already"
    print(f"\n{paint(f'Leveret {verb}', 'bold green', sys.stderr)} ({duration(elapsed_s)})", file=sys.stderr)
    for name, value in lines:
        print(f"  {paint(name.ljust(6), 'dim', sys.stderr)}  {value}", file=sys.stderr)
    if unused:
        print("\nAnother context is in use, and stays so. To use this installation:", file=sys.stderr)
        print(f"  leveret context use {unused}", file=sys.stderr)
    image = f" --image {summary.images[0]}" if len(summary.images) > 1 else ""
    print(f"\nNext:  leveret create{image}", file=sys.stderr)


def _more(summary: "Summary") -> str:
    return f" and {len(summary.hosts) - 3} more" if len(summary.hosts) > 3 else ""
