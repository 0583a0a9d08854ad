"""`doctor`: every dependency, and what to do about it."""

import os
import shutil
import stat
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from leveret.client import config as configs
from leveret.client.cli.failing import Exit
from leveret.client.cli.output import Format, Output, emit_document, paint
from leveret.client.cli.session import config, flags
from leveret.client.errors import ConfigError
from leveret.client.finding import Finding, fail, ok, warn

_MARKS = {"ok": "green", "warn": "magenta", "fail": "bold red"}


def doctor(
    ctx: typer.Context,
    machine: Annotated[
        bool | None,
        typer.Option(
            "--machine/--no-machine",
            help="Look at what `leveret up` needs on this machine, too. Default: where it has run, or no API is known.",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of the installation on this machine; as for `leveret up`.")
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Check every dependency, and say what to do about it.

    Ends with exit code 5 when something fails; a warning is no failure.
    """
    found: list[Finding] = []
    show = _shower(output)
    for finding in _findings(ctx, machine, state_dir):
        found.append(finding)
        show(finding)
    if output in {Format.JSON, Format.YAML}:
        emit_document([one.document() for one in found], output)
    failed = sum(one.level == "fail" for one in found)
    warned = sum(one.level == "warn" for one in found)
    if output is Format.TABLE:
        told = f"{failed} failed, {warned} warned about" if failed or warned else "all is well"
        print(paint(f"{len(found)} checks: {told}.", "bold", sys.stderr), file=sys.stderr)
    if failed:
        raise typer.Exit(Exit.FAILED)


def _findings(ctx: typer.Context, machine: bool | None, state_dir: Path | None) -> Iterator[Finding]:
    yield from _versions()
    yield from config_file(configs.config_path(os.environ))
    try:
        settings = config(ctx)
    except ConfigError as error:
        settings = None
        # A machine on which `leveret up` never ran has no configuration yet: that is no defect of it.
        named = flags(ctx).context or flags(ctx).url or os.environ.get("LEVERET_URL")
        advice = "run `leveret up`, or `leveret context add NAME --url URL`."
        yield fail("settings", str(error), "") if named else warn("settings", str(error), advice)
    if settings is not None:
        from leveret.client.cli.reaching import api_findings

        used = f"context {settings.context}" if settings.context else "flags and environment"
        yield ok("settings", f"{settings.url}, from {used}")
        yield from api_findings(settings)
    local = settings is not None and settings.state_dir is not None
    yield from _machine(machine, local or settings is None, state_dir or (settings.state_dir if settings else None))


def _versions() -> Iterator[Finding]:
    from importlib.metadata import version
    from platform import python_version

    yield ok("command", f"leveret {version('leveret')}, Python {python_version()}")


def config_file(path: Path) -> Iterator[Finding]:
    """Whether the file can be read, and by nobody else."""
    try:
        contexts = configs.read_contexts(path)
    except ConfigError as error:
        yield fail("configuration", str(error), f"correct or remove {path}.")
        return
    if not path.exists():
        yield ok("configuration", f"{path} is not there; nothing needs it")
        return
    files = [path] + [path.parent / one.token_file for one in contexts.by_name.values() if one.token_file]
    for file in files:
        try:
            mode = stat.S_IMODE(file.stat().st_mode)
        except OSError as error:
            yield fail("configuration", f"cannot read {file}: {error.strerror}", "add its context again.")
            continue
        if mode & 0o077:
            yield warn("configuration", f"{file} holds a token, and others can read it.", f"chmod 600 {file}")
        elif file == path:
            names = ", ".join(contexts.by_name) or "none"
            yield ok("configuration", f"{path}, contexts: {names}")


def _machine(wanted: bool | None, likely: bool, state_dir: Path | None) -> Iterator[Finding]:
    """What `leveret up` needs here, when this machine is meant for it."""
    if wanted is False:
        return
    try:
        from leveret.stack import health
        from leveret.stack.layout import Layout
    except ImportError as error:
        if wanted:
            yield fail(
                "stack", f"only the client is installed ({error.name} is missing).", "pip install 'leveret[stack]'"
            )
        return
    layout = Layout(state_dir)
    if wanted or layout.exists() or likely:
        yield from health.findings(layout)


def _shower(form: Format) -> Callable[[Finding], None]:
    """How a finding is shown the moment it is there."""
    if form is Format.NAME:
        return lambda one: print(one.name, flush=True) if one.level != "ok" else None
    return _show if form is Format.TABLE else lambda _: None


def _show(one: Finding) -> None:
    text = one.text + (f" -> {one.advice}" if one.advice else "")
    lead = f"{paint(one.level.ljust(4), _MARKS[one.level])}  {paint(one.name.ljust(13), 'bold')}  "
    if not sys.stdout.isatty():
        print(f"{lead}{text}", flush=True)
        return
    width = max(30, shutil.get_terminal_size().columns - 21)
    lines = textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False) or [""]
    print(f"\n{' ' * 21}".join([f"{lead}{lines[0]}", *lines[1:]]), flush=True)
