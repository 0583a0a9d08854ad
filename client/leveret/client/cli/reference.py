"""docs/cli.md: every command with its arguments and options, made from the command itself.

python -m leveret.client.cli.reference docs/cli.md
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from leveret.client.cli import app

_HEAD = """\
# The command line

Made by `python -m leveret.client.cli.reference docs/cli.md`; a test holds it to the command.

`leveret` talks to one API at a time. Which one, and with which token, is said by, in this order:

1. the flags `--url`, `--token-file` and `--context`, before the command's name;
2. the environment: `LEVERET_URL`, `LEVERET_TOKEN`, `LEVERET_CONTEXT`;
3. the configuration file, `~/.config/leveret/config.toml` or what `LEVERET_CONFIG` names. `leveret context` keeps it.

A token from the file goes to the url of its own context and to no other. Tokens are never taken from the command line:
give them in a file, on standard input, or in the environment.

Data goes to standard output, progress and errors to standard error. `-o json` and `-o yaml` print the API's documents,
`-o name` prints names alone. Colour is used on terminals; `NO_COLOR` and `TERM=dumb` switch it off. `LEVERET_DEBUG=1`
shows where an unexpected error happened.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | unexpected, or a question was answered with no |
| 2 | usage: what was asked cannot be meant, there is no configuration, or the token is refused or may not do this |
| 3 | not found |
| 4 | conflict with how things are; for `apply`, something that cannot be changed |
| 5 | failed: a VM is in error, no host has room, or `doctor`, `check` or `status` found something wrong |
| 6 | time-out; the VM is kept, and goes on |
| 7 | the API cannot be reached, or asks to come again later |
| 130 | interrupted by Ctrl-C; what was accepted goes on |
"""

#: What stands for a value that has no better name.
_TYPE = re.compile(r" <[a-z\[\] ]+>")


def markdown() -> str:
    """The page, whatever the width of the terminal."""
    root = typer.main.get_command(app.build())
    context = typer.Context(root, info_name="leveret")
    lines = [_HEAD, "## Options before the command", "", *_parameters(root, context), ""]
    for title, commands in app.SECTIONS.items():
        lines += [f"## {title}", ""]
        for name in commands:
            command = root.get_command(context, name)  # type: ignore[attr-defined]
            lines += _command(command, f"leveret {name}", context)
    return "\n".join(lines).rstrip() + "\n"


def _command(command: Any, name: str, above: Any) -> Iterator[str]:
    context = typer.Context(command, info_name=name, parent=None)
    yield f"### {name}"
    yield ""
    subcommands = getattr(command, "commands", {})
    if subcommands:
        yield _prose(command)
        yield ""
        for part, subcommand in subcommands.items():
            yield from _command(subcommand, f"{name} {part}", above)
        return
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield f"```\n{usage}\n```"
    yield ""
    yield _prose(command)
    yield ""
    rows = list(_parameters(command, context))
    if rows:
        yield from rows
        yield ""


def _prose(command: Any) -> str:
    return "\n".join(line.strip() for line in (command.help or "").strip().splitlines())


def _parameters(command: Any, context: Any) -> Iterator[str]:
    shown = [one for one in command.get_params(context) if one.name != "help"]
    rows = [record for one in shown if (record := one.get_help_record(context)) is not None]
    if rows:
        yield "| | |"
        yield "|---|---|"
    for names, told in rows:
        yield f"| `{_cell(_TYPE.sub('', names))}` | {_cell(told)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
