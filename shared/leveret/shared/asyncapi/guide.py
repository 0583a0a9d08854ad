"""What is generated in docs/amqp.md: tables from the contract, and programs from the files that are tested."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from leveret.shared.asyncapi import words
from leveret.shared.asyncapi.document import summary_of
from leveret.shared.errors import HINTS, Code
from leveret.shared.event_types import EVENTS
from leveret.shared.examples import EVENTS as EVENT_EXAMPLES
from leveret.shared.examples import VERDICTS
from leveret.shared.messages import GROUPS, REQUESTS

_BLOCK = re.compile(r"(<!-- generated: (?P<what>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FENCES = {".mjs": "js", ".py": "python"}


def refreshed(path: Path) -> str:
    """The guide with every block between `<!-- generated: WHAT -->` and `<!-- end -->` made anew.

    WHAT is the name of a part, or of a file as seen from the folder above the guide's.
    """

    def made(block: re.Match[str]) -> str:
        part = PARTS.get(block["what"])
        content = part() if part else _program(path.resolve().parents[1] / block["what"])
        return f"{block[1]}{content}{block[3]}"

    return _BLOCK.sub(made, path.read_text(encoding="utf-8"))


def _program(path: Path) -> str:
    return f"```{_FENCES[path.suffix]}\n{path.read_text(encoding='utf-8')}```\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def requests() -> str:
    rows = (
        (f"`{name}`", f"`{model.__name__}`", f"{summary_of(model)}.") for name, model in (REQUESTS | GROUPS).items()
    )
    return _table(("type and routing key", "document", "asks"), rows)


def headers() -> str:
    every = words.HEADERS | {"dry_run": words.DRY_RUN, "if_match": words.IF_MATCH}
    return _table(("header", "says"), ((f"`{name}`", schema["description"]) for name, schema in every.items()))


def properties() -> str:
    schema = words.REQUEST_PROPERTIES
    rows = (
        (
            f"`{name}`",
            "yes" if name in schema["required"] else "no",
            (f"`{said['const']}`. " if "const" in said else "") + said.get("description", ""),
        )
        for name, said in schema["properties"].items()
    )
    return _table(("property", "required", "says"), rows)


def _key(cloud_type: str) -> str:
    name = cloud_type.removeprefix("leveret.").removesuffix(".v1")
    of_vm = name.removeprefix("vm.") if name.startswith("vm.") else None
    return name if of_vm is None else "vm.{vm_id}.rejected" if of_vm == "rejected" else "vm.{vm_id}.{state}"


def events() -> str:
    rows = ((f"`{name}`", f"`{_key(name)}`", f"{summary_of(model)}.") for name, model in EVENTS.items())
    return _table(("event", "routing key", "says"), rows)


def errors() -> str:
    rows = ((f"`{code}`", HINTS[code]) for code in Code if code in words.IN_VERDICTS)
    return _table(("code", "what to do"), rows)


def limits() -> str:
    rows = (
        (f"`{name}`", str(said.get("max", said.get("default"))), said["description"])
        for name, said in words.LIMITS.items()
    )
    return _table(("limit", "is", "of"), rows)


def _shown(document: dict[str, Any]) -> str:
    return f"```json\n{json.dumps(document, indent=2)}\n```\n"


PARTS: dict[str, Callable[[], str]] = {
    "requests": requests,
    "headers": headers,
    "properties": properties,
    "events": events,
    "errors": errors,
    "limits": limits,
    "verdict": lambda: _shown(VERDICTS[0].body),
    "event": lambda: _shown(EVENT_EXAMPLES["leveret.vm.scheduled.v1"].body),
}
