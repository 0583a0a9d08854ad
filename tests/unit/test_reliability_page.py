"""docs/reliability.md shows the table of invariants as it is."""

from pathlib import Path

import pytest

from leveret.conductor.invariants import INVARIANTS

pytestmark = pytest.mark.unit

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_the_page_shows_every_invariant_in_the_order_of_the_table() -> None:
    shown = [line for line in PAGE.read_text().splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    rows = [f"| `{one.name}` | {one.place} | {one.says} | {one.repair} |" for one in INVARIANTS]
    assert shown == rows, "\n".join(rows)
