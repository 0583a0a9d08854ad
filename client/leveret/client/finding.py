"""What `doctor` finds: one fact about one dependency, how bad it is, and what to do."""

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice` is empty when all is well."""

    name: str
    level: Level
    text: str
    advice: str = ""

    def document(self) -> dict[str, str]:
        return asdict(self)


def ok(name: str, text: str) -> Finding:
    return Finding(name, "ok", text)


def warn(name: str, text: str, advice: str) -> Finding:
    return Finding(name, "warn", text, advice)


def fail(name: str, text: str, advice: str) -> Finding:
    return Finding(name, "fail", text, advice)
