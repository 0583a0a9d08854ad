"""How data reaches standard output: as a table, JSON, YAML or bare names. Progress and errors never come this way."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


Output = Annotated[Format, typer.Option("-o", "--output", help="table, json, yaml or name.", metavar="FORMAT")]


@dataclass(frozen=True, slots=True)
class Column:
    """`rank` says how soon a column is left out of a terminal that is too narrow: the highest first, 0 never."""

    title: str
    text: Callable[[Any], str]
    rank: int = 0
    style: Callable[[str], str] | None = None


#: Only those that can be read on a light and on a dark ground: no yellow, no cyan, nothing bright.
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "blue": "34", "magenta": "35"}


def colourful(stream: TextIO) -> bool:
    """Whether to use colour: NO_COLOR and FORCE_COLOR decide (no-color.org), then the terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, stream: TextIO | None = None) -> str:
    if not style or not colourful(stream or sys.stdout):
        return text
    return f"\x1b[{';'.join(_CODES[name] for name in style.split())}m{text}\x1b[0m"


def emit(items: Sequence["BaseModel"], columns: Sequence[Column], form: Format) -> None:
    """Many things. An empty table has its titles all the same, so that scripts see the same shape."""
    if form is Format.TABLE:
        write_table(items, columns)
    elif form is Format.NAME:
        for item in items:
            print(getattr(item, "name", None) or getattr(item, "id", ""))
    else:
        emit_document([item.model_dump(mode="json") for item in items], form)


def emit_document(document: Any, form: Format) -> None:
    """One thing, or anything that is JSON already."""
    if form is Format.YAML:
        sys.stdout.write("\n".join(yaml_lines(document)) + "\n")
    else:
        print(json.dumps(document, indent=2, ensure_ascii=False))


def write_table(items: Iterable[Any], columns: Sequence[Column]) -> None:
    """Columns two spaces apart. Into a pipe everything is written; on a terminal a line is one line."""
    rows = [[column.text(item) for column in columns] for item in items]
    widths = [max([len(column.title), *(len(row[i]) for row in rows)]) for i, column in enumerate(columns)]
    kept = _fitting(columns, widths) if sys.stdout.isatty() else list(range(len(columns)))
    print(paint("  ".join(columns[i].title.ljust(widths[i]) for i in kept).rstrip(), "bold"))
    for row in rows:
        cells = []
        for i in kept:
            style = columns[i].style
            padded = row[i].ljust(widths[i]) if i != kept[-1] else row[i]
            cells.append(paint(padded, style(row[i]) if style else ""))
        print("  ".join(cells).rstrip())


def _fitting(columns: Sequence[Column], widths: Sequence[int]) -> list[int]:
    room = shutil.get_terminal_size().columns
    kept = list(range(len(columns)))
    while sum(widths[i] + 2 for i in kept) - 2 > room:
        droppable = [i for i in kept if columns[i].rank]
        if not droppable:
            break
        kept.remove(max(droppable, key=lambda i: columns[i].rank))
    return kept


def write_facts(facts: Iterable[tuple[str, str]]) -> None:
    """One thing as aligned `name  value` lines; facts without a value are left out."""
    shown = [(name, value) for name, value in facts if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        first, *more = value.splitlines()
        print(f"{paint(name.ljust(width), 'dim')}  {first}")
        for line in more:
            print(f"{' ' * width}  {line}")


_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_NOT_PLAIN = frozenset("y n yes no on off true false null none nan inf".split())


def yaml_lines(value: Any, indent: int = 0) -> Iterable[str]:
    """The lines of a YAML 1.2 document for anything that is JSON. A quoted string of JSON is one of YAML, too."""
    pad = "  " * indent
    match value:
        case dict() if value:
            for key, item in value.items():
                if isinstance(item, dict | list) and item:
                    yield f"{pad}{_scalar(key)}:"
                    yield from yaml_lines(item, indent + 1)
                else:
                    yield f"{pad}{_scalar(key)}: {_scalar(item)}"
        case list() if value:
            for item in value:
                first, *more = yaml_lines(item, indent + 1)
                yield f"{pad}- {first.lstrip()}"
                yield from more
        case _:
            yield f"{pad}{_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_PLAIN:
        return value
    return json.dumps(value, ensure_ascii=False)
