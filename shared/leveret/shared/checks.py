"""A check of the whole installation: what is asked, and the report that comes of it."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictBool

from leveret.shared.documents import Document

#: Examples of what breaks a rule that a report shows; it always counts all.
EXAMPLES_MAX = 20


class RunCheck(Document):
    """Evaluate every invariant now. `hosts`: ask the hosts what they have, too, which takes some seconds."""

    hosts: StrictBool = True


class _Told(BaseModel):
    """Readers ignore what they do not know, so that versions may differ side by side."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RuleView(_Told):
    """One invariant. `broken` counts what breaks it; null when it could not be looked at."""

    name: str
    says: str
    broken: int | None
    examples: tuple[dict[str, Any], ...] = ()
    repair: str


class UncheckedView(_Told):
    """A part of the installation that could not be looked at, and why. That is no violation."""

    what: str
    why: str


class CheckReport(_Told):
    """What a check found. `broken` counts the rules that are broken, `hosts_asked` the hosts that answered."""

    at: datetime
    seconds: float
    broken: int
    hosts_asked: int
    rules: tuple[RuleView, ...]
    unchecked: tuple[UncheckedView, ...] = ()
