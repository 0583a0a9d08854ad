"""What an invariant is, and what comes of looking at one."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from leveret.shared.checks import EXAMPLES_MAX


class Place(StrEnum):
    """Where an invariant is looked at, which decides how often: see `leveret.conductor.checking`."""

    ROWS = "rows"
    """In Postgres, from tables that are as large as the installation."""
    LOG = "log"
    """In Postgres, from the whole event log."""
    BROKER = "broker"
    HOSTS = "hosts"
    """In what the hosts' own hypervisors and pools say, compared with the rows."""


@dataclass(frozen=True, slots=True)
class Invariant:
    """`query` returns the rows that break a rule of the database; its columns are ids, never secrets.

    `name` never changes: alerts are written for it. `repair` says what an operator does, or what happens by itself.
    """

    name: str
    place: Place
    says: str
    repair: str
    query: str | None = None


@dataclass(slots=True)
class Broken:
    """What breaks one rule: all are counted, the first few are kept."""

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **example: Any) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(example)


@dataclass(slots=True)
class Findings:
    """What a look at some places found: rules that were looked at, and places that could not be."""

    looked_at: dict[str, Broken] = field(default_factory=dict)
    unchecked: list[tuple[str, str]] = field(default_factory=list)
    hosts_asked: int = 0

    def merge(self, other: "Findings") -> None:
        self.looked_at.update(other.looked_at)
        self.unchecked += other.unchecked
        self.hosts_asked += other.hosts_asked
