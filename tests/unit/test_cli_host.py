"""Hosts, and VMs on hosts that are not heard of, as people read of them; and what is asked before a host is fenced."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from leveret.client.cli import app, host, look
from leveret.client.cli.columns import HOST_COLUMNS, state_text
from leveret.client.cli.create import OnHostFailureChoice
from leveret.client.cli.event_lines import EventLines
from leveret.client.cli.output import write_table
from leveret.shared.documents import EventView, HostView, OnHostFailure, VmView
from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import Desired, State

pytestmark = pytest.mark.unit

LONG_AGO = timedelta(minutes=5)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


def a_host(*, heard: timedelta = LONG_AGO, **changes: Any) -> HostView:
    fields: dict[str, Any] = {
        "id": uuid.UUID(int=3),
        "name": "h3",
        "zone": "a",
        "state": "silent",
        "state_reason": "no heartbeat since 12:00",
        "labels": {},
        "virt_type": "kvm",
        "vcpus": 8,
        "vcpus_used": 1,
        "memory_mib": 8192,
        "memory_mib_used": 1024,
        "disk_gib": 100,
        "disk_gib_used": 10,
        "vms": 0,
        "heartbeat_at": datetime.now(UTC) - heard,
    }
    return HostView(**(fields | changes))


def a_vm(**changes: Any) -> VmView:
    now = datetime.now(UTC)
    fields: dict[str, Any] = {
        "id": uuid.UUID(int=7),
        "project": "default",
        "name": "web",
        "state": State.RUNNING,
        "step": None,
        "desired": Desired.RUNNING,
        "generation": 1,
        "observed_generation": 1,
        "vcpus": 2,
        "memory_mib": 1024,
        "disk_gib": 10,
        "image": "tiny",
        "network": "default",
        "address": None,
        "mac": None,
        "ssh": None,
        "host": "h3",
        "zone": "a",
        "labels": {},
        "guest_ready": True,
        "problem": None,
        "attempts": 1,
        "created_at": now,
        "updated_at": now,
    }
    return VmView(**(fields | changes))


def silent_vm(**changes: Any) -> VmView:
    return a_vm(host_silent_since=datetime.now(UTC) - LONG_AGO, **changes)


def words(text: str) -> str:
    return " ".join(text.split())


# Hosts


def test_the_table_says_why_a_host_is_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    write_table(
        [
            a_host(),
            a_host(name="h4", state="fenced", state_reason="power cut at the PDU", clean=False),
            a_host(name="h5", state="fenced", state_reason="burnt", clean=True),
        ],
        HOST_COLUMNS,
    )
    _, silent, dirty, clean = map(words, capsys.readouterr().out.splitlines())
    assert silent.startswith("h3 silent a")
    assert silent.endswith("5m ago no heartbeat since 12:00")
    assert dirty.startswith("h4 fenced (not clean)")
    assert dirty.endswith("power cut at the PDU")
    assert clean.startswith("h5 fenced (clean)")


def test_on_a_terminal_a_long_proof_leaves_room_for_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    write_table([a_host(state="fenced", state_reason="power cut, " * 40, clean=False)], HOST_COLUMNS)
    line = capsys.readouterr().out.splitlines()[1]
    assert len(line) <= 80
    assert "power cut, power cut" in line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, 'leveret host fence h3 --proof "..."'),
        ({"state": "cordoned"}, "leveret host uncordon h3"),
        ({"state": "fenced", "clean": False}, "leveret host retire h3"),
        ({"state": "fenced", "clean": True}, "It is back, and clean: leveret host uncordon h3"),
        ({"state": "up"}, ""),
        ({"state": "retired"}, ""),
    ],
)
def test_a_host_says_what_can_be_done(changes: dict[str, Any], told: str) -> None:
    shown = dict(host.facts(a_host(**changes)))["next"]
    assert shown.endswith(told)
    assert bool(shown) is bool(told)


def test_before_a_host_is_fenced_it_is_told_what_follows() -> None:
    own = [
        a_vm(name="anew", on_host_failure="restart"),
        a_vm(name="unfinished", state=State.BUILDING),
        a_vm(name="waits"),
        a_vm(name="failed", state=State.ERROR, on_host_failure="restart"),
        a_vm(name="gone", state=State.DELETING, desired=Desired.DELETED, on_host_failure="restart"),
    ]
    told = host.what_follows(a_host(vms=9, vms_to_restart=4), own)
    assert told == [
        "h3 is silent (no heartbeat since 12:00), and was heard of 5m ago.",
        "On it are 9 VMs, of all projects:",
        "  4 to be made anew elsewhere, without what was on the disk; of this project anew, unfinished",
        "  5 to wait for it, in error, or to be gone if that was asked for; of this project waits, failed",
    ]


def test_who_fences_a_host_that_speaks_is_warned() -> None:
    told = host.what_follows(a_host(state="up", state_reason=None, heard=timedelta(seconds=3)), [])
    assert told == [
        "h3 is up, and was heard of 3s ago.",
        "It does not look as if it was off.",
        "No VM stands on it.",
    ]


def test_many_vms_are_counted_and_some_of_them_named() -> None:
    own = [a_vm(name=f"vm-{n}") for n in range(20)]
    (told,) = host.what_follows(a_host(vms=30), own)[2:]
    assert told.endswith("vm-6, vm-7 and 12 more")


# Questions


@pytest.mark.parametrize("args", [("fence", "h3", "--proof", "power cut"), ("retire", "h3")])
def test_what_cannot_be_taken_back_is_not_done_unasked(args: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app.build(), ["host", *args])
    assert done.exit_code == 2
    assert "give --yes" in done.output


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("fence", "h3", "--yes"), "--proof"),
        (("fence", "h3", "--yes", "--proof", "no"), "how it was made sure"),
        (("fence", "h3", "--yes", "--proof", "one\ntwo"), "in one line"),
        (("cordon", "h3", "--reason", "x"), "in one line of 4 to 512 characters"),
        (("cordon",), "HOST"),
    ],
)
def test_words_that_say_nothing_are_usage_errors(args: tuple[str, ...], told: str) -> None:
    done = CliRunner().invoke(app.build(), ["host", *args])
    assert done.exit_code == 2
    assert told in words(done.output)
    assert "String should" not in done.output


@pytest.mark.parametrize("command", ["list", "show", "cordon", "uncordon", "fence", "retire"])
def test_every_command_about_hosts_explains_itself(command: str) -> None:
    done = CliRunner().invoke(app.build(), ["host", command, "--help"])
    assert done.exit_code == 0
    assert "Usage: " in done.output


def test_the_help_of_fence_says_what_is_at_stake() -> None:
    told = words(CliRunner().invoke(app.build(), ["host", "fence", "--help"]).output)
    for point in (
        "Cut its power first",
        "may run a VM a second time",
        "a host is silent proves nothing",
        "leveret retry",
    ):
        assert point in told


def test_the_choices_for_a_failing_host_are_those_of_the_api() -> None:
    assert {choice.value for choice in OnHostFailureChoice} == set(get_args(OnHostFailure))


# VMs


def test_a_list_says_that_a_host_is_silent() -> None:
    assert state_text(silent_vm()) == "running (host silent)"
    fenced = Problem.of(Code.HOST_FENCED, "Host h3 is off.")
    assert state_text(silent_vm(state=State.ERROR, problem=fenced)) == "error (host_fenced)"


@pytest.mark.parametrize(
    ("choice", "then"), [("none", "waits for the host with its disk"), ("restart", "made anew on another host")]
)
def test_explain_says_since_when_a_host_is_silent_and_what_can_be_done(
    choice: str, then: str, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = silent_vm(on_host_failure=choice)
    look._explain(vm, [])
    told = words(capsys.readouterr().out)
    assert vm.host_silent_since is not None
    since = vm.host_silent_since.astimezone()
    assert f"Host h3 is silent since {since:%Y-%m-%d %H:%M:%S} (5m ago): the VM may run or not" in told
    assert 'leveret host fence h3 --proof "..."' in told
    assert then in told
    assert "Nothing is wrong" not in told


def test_show_says_that_the_host_is_silent_and_what_would_become_of_the_vm() -> None:
    told = dict(look.facts(silent_vm(on_host_failure="restart")))
    assert told["host"].startswith("h3 in zone a, silent since ")
    assert told["if host fails"] == "made anew elsewhere, without its disk"
    assert dict(look.facts(a_vm()))["host"] == "h3 in zone a"


def test_what_was_ordered_of_hosts_can_be_read_in_the_log() -> None:
    def note(kind: str, **data: Any) -> str:
        by = {"host": "h3", "host_id": str(uuid.UUID(int=3)), "by": "token ops of default"}
        event = EventView(seq=1, vm_id=None, vm_name=None, type=kind, state=None, at=datetime.now(UTC), data=by | data)
        return EventLines(with_subject=False).line(event).partition(kind)[2].strip()

    assert note("host.fenced", proof="power cut") == "h3: power cut (by token ops of default)"
    assert note("host.cordoned", reason="new memory") == "h3: new memory (by token ops of default)"
    assert note("host.retired") == "h3 (by token ops of default)"


def test_a_host_that_is_up_and_gets_no_new_vms_says_why() -> None:
    problem = Problem.of(Code.DISK_FULL, "The pool has 0.5 GiB free.")
    ill = a_host(state="up", state_reason=None, heard=timedelta(0), problem=problem)
    facts = dict(host.facts(ill))
    assert facts["problem"] == "The pool has 0.5 GiB free. (disk_full)"
    assert "no new VMs" in facts["next"]
    (note,) = [column.text(ill) for column in HOST_COLUMNS if column.title == "NOTE"]
    assert note == "The pool has 0.5 GiB free."
