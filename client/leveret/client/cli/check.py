"""`check`: every invariant of the installation, and what to do about those that do not hold."""

import json
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leveret.client.cli.failing import Exit
from leveret.client.cli.output import Format, Output, emit_document, paint
from leveret.client.cli.session import connect, run
from leveret.client.cli.values import count

if TYPE_CHECKING:
    from leveret.shared.checks import CheckReport, RuleView

_MARKS = {"ok": "green", "?": "magenta", "fail": "bold red"}
_INDENT = " " * 6
#: Examples of a broken rule on a terminal; `-o json` has all that there are.
_SHOWN = 5


def check(
    ctx: typer.Context,
    hosts: Annotated[
        bool, typer.Option("--hosts/--no-hosts", help="Ask the hosts what they have, too; that may take ten seconds.")
    ] = True,
    output: Output = Format.TABLE,
) -> None:
    """Check whether everything fits together.

    Ends with exit code 5 when a rule is broken. What could not be looked at is told, and is no failure.
    For administrators.
    """

    async def body() -> "CheckReport":
        async with connect(ctx) as leveret:
            return await leveret.check(hosts=hosts)

    report = run(body())
    match output:
        case Format.TABLE:
            _show(report)
        case Format.NAME:
            for rule in report.rules:
                if rule.broken:
                    print(rule.name)
        case _:
            emit_document(report.model_dump(mode="json"), output)
    if report.broken:
        raise typer.Exit(Exit.FAILED)


def _show(report: "CheckReport") -> None:
    for rule in report.rules:
        mark = "?" if rule.broken is None else "fail" if rule.broken else "ok"
        count = f" ({rule.broken})" if rule.broken else ""
        print(f"{paint(mark.ljust(4), _MARKS[mark])}  {paint(rule.name + count, 'bold') if rule.broken else rule.name}")
        if rule.broken:
            _show_broken(rule)
    for one in report.unchecked:
        print(f"{paint('?'.ljust(4), _MARKS['?'])}  {one.what} was not checked: {one.why}")
    print(paint(_summary(report), "bold", sys.stderr), file=sys.stderr)


def _show_broken(rule: "RuleView") -> None:
    _write(rule.says)
    for example in rule.examples[:_SHOWN]:
        print(f"{_INDENT}- {', '.join(f'{name} {_text(value)}' for name, value in example.items())}")
    if rule.broken and rule.broken > len(rule.examples[:_SHOWN]) and rule.examples:
        print(f"{_INDENT}- and more: {rule.broken} in all")
    _write(f"-> {rule.repair}")


def _write(text: str) -> None:
    if not sys.stdout.isatty():
        print(f"{_INDENT}{text}")
        return
    width = max(30, shutil.get_terminal_size().columns)
    print(textwrap.fill(text, width, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _summary(report: "CheckReport") -> str:
    looked_at = sum(rule.broken is not None for rule in report.rules)
    told = f"{report.broken} broken" if report.broken else "all hold" if looked_at else "none could be looked at"
    hosts = f", {count(report.hosts_asked, 'host')} asked" if report.hosts_asked else ""
    return f"{looked_at} rules checked in {report.seconds:.1f} s{hosts}: {told}."
