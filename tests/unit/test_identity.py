"""Who a host is, through kills, copies and lost files."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leveret.compute.identity import EPOCH_FILE, ID_FILE, IdentityError, take_identity

pytestmark = pytest.mark.unit


def taken(state_dir: Path) -> tuple[str, int]:
    """The identity of one start of a worker."""
    held = take_identity(state_dir)
    held.release()
    return str(held.host_id), held.epoch


def test_the_id_stays_and_the_epoch_grows_with_every_start(tmp_path: Path) -> None:
    host_id, epoch = taken(tmp_path / "state")
    assert epoch == 1
    assert [taken(tmp_path / "state") for _ in range(3)] == [(host_id, 2), (host_id, 3), (host_id, 4)]


def test_two_hosts_are_two_hosts_and_simulated_ones_are_the_same_at_every_start(tmp_path: Path) -> None:
    first, second = take_identity(tmp_path / "a"), take_identity(tmp_path / "b")
    assert first.host_id != second.host_id
    hosts = [first.of_simulated(index) for index in range(1000)]
    assert len(set(hosts)) == 1000
    first.release()
    again = take_identity(tmp_path / "a")
    assert [again.of_simulated(index) for index in range(1000)] == hosts
    again.release()
    second.release()


def test_an_identity_is_held_by_one_process_and_free_when_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from leveret.compute.identity import take_identity\n"
        "held = take_identity(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(IdentityError, match="Another worker"):
            take_identity(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    assert taken(tmp_path)[1] == 2, "the start that was refused used up no epoch"


@pytest.mark.parametrize("killed_at", range(1, 5))
def test_killed_while_the_files_are_written_the_next_start_has_one_id_and_a_newer_epoch(
    tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = taken(tmp_path) if killed_at > 2 else None
    steps = 0

    def killed(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == (killed_at - 1) % 2 + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        take_identity(tmp_path)
    monkeypatch.undo()
    host_id, epoch = taken(tmp_path)
    assert taken(tmp_path)[0] == host_id
    if known is not None:
        assert host_id == known[0]
        assert epoch > known[1]


def test_an_id_file_that_holds_no_id_is_never_replaced(tmp_path: Path) -> None:
    taken(tmp_path)
    (tmp_path / ID_FILE).write_text("garbage\n")
    with pytest.raises(IdentityError, match="holds no host id"):
        take_identity(tmp_path)
    assert (tmp_path / ID_FILE).read_text() == "garbage\n"


@pytest.mark.parametrize("left", [None, "", "garbage"])
def test_an_epoch_that_was_lost_is_followed_by_a_greater_one(tmp_path: Path, left: str | None) -> None:
    host_id, _ = taken(tmp_path)
    (tmp_path / EPOCH_FILE).unlink()
    if left is not None:
        (tmp_path / EPOCH_FILE).write_text(left)
    again, epoch = taken(tmp_path)
    assert again == host_id
    assert abs(epoch - time.time()) < 60
    assert taken(tmp_path) == (host_id, epoch + 1)
