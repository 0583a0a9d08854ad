"""A short storm: a random component is killed, frozen or cut off every two seconds while clients ask, and nothing of
what they were told turns out to be untrue. `script/chaos` does the same for as long as one likes.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.__main__ import run
from chaos.storm import plan

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SEED = 20261122


def test_a_short_storm_loses_doubles_overbooks_orphans_and_leaves_unexplained_nothing(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    result = run(plan(SEED, 30, 200, guests=False, hosts=16, round_lives=12), tmp_path / "chaos")
    record_property("recovery_s", result.converged_s)
    assert result.is_good, (tmp_path / "chaos" / "report.md").read_text()
    assert sum(result.done.values()) >= 10
    assert "| **lost** | 0 |" in (tmp_path / "chaos" / "report.md").read_text()


@pytest.mark.slow
def test_a_longer_storm_over_real_guests_does_so_neither(tmp_path: Path, appliance: Path) -> None:
    result = run(plan(SEED, 180, 3000, guests=True), tmp_path / "chaos", image_dir=appliance.parent)
    assert result.is_good, (tmp_path / "chaos" / "report.md").read_text()


def test_the_command_prints_the_schedule_of_a_seed() -> None:
    command = [sys.executable, "-m", "chaos", "--seed", "1", "--minutes", "0.2", "--no-guests", "--show-schedule"]
    env = {"PYTHONPATH": "tests/support:tests"}
    said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.splitlines() == [str(fault) for fault in plan(1, 12, 10, guests=False).faults]
