"""Events in, spans out."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from leveret.client.timeline import Span, timeline
from leveret.shared.documents import EventView
from leveret.shared.lifecycle import State

pytestmark = pytest.mark.unit

ZERO = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)


def event(kind: str, at_s: float, **data: Any) -> EventView:
    return EventView(
        seq=1,
        vm_id=UUID(int=1),
        vm_name="web",
        type=kind,
        state=State.BUILDING,
        at=ZERO + timedelta(seconds=at_s),
        data=data,
    )


def accepted(at_s: float = 0.01, requested_s: float = 0.0) -> EventView:
    return event("accepted", at_s, requested_at=(ZERO + timedelta(seconds=requested_s)).isoformat())


STEPS = [{"step": "image", "seconds": 0.2}, {"step": "config_drive", "seconds": 0.1}]


def shape(spans: tuple[Span, ...]) -> list[tuple[str, float, float]]:
    return [(span.name, round(span.starts_s, 6), round(span.seconds, 6)) for span in spans]


def test_a_whole_life_is_drawn_from_the_request_to_the_ready_guest() -> None:
    spans = timeline(
        [
            accepted(),
            event("scheduled", 0.02, host="host-1"),
            event("progress", 0.1, step="config_drive", steps=STEPS[:1]),
            event("running", 0.4, steps=STEPS),
            event("guest_ready", 7.4),
            event("changed", 9.0, verb="stop"),
        ]
    )
    assert shape(spans) == [
        ("accepted", 0.0, 0.01),
        ("scheduled", 0.01, 0.01),
        ("image", 0.02, 0.2),
        ("config drive", 0.22, 0.1),
        ("running", 0.32, 0.08),
        ("guest ready", 0.4, 7.0),
    ]
    assert spans[1].note == "on host-1"


def test_each_attempt_has_its_own_steps() -> None:
    failure = {"code": "disk_full", "message": "No space."}
    spans = timeline(
        [
            accepted(),
            event("scheduled", 0.02, host="host-1"),
            event("progress", 0.1, steps=STEPS[:1]),
            event("build_failed", 0.5, problem=failure),
            event("scheduled", 0.6, host="host-2"),
            event("running", 1.0, steps=STEPS[:1]),
        ]
    )
    names = [span.name for span in spans]
    assert names == ["accepted", "scheduled", "image", "build failed", "scheduled", "image", "running"]
    assert spans[3].failed
    assert spans[3].note == "disk_full"


def test_the_spans_lie_end_to_end_and_none_is_negative_whatever_the_clocks_say() -> None:
    spans = timeline(
        [
            accepted(at_s=0.0, requested_s=5.0),  # the client's clock is ahead
            event("scheduled", -1.0, host="host-1"),  # another conductor's row came a little earlier
            event("running", 0.1, steps=[{"step": "image", "seconds": 3.0}]),  # the host's clock runs faster
        ]
    )
    assert all(span.seconds >= 0 for span in spans)
    for before, after in itertools.pairwise(spans):
        assert after.starts_s == pytest.approx(before.ends_s)
    assert spans[-1].ends_s == pytest.approx(0.1)


def test_an_error_ends_the_story() -> None:
    spans = timeline([accepted(), event("error", 2.0, problem={"code": "no_capacity"}), event("deleted", 9.0)])
    assert [span.name for span in spans] == ["accepted", "error"]
    assert spans[-1].failed


def test_events_that_begin_in_the_middle_give_no_timeline() -> None:
    assert timeline([event("running", 1.0)]) == ()
