"""What a VM's events say about where the time went: a pure function over them."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from leveret.shared.documents import EventView

_STEP_NAMES = {"config_drive": "config drive"}


@dataclass(frozen=True, slots=True)
class Span:
    """One part of the time. `starts_s` counts from the request; `note` says where or why."""

    name: str
    starts_s: float
    seconds: float
    note: str = ""
    failed: bool = False

    @property
    def ends_s(self) -> float:
        return self.starts_s + self.seconds


def timeline(events: Iterable[EventView]) -> tuple[Span, ...]:
    """From the request to the guest being ready, or to the first thing that ended it. Empty without an `accepted`.

    Events carry the database's clock, `requested_at` the client's or the API's, and steps the host's own durations:
    steps are drawn one after the other from the moment of scheduling, and what remains until the report is its own
    span. A clock that is behind makes a span of 0, never a negative one.
    """
    maker: _Maker | None = None
    for event in events:
        if event.type == "accepted" and maker is None:
            maker = _Maker(event)
        elif maker is not None and not maker.add(event):
            break
    return tuple(maker.spans) if maker else ()


class _Maker:
    def __init__(self, accepted: EventView) -> None:
        at = accepted.at.timestamp()
        requested = accepted.data.get("requested_at")
        # Another machine's clock may be ahead: a VM is not accepted before it was requested.
        self._zero = min(at, datetime.fromisoformat(requested).timestamp()) if requested else at
        self._now_s = 0.0
        self._steps: list[dict[str, Any]] = []
        self._host = ""
        self.spans: list[Span] = []
        self._until("accepted", accepted)

    def add(self, event: EventView) -> bool:
        """Take in one event; False when the story of the creation ends with it."""
        if event.data.get("steps"):
            self._steps = list(event.data["steps"])
        match event.type:
            case "scheduled":
                self._host = str(event.data.get("host") or "")
                self._steps = []
                self._until("scheduled", event, note=self._host and f"on {self._host}")
            case "running":
                self._draw_steps(event)
                self._until("running", event, note="start reported")
            case "guest_ready":
                self._until("guest ready", event, note="the guest booted")
                return False
            case "build_failed":
                self._draw_steps(event)
                self._until("build failed", event, note=_reason(event), failed=True)
            case "error":
                self._draw_steps(event)
                self._until("error", event, note=_reason(event), failed=True)
                return False
            case "stopped" | "changed" | "deleting" | "deleted":
                self._draw_steps(event)
                self._until(event.type, event, note=str(event.data.get("verb") or ""))
                return False
        return True

    def _until(self, name: str, event: EventView, *, note: str = "", failed: bool = False) -> None:
        ends_s = max(self._now_s, event.at.timestamp() - self._zero)
        self.spans.append(Span(name, self._now_s, ends_s - self._now_s, note, failed))
        self._now_s = ends_s

    def _draw_steps(self, event: EventView) -> None:
        ends_s = max(self._now_s, event.at.timestamp() - self._zero)
        for step in self._steps:
            seconds = max(0.0, float(step["seconds"]))
            seconds = min(seconds, max(0.0, ends_s - self._now_s))
            name = str(step["step"])
            self.spans.append(Span(_STEP_NAMES.get(name, name), self._now_s, seconds))
            self._now_s += seconds
        self._steps = []


def _reason(event: EventView) -> str:
    problem = event.data.get("problem") or {}
    return str(problem.get("code") or "")
