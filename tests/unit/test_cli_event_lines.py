"""Events as people read them."""

import uuid
from datetime import UTC, datetime
from typing import Any

import pytest

from leveret.client.cli.event_lines import EventLines
from leveret.shared.documents import EventView

pytestmark = pytest.mark.unit

ONE, OTHER = uuid.UUID(int=1), uuid.UUID(int=2)
WHY = "None of the 3 hosts can take this VM; refused by: memory_mib 3."
PROBLEM = {"code": "no_capacity", "message": WHY}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


def event(kind: str, *, vm: uuid.UUID | None = ONE, name: str | None = "web", **data: Any) -> EventView:
    at = datetime(2026, 11, 22, 12, tzinfo=UTC)
    return EventView(seq=1, vm_id=vm, vm_name=name, type=kind, state=None, at=at, data=data)


def labelled(vm: uuid.UUID = ONE, name: str = "web", **labels: str) -> EventView:
    return event("changed", vm=vm, name=name, verb="update", labels=labels)


def notes(*events: EventView) -> list[str]:
    lines = EventLines(with_subject=False)
    return [lines.line(one).partition(one.type)[2].strip() for one in events]


def test_a_change_of_labels_tells_what_changed() -> None:
    told = notes(
        event("accepted"),
        labelled(app="shop", tier="front"),
        labelled(OTHER, "db", app="other"),
        labelled(app="shop", tier="back", zone="a"),
        labelled(zone="a"),
        labelled(),
        labelled(OTHER, "db"),
    )
    assert told == [
        "",
        "labels: app=shop, tier=front",
        "labels: app=other",
        "tier=back, zone=a",
        "app-, tier-",
        "zone-",
        "app-",
    ]


def test_a_change_of_name_tells_both_names() -> None:
    assert notes(event("accepted"), labelled(name="front"), labelled(name="front", a="b")) == [
        "",
        "renamed from web to front; labels: none",
        "a=b",
    ]


@pytest.mark.parametrize("columns", [40, 60, 70, 80, 200])
@pytest.mark.parametrize("name", ["web", "a-name-of-a-vm-that-has-sixty-three-characters-as-many-as-it-may"])
def test_on_a_terminal_no_line_is_longer_than_it(columns: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    for one in (
        event("rejected", name=name, problem=PROBLEM),
        event("running", name=name),
        labelled(name=name, key="x" * 50),
    ):
        for lines in (EventLines(with_subject=True), EventLines(with_subject=False, indent="  ")):
            text = lines.line(one)
            assert all(len(line) <= columns for line in text.splitlines()), text
            words = WHY.split() if one.type == "rejected" else []
            assert all(word in " ".join(text.split()) for word in words)


def test_into_a_pipe_an_event_is_one_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    line = EventLines(with_subject=True).line(event("rejected", name="x" * 63, problem=PROBLEM))
    assert "x" * 63 in line
    assert line.endswith(f"{WHY} (no_capacity)")
    assert "\n" not in line
