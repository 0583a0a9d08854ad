"""What every client asked for and was told, in the order in which it happened.

Every attempt is two entries, as Jepsen writes them: `invoke`, then `ok`, `fail` (surely not carried out) or `unknown`
(no answer, or one that says nothing: it is tried again with the same ids). A request is all attempts under one id.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO


class Told(StrEnum):
    """What an entry says."""

    INVOKE = "invoke"
    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"
    NEMESIS = "nemesis"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. `at_s` counts from the storm's beginning, by the monotonic clock; `call` is the number of the attempt.

    `verdict`: `accepted` (judged and committed), `queued` (REST: 202 without a verdict) or `confirmed` (AMQP: the
    broker's confirm, and no verdict was asked for). `vm_id` is the VM that was asked about, or, with `ok`, the one that
    the answer names.
    """

    at_s: float
    told: Told
    call: int = 0
    project: str = ""
    request_id: str = ""
    vm_id: str = ""
    op: str = ""
    via: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""
    code: str = ""
    note: str = ""

    def line(self) -> str:
        return json.dumps({key: value for key, value in asdict(self).items() if value not in ("", {}, 0)})

    @classmethod
    def of(cls, line: str) -> "Entry":
        fields = json.loads(line)
        return cls(**{"at_s": 0.0, **fields, "told": Told(fields["told"])})


class History:
    """Grows while the storm lasts; every entry is written down at once."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.entries: list[Entry] = []
        self._file = file
        self._calls = 0

    def call(self) -> int:
        """A number for another attempt."""
        self._calls += 1
        return self._calls

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        if self._file is not None:
            self._file.write(entry.line() + "\n")


def read(path: Path) -> list[Entry]:
    with path.open() as file:
        return [Entry.of(line) for line in file]


@dataclass(slots=True)
class Request:
    """All attempts under one id. `settled_at` is when it was first known to be carried out; infinite if it never was.

    `named` are the VMs that answers named.
    """

    project: str
    request_id: str
    vm_id: str
    op: str
    args: dict[str, Any]
    invoked_at: float
    settled_at: float = math.inf
    attempts: int = 0
    is_accepted: bool = False
    is_confirmed: bool = False
    refused: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)

    @property
    def may_happen(self) -> bool:
        """It was carried out, or may have been, or may yet be."""
        return self.is_accepted or not self.refused

    @property
    def outcome(self) -> str:
        """A refusal is the last word on what was only queued."""
        if self.is_accepted:
            return "accepted"
        if self.refused:
            return "refused"
        return "confirmed" if self.is_confirmed else "unknown"

    def take(self, entry: Entry) -> None:
        match entry.told:
            case Told.INVOKE:
                self.attempts += 1
            case Told.OK:
                self.is_confirmed = True
                self.named.add(entry.vm_id)
                if entry.verdict == "accepted" and not self.is_accepted:
                    self.is_accepted = True
                    self.settled_at = entry.at_s
            case Told.FAIL:
                self.refused.append(entry.code)


def requests(entries: Iterable[Entry]) -> list[Request]:
    """The requests of a history, in the order in which they were first made."""
    found: dict[tuple[str, str], Request] = {}
    for entry in entries:
        if entry.told is Told.NEMESIS:
            continue
        key = (entry.project, entry.request_id)
        if key not in found:
            found[key] = Request(
                entry.project, entry.request_id, entry.vm_id, entry.op, entry.args, invoked_at=entry.at_s
            )
        found[key].take(entry)
    return list(found.values())


def by_vm(asked: Sequence[Request]) -> dict[str, list[Request]]:
    grouped: dict[str, list[Request]] = {}
    for request in asked:
        grouped.setdefault(request.vm_id, []).append(request)
    return grouped


def last_writers(writes: Sequence[Request]) -> Iterator[Request]:
    """Those that may have been carried out last: no other that surely was began after they were over."""
    sure = [write.invoked_at for write in writes if write.is_accepted]
    latest = max(sure, default=-math.inf)
    for write in writes:
        if write.may_happen and write.settled_at >= latest:
            yield write
