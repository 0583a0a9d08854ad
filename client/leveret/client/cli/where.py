"""Where a VM stands and why, as people read it."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from leveret.client.cli.values import count, duration

if TYPE_CHECKING:
    from leveret.shared.documents import Placement
    from leveret.shared.placements import PlacementView, TriedHost


def placement_lines(found: "PlacementView") -> Iterator[str]:
    """What was asked, where it stands, and what came of each host that was chosen."""
    asked = asked_text(found.placement)
    if asked:
        yield f"asked for: {asked}"
    *before, last = found.tried or (None,)
    for tried in before:
        if tried is not None:
            yield from _tried(tried)
    if last is not None:
        yield from _tried(last)
    if found.host is not None and (last is None or last.host != found.host):
        yield f"on {found.host} in zone {found.zone}"
    elif found.host is None:
        yield "on no host"


def asked_text(placement: "Placement") -> str:
    """The conditions of a placement in one line; empty when there are none."""
    said = {
        "zones": ", ".join(placement.zones),
        "with labels": _pairs(placement.require_labels),
        "without labels": _pairs(placement.forbid_labels),
        "tolerating": _pairs(placement.tolerate),
        "on hosts": ", ".join(placement.hosts),
        "group": placement.group or "",
        "strategy": placement.strategy if placement.strategy != "spread" else "",
    }
    return "; ".join(f"{name} {text}" for name, text in said.items() if text)


def _tried(tried: "TriedHost") -> Iterator[str]:
    found = ""
    if tried.considered is not None and tried.looked_at is not None:
        found = f": {tried.considered} of {count(tried.looked_at, 'host')} looked at could take it"
    took = f", found in {duration(tried.seconds)}" if tried.seconds is not None and tried.seconds >= 0.01 else ""
    yield f"{tried.at.astimezone():%H:%M:%S}  attempt {tried.attempt} on {tried.host}{found}{took}"
    if tried.refused:
        yield f"    refused: {', '.join(f'{name} {number}' for name, number in tried.refused.items())}"
    if tried.score:
        scores = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in tried.score.items())
        yield f"    chosen by {scores}"
    if tried.problem is not None:
        yield f"    {tried.problem.message} ({tried.problem.code})"


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
