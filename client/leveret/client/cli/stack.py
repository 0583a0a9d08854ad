"""`up`, `status`, `down`: all of Leveret on this machine."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.output import Column, Format, Output, emit_document, paint, write_table
from leveret.client.cli.progress import Steps
from leveret.client.cli.values import age, duration
from leveret.client.config import Config, config_path, read_file, save
from leveret.client.errors import ConfigError

if TYPE_CHECKING:
    from leveret.stack.layout import Layout
    from leveret.stack.up import Summary

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
        int | None, typer.Option(min=0, max=10000, metavar="N", help="Simulated hosts, in place of this machine.")
    ] = None,
    libvirt: Annotated[
        bool | None, typer.Option("--libvirt/--no-libvirt", help="Run guests on this machine. Default: yes.")
    ] = None,
    virt_type: Annotated[
        str | None, typer.Option(metavar="auto|kvm|qemu", help="How guests run; auto proves KVM by running one.")
    ] = None,
    conductors: Annotated[int | None, typer.Option(min=1, max=16, metavar="N", help="Default: 1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of the API. Default: 8420 if free.")] = None,
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
    from leveret.stack.up import up as start

    options = layout.options().changed(
        conductors=conductors,
        fake_hosts=fake_hosts,
        libvirt=libvirt,
        virt_type=virt_type,
        api_port=port,
        image_dir=str(images.absolute()) if images else None,
    )
    with Steps() as steps:
        summary = start(layout, options, steps)
        elapsed_s = steps.elapsed_s
    kept = _write_config(layout, summary)
    _summarise(layout, summary, elapsed_s, kept)


def status(state_dir: StateDir = None, output: Output = Format.TABLE) -> None:
    """Show every process: since when, whether it is ready, its log."""
    from datetime import UTC, datetime

    layout = _layout(state_dir)
    from leveret.stack.standing import standing

    found = standing(layout)
    if output is Format.TABLE:
        now = datetime.now(UTC)
        styles = {"ready": "green", "not ready": "yellow", "stopped": "red"}
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

    path = config_path(os.environ)
    ours = purge and read_file(path).get("state_dir") == str(layout.root)
    with Steps() as steps:
        stop(layout, steps, purge=purge)
    if ours:
        path.unlink(missing_ok=True)


def _layout(state_dir: Path | None) -> "Layout":
    try:
        from leveret.stack.layout import Layout
    except ImportError as error:
        raise ConfigError(
            f"this installation has the client only ({error.name} is missing): pip install 'leveret[stack]'"
        ) from error
    return Layout(state_dir)


def _write_config(layout: "Layout", summary: "Summary") -> Path | None:
    """Let `leveret` find this installation; the configuration in its way, if there is one of another's making."""
    settings = Config(summary.url, summary.token, layout.root, layout.ssh_key if layout.ssh_key.exists() else None)
    save(settings, layout.client_config)
    path = config_path(os.environ)
    kept = read_file(path)
    if kept and not kept.get("state_dir"):
        return path
    save(settings, path)
    return None


def _summarise(layout: "Layout", summary: "Summary", elapsed_s: float, kept: Path | None) -> None:
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
    if kept:
        print(f"\n{kept} is of another installation and was kept. To use this one:", file=sys.stderr)
        print(f"  export LEVERET_CONFIG={layout.client_config}", file=sys.stderr)
    image = f" --image {summary.images[0]}" if len(summary.images) > 1 else ""
    print(f"\nNext:  leveret create{image}", file=sys.stderr)


def _more(summary: "Summary") -> str:
    return f" and {len(summary.hosts) - 3} more" if len(summary.hosts) > 3 else ""
