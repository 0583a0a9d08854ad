"""What a guest says on its console: read once, forwards, however the log is rotated."""

import os
from pathlib import Path

import pytest

from leveret.compute.libvirt_driver import console
from leveret.compute.libvirt_driver.console import Readiness
from leveret.compute.libvirt_driver.paths import VmPaths

pytestmark = pytest.mark.unit

READY = b"LEVERET-GUEST-READY web-1 10.80.0.7\r\n"
CLOUD_INIT = (
    b"[   93.1] cloud-init[411]: Cloud-init v. 22.4.2 finished at Sun, 22 Nov 2026 08:00:00 +0000. Datasource\r\n"
)


@pytest.fixture
def paths(tmp_path: Path) -> VmPaths:
    return VmPaths(tmp_path)


def say(paths: VmPaths, text: bytes) -> None:
    with paths.console.open("ab") as log:
        log.write(text)


def rotate(paths: VmPaths, keep: int = 3) -> None:
    """As virtlogd does it."""
    for number in range(keep - 1, -1, -1):
        older = paths.console.with_name(f"console.log.{number}")
        newer = paths.console if number == 0 else paths.console.with_name(f"console.log.{number - 1}")
        if newer.exists():
            newer.rename(older)


@pytest.mark.parametrize("announcement", [READY, CLOUD_INIT], ids=["appliance", "cloud-init"])
def test_the_announcement_is_found_in_whatever_pieces_it_comes(paths: VmPaths, announcement: bytes) -> None:
    for cut in range(1, len(announcement) - 2):
        for path in paths.directory.iterdir():
            path.unlink()
        readiness = Readiness()
        readiness.started(paths)
        say(paths, b"booting\r\n" + announcement[:cut])
        early = readiness.is_ready(paths)
        say(paths, announcement[cut:])

        assert readiness.is_ready(paths)
        assert not early or b"READY" in announcement[:cut] or b"finished at " in announcement[:cut]


def test_what_was_said_before_the_start_does_not_count(paths: VmPaths) -> None:
    say(paths, READY)
    readiness = Readiness()
    readiness.started(paths)
    say(paths, b"booting\r\n")
    assert not readiness.is_ready(paths)

    say(paths, READY)
    assert readiness.is_ready(paths)


def test_a_new_start_forgets_that_the_guest_was_up(paths: VmPaths) -> None:
    readiness = Readiness()
    readiness.started(paths)
    say(paths, READY)
    assert readiness.is_ready(paths)

    readiness.started(paths)

    assert not readiness.is_ready(paths)


def test_another_worker_goes_on_where_the_former_one_ended(paths: VmPaths) -> None:
    say(paths, READY)
    Readiness().started(paths)
    assert not Readiness().is_ready(paths)

    say(paths, READY)

    assert Readiness().is_ready(paths)


def test_another_worker_remembers_a_guest_whose_announcement_was_rotated_away(paths: VmPaths) -> None:
    readiness = Readiness()
    readiness.started(paths)
    say(paths, READY)
    assert readiness.is_ready(paths)
    for path in paths.directory.glob("console.log*"):
        path.unlink()
    say(paths, b"much more\r\n")

    assert Readiness().is_ready(paths)


@pytest.mark.parametrize("rotations", [1, 2, 3])
def test_the_announcement_is_found_in_a_file_that_was_rotated_away(paths: VmPaths, rotations: int) -> None:
    readiness = Readiness()
    readiness.started(paths)
    say(paths, b"booting\r\n")
    assert not readiness.is_ready(paths)

    say(paths, READY)
    for _ in range(rotations):
        rotate(paths)
        say(paths, b"chatter\r\n")

    assert readiness.is_ready(paths)


def test_an_announcement_across_a_rotation_is_found(paths: VmPaths) -> None:
    readiness = Readiness()
    readiness.started(paths)
    say(paths, READY[:9])
    assert not readiness.is_ready(paths)
    rotate(paths)
    say(paths, READY[9:])

    assert readiness.is_ready(paths)


def test_when_its_place_was_rotated_away_everything_that_is_left_counts(paths: VmPaths) -> None:
    readiness = Readiness()
    say(paths, b"before\r\n")
    readiness.started(paths)
    assert not readiness.is_ready(paths)
    held = paths.console.open("rb")  # so that its inode is not given away again
    for _ in range(4):
        rotate(paths)
        say(paths, b"chatter\r\n" + READY)
    held.close()

    assert readiness.is_ready(paths)


def test_nothing_is_read_while_nothing_is_said(paths: VmPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    readiness = Readiness()
    readiness.started(paths)
    say(paths, b"booting\r\n")
    assert not readiness.is_ready(paths)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(Path, "open", refuse)
    assert not readiness.is_ready(paths)


def test_no_console_and_a_broken_mark_mean_not_ready(paths: VmPaths) -> None:
    assert not Readiness().is_ready(paths)
    paths.console_mark.write_text("{")
    assert not Readiness().is_ready(paths)


def test_the_tail_is_the_end(paths: VmPaths) -> None:
    say(paths, bytes(range(200)))

    assert console.tail(paths.console, 10) == bytes(range(190, 200))
    assert console.tail(paths.console, 1000) == bytes(range(200))


def test_the_tail_reaches_into_rotated_files(paths: VmPaths) -> None:
    for text in (b"one", b"two", b"three"):
        say(paths, text)
        rotate(paths)
    say(paths, b"four")

    assert console.tail(paths.console, 9) == b"threefour"
    assert console.tail(paths.console, 100) == b"onetwothreefour"


def test_no_console_has_an_empty_tail(paths: VmPaths) -> None:
    assert console.tail(paths.console, 100) == b""


def test_a_console_that_was_emptied_is_read_from_its_beginning(paths: VmPaths) -> None:
    readiness = Readiness()
    readiness.started(paths)
    say(paths, b"long chatter " * 100)
    assert not readiness.is_ready(paths)

    os.truncate(paths.console, 0)
    say(paths, READY)

    assert readiness.is_ready(paths)
