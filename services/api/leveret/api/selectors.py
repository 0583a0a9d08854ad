"""Label selectors, as Kubernetes has them: `app=web, env!=prod, tier in (a, b), !legacy`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from leveret.shared.errors import Code, LeveretError, fail

REQUIREMENTS_MAX = 32
FORMS = "key=value, key!=value, key, !key, key in (a, b) or key notin (a, b)"

# Nothing here gives back what it has taken (the `+` after a quantifier), so that no text takes long to refuse.
_KEY = r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?"
_VALUE = r"[A-Za-z0-9._-]{0,63}+"
_VALUES = rf"\(\s*+(?P<values>{_VALUE}(?:\s*+,\s*+{_VALUE})*+)\s*+\)"
#: One requirement, with the comma that follows it or the end.
_REQUIREMENT = re.compile(
    rf"\s*+(?P<absent>!)?\s*+(?P<key>{_KEY})\s*+"
    rf"(?:(?P<equals>==|=|!=)\s*+(?P<value>{_VALUE})\s*+|(?<=\s)(?P<among>in|notin)\s*+{_VALUES}\s*+)?(?:,|\Z)"
)

_PLAIN_KEY = r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?"
_PLAIN_VALUE = r"[A-Za-z0-9._-]{0,63}"
_PLAIN = (
    rf" *(! *{_PLAIN_KEY}|{_PLAIN_KEY}( *(=|==|!=) *{_PLAIN_VALUE})?"
    rf"|{_PLAIN_KEY} +(in|notin) *\( *{_PLAIN_VALUE}( *, *{_PLAIN_VALUE})* *\)) *"
)
#: The same for /openapi.json, in the regular expressions that JSON Schema knows.
PATTERN = rf"^{_PLAIN}(,{_PLAIN})*$"


@dataclass(frozen=True, slots=True)
class Requirement:
    """A label that must be there, with one of these values if any are given; or, when not `wanted`, must not.

    So `key!=value` and `key notin (...)` are true of what has no such label at all, as they are in Kubernetes.
    """

    key: str
    among: tuple[str, ...] | None
    wanted: bool

    def row(self) -> dict[str, object]:
        """As the list query reads it."""
        return {"key": self.key, "among": self.among, "wanted": self.wanted}


def parse(selectors: Sequence[str]) -> tuple[Requirement, ...]:
    """Every requirement of these selectors; all of them must be met.

    Raises LeveretError `invalid_request`, which says where a selector cannot be read and never repeats it.
    """
    requirements = [requirement for selector in selectors for requirement in _parse(selector)]
    if len(requirements) > REQUIREMENTS_MAX:
        raise _invalid(f"give at most {REQUIREMENTS_MAX} requirements")
    return tuple(requirements)


def _parse(selector: str) -> list[Requirement]:
    requirements: list[Requirement] = []
    at = 0
    while True:
        match = _REQUIREMENT.match(selector, at)
        if match is None or (match["absent"] and (match["equals"] or match["among"])):
            raise _invalid(f"cannot be read from character {at + 1} on; write {FORMS}")
        requirements.append(_requirement(match))
        at = match.end()
        if not match[0].endswith(","):
            return requirements


def _requirement(match: re.Match[str]) -> Requirement:
    key = match["key"]
    if match["equals"]:
        return Requirement(key, (match["value"],), match["equals"] != "!=")
    if match["among"]:
        values = tuple(value.strip() for value in match["values"].split(","))
        return Requirement(key, values, match["among"] == "in")
    return Requirement(key, None, not match["absent"])


def _invalid(message: str) -> LeveretError:
    errors = [{"field": "label", "message": message}]
    return fail(Code.INVALID_REQUEST, "The parameters are not valid.", errors=errors)
