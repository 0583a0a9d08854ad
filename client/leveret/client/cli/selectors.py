"""Label selectors as Kubernetes writes them: `app=web,tier!=db,zone in (a,b),canary,!old`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import typer

_KEY = r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?"
_VALUE = r"[A-Za-z0-9._-]{0,63}"
_EQUALITY = re.compile(rf"({_KEY})\s*(=|==|!=)\s*({_VALUE})")
_SET = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)")
_EXISTENCE = re.compile(rf"(!?)\s*({_KEY})")
_COMMA = re.compile(r",(?![^(]*\))")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One part: the label's value is among `values`, or it is not. `None` stands for a label that is not there."""

    key: str
    values: frozenset[str | None] | None
    wanted: bool

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        if self.values is None:
            return (value is not None) is self.wanted
        return (value in self.values) is self.wanted


@dataclass(frozen=True, slots=True)
class Selector:
    """All of its requirements hold."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(one.matches(labels) for one in self.requirements)

    @property
    def equalities(self) -> dict[str, str]:
        """What the API can look for itself: the rest is sifted here."""
        found: dict[str, str] = {}
        for one in self.requirements:
            if one.wanted and one.values is not None and len(one.values) == 1:
                found.setdefault(one.key, str(next(iter(one.values))))
        return found


def selector(texts: list[str]) -> Selector:
    """What was given with `-l`, as often as it was given. Raises a usage error that shows the part that is wrong."""
    parts = [part.strip() for text in texts for part in _COMMA.split(text)]
    return Selector(tuple(_requirement(part) for part in parts if part))


def _requirement(part: str) -> Requirement:
    if match := _EQUALITY.fullmatch(part):
        key, operator, value = match.groups()
        return Requirement(key, frozenset({value}), operator != "!=")
    if match := _SET.fullmatch(part):
        key, operator, inner = match.groups()
        values = [value.strip() for value in inner.split(",")]
        if all(re.fullmatch(_VALUE, value) for value in values):
            return Requirement(key, frozenset(values), operator == "in")
    if match := _EXISTENCE.fullmatch(part):
        return Requirement(match[2], None, not match[1])
    raise typer.BadParameter(
        f"{part!r} is no selector: write for example app=web, app!=web, 'app in (web, db)', app or '!app'.",
        param_hint="--selector",
    )
