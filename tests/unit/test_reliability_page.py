"""docs/reliability.md shows the table of invariants as it is."""

import re
from pathlib import Path

import pytest

from leveret.conductor.invariants import INVARIANTS

pytestmark = pytest.mark.unit

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_the_page_shows_every_invariant_in_the_order_of_the_table() -> None:
    shown = [line for line in PAGE.read_text().splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    rows = [f"| `{one.name}` | {one.place} | {one.says} | {one.repair} |" for one in INVARIANTS]
    assert shown == rows, "\n".join(rows)


def test_the_fault_table_is_whole_and_names_every_fault_test() -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| (`test_.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 24))
    named = {name for _, tests in rows for name in re.findall(r"`(test_\w+\.py)`", tests)}
    there = {file.name: file.parent.name for file in (PAGE.parents[1] / "tests").rglob("test_*.py")}
    assert named <= there.keys()
    elsewhere = {"test_chaos.py"}  # which does all of it at once
    assert {name for name, folder in there.items() if folder == "fault"} == {
        name for name in named if there[name] == "fault"
    } | elsewhere
