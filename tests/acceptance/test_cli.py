"""The `leveret` command as people and scripts use it: a whole installation with simulated hosts, driven by words."""

import json
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import LEVERET, WITHIN_S, Cli, eventually, frozen, installed, stopped

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    with installed() as made:
        yield made


@pytest.fixture
def frozen_hosts(cli: Cli) -> Iterator[Callable[[], None]]:
    with frozen(cli, "fake-hosts") as thaw:
        yield thaw


# This machine


def test_up_writes_a_configuration_that_only_its_owner_can_read(cli: Cli) -> None:
    for file in (cli.root / "config/leveret/config.toml", cli.root / "state/token", cli.root / "state/client.toml"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_up_again_starts_nothing_and_keeps_the_token(cli: Cli) -> None:
    before, token = cli.json("status"), (cli.root / "state/token").read_text()
    told = cli("up").stderr
    assert "was up already" in told
    assert cli.json("status") == before
    assert (cli.root / "state/token").read_text() == token


def test_a_lost_token_is_replaced_and_the_old_one_works_no_longer(cli: Cli) -> None:
    token = cli.root / "state/token"
    shutil.move(token, cli.root / "lost")
    cli("up")
    assert cli.json("images")

    def is_refused() -> bool:  # the API remembers a good token for some seconds
        argv = [LEVERET, "--token-file", str(cli.root / "lost"), "list"]
        done = subprocess.run(argv, env=cli.env, capture_output=True, text=True, timeout=60, check=False)
        return "(unauthenticated)" in done.stderr

    eventually(is_refused, "the old token is refused")


@pytest.mark.parametrize("killed", ["api", "conductor-1", "fake-hosts", "rabbitmq", "postgres"])
def test_up_starts_just_what_is_missing(cli: Cli, killed: str) -> None:
    before = {one["name"]: one["pid"] for one in cli.json("status")}
    os.kill(before[killed], signal.SIGKILL)
    eventually(lambda: killed in stopped(cli), f"{killed} is gone")
    cli("up")
    after = {one["name"]: one["pid"] for one in cli.json("status")}
    assert {name for name in before if before[name] != after[name]} == {killed}


def test_status_shows_every_process_as_ready(cli: Cli) -> None:
    found = cli.json("status")
    assert {one["name"] for one in found} == {"postgres", "rabbitmq", "api", "conductor-1", "fake-hosts"}
    assert {one["state"] for one in found} == {"ready"}
    assert all(Path(one["log"]).exists() for one in found)


def test_a_configuration_of_another_installation_is_kept_and_stays_in_use(cli: Cli) -> None:
    path = cli.root / "config/leveret/config.toml"
    ours = path.read_text()
    try:
        path.write_text('url = "https://elsewhere.test"\ntoken = "theirs"\n')
        told = cli("up").stderr
        assert "leveret context use local" in told
        assert cli("context", "show", "--token").stdout == "theirs\n"
        assert cli("--context", "local", "list").returncode == 0
        cli("context", "use", "local")
        assert "Another context" not in cli("up").stderr
    finally:
        path.write_text(ours)


def test_doctor_finds_nothing_wrong_and_then_what_is_stopped(cli: Cli) -> None:
    found = cli.json("doctor")
    assert not [one for one in found if one["level"] == "fail"]
    names = {one["name"] for one in found}
    assert names >= {"tcp", "http", "clock", "broker", "postgres", "token", "hosts", "quota", "processes"}
    os.kill(cli.process("api")["pid"], signal.SIGKILL)
    eventually(lambda: "api" in stopped(cli), "the API is gone")
    told = cli("doctor", code=5).stdout
    assert re.search(r"^fail +tcp +127\.0\.0\.1 port \d+: Connection refused", told, re.MULTILINE)
    assert re.search(r"^fail +processes +api is stopped\. -> `leveret up`", told, re.MULTILINE)
    cli("up")


def test_the_database_says_which_migrations_it_has(cli: Cli) -> None:
    assert "0001_first" in cli("db", "status").stdout
    assert "nothing to apply" in cli("db", "migrate").stderr


# Creating


def test_create_tells_each_step_and_prints_only_the_name(cli: Cli) -> None:
    done = cli("create", "web", "--label", "role=web", "--memory", "512M", "--disk", "5G")
    assert done.stdout == "web\n"
    for step in ("accepted", "scheduled", "image", "define", "start", "running", "guest ready"):
        assert re.search(rf"^ *[\d.]+ s  {step}\b", done.stderr, re.MULTILINE), step
    assert "leveret ssh web" in done.stderr


def test_create_without_a_name_makes_a_pleasant_one(cli: Cli) -> None:
    name = cli("create", "--image", "tiny", "-o", "name").stdout.strip()
    assert re.fullmatch(r"[a-z]+-[a-z]+-[0-9a-f]{4}", name)
    assert cli.json("show", name)["state"] == "running"
    cli("delete", name, "--wait")


def test_a_name_that_is_taken_is_a_conflict(cli: Cli) -> None:
    cli("create", "taken", "--no-wait")
    told = cli("create", "taken", code=4).stderr
    assert "(name_taken)" in told
    assert "hint:" in told
    assert "request id:" in told


def test_what_no_host_can_take_fails_with_the_counts(cli: Cli) -> None:
    told = cli("create", "huge", "--memory", "4T", code=5).stderr
    assert "(no_capacity)" in told
    assert "3 of 3 hosts have too little memory free; 3 for this reason alone" in told


@pytest.mark.parametrize(
    "args",
    [
        ("--memory", "much"),
        ("--label", "nothing"),
        ("--image", "https://example.org/x.qcow2"),
        ("--image", "tiny", "--sha256", "0" * 64),
        ("--wait", "ready", "--no-wait"),
        ("--stopped", "--wait", "running"),
        ("--ssh-key", "/nowhere.pub"),
        ("--no-such-option",),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(cli: Cli, args: tuple[str, ...]) -> None:
    assert "Traceback" not in cli("create", *args, code=2).stderr


def test_an_image_that_is_not_registered_is_a_usage_error(cli: Cli) -> None:
    assert "(image_unknown)" in cli("create", "--image", "nothing", code=2).stderr


def test_a_vm_can_be_built_without_being_started(cli: Cli) -> None:
    cli("create", "asleep", "--stopped")
    assert cli.json("show", "asleep")["state"] == "stopped"


def test_user_data_comes_from_standard_input_and_is_never_shown(cli: Cli) -> None:
    done = cli("create", "told", "--user-data", "-", "-o", "json", stdin="#!/bin/sh\necho s3cret\n")
    assert json.loads(done.stdout)["name"] == "told"
    assert "s3cret" not in done.stdout + done.stderr + cli("show", "told").stdout


def test_a_time_out_keeps_the_vm(cli: Cli, frozen_hosts: Callable[[], None]) -> None:
    told = cli("create", "late", "--timeout", "1", code=6).stderr
    assert "kept" in told
    frozen_hosts()
    eventually(lambda: cli.json("show", "late")["state"] == "running", "the VM is built all the same")


def test_a_request_that_nobody_answers_is_kept_and_carried_out_later(cli: Cli) -> None:
    with frozen(cli, "conductor-1"):
        told = cli("create", "patient", "--timeout", "2", code=6).stderr
        assert "queued" in told
        assert "The request is kept" in told
    eventually(lambda: "patient" in cli("list", "--state", "running", "-o", "name").stdout.split(), "it is carried out")


def test_ctrl_c_leaves_the_build_running_and_says_how_to_follow_it(cli: Cli, frozen_hosts: Callable[[], None]) -> None:
    creating = cli.start("create", "interrupted")
    assert creating.stderr is not None
    for line in creating.stderr:
        if "scheduled" in line:
            break
    creating.send_signal(signal.SIGINT)
    _, told = creating.communicate(timeout=30)
    assert creating.returncode == 130
    assert "leveret events -f interrupted" in told
    assert "Traceback" not in told
    frozen_hosts()
    eventually(lambda: cli.json("show", "interrupted")["state"] == "running", "the VM is built all the same")


# Looking


def test_a_list_can_be_read_by_people_and_programs(cli: Cli) -> None:
    cli("create", "listed", "--label", "kind=listed")
    assert re.search(r"^listed +running +10\.", cli("list").stdout, re.MULTILINE)
    assert [vm["name"] for vm in cli.json("list", "-l", "kind=listed")] == ["listed"]
    assert [vm["name"] for vm in cli.json("list", "-l", "kind in (listed, other),!old")] == ["listed"]
    assert "listed" not in cli("list", "-l", "kind!=listed", "-o", "name").stdout.split()
    assert cli("list", "-l", "kind=listed", "-o", "name").stdout == "listed\n"
    assert "name: listed\n" in cli("list", "-l", "kind=listed", "-o", "yaml").stdout
    assert cli.json("list", "-l", "kind=nothing") == []
    host = cli.json("show", "listed")["host"]
    assert "listed" in [vm["name"] for vm in cli.json("list", "--host", host, "--state", "running")]


def test_names_and_ids_mean_the_same(cli: Cli) -> None:
    cli("create", "both", "--no-wait")
    vm_id = cli.json("show", "both")["id"]
    assert cli.json("show", vm_id)["name"] == "both"


@pytest.mark.parametrize("verb", ["show", "explain", "timeline", "console-log", "ssh", "delete", "start", "events"])
def test_a_vm_that_is_not_there_is_not_found(cli: Cli, verb: str) -> None:
    assert "'nobody'" in cli(verb, "nobody", code=3).stderr


def test_events_begin_with_accepted_and_number_without_gaps(cli: Cli) -> None:
    cli("create", "eventful")
    told = [json.loads(line) for line in cli("events", "eventful", "-o", "json").stdout.splitlines()]
    assert told[0]["type"] == "accepted"
    assert {"running", "guest_ready"} <= {event["type"] for event in told}
    everything = [json.loads(line) for line in cli("events", "-o", "json", "--after", "0").stdout.splitlines()]
    assert [event["seq"] for event in everything] == list(range(1, len(everything) + 1))


def test_events_can_be_followed_as_they_come(cli: Cli) -> None:
    following = cli.start("events", "-f", "-n", "0", "-o", "json")
    try:
        assert following.stdout is not None
        # Nothing says that the watcher is there: VMs are made until it sees one.
        deadline = time.monotonic() + WITHIN_S
        while not select.select([following.stdout], [], [], 1.0)[0]:
            assert time.monotonic() < deadline
            cli("create", "--no-wait")
        first, second = (json.loads(following.stdout.readline()) for _ in range(2))
        assert second["seq"] == first["seq"] + 1
        assert first["vm_name"] == second["vm_name"]
    finally:
        following.send_signal(signal.SIGINT)
        following.communicate(timeout=30)


def test_a_timeline_adds_up(cli: Cli) -> None:
    cli("create", "timed")
    spans = cli.json("timeline", "timed")
    assert [span["name"] for span in spans][:2] == ["accepted", "scheduled"]
    assert spans[-1]["name"] == "guest ready"
    total_s = spans[-1]["starts_s"] + spans[-1]["seconds"]
    assert sum(span["seconds"] for span in spans) == pytest.approx(total_s, abs=1e-4)
    assert "in all" in cli("timeline", "timed").stdout


def test_explain_says_that_nothing_is_wrong_or_what_is(cli: Cli) -> None:
    cli("create", "fine")
    assert "Nothing is wrong" in cli("explain", "fine").stdout


def test_explain_tells_of_a_refused_request_by_either_of_its_ids(cli: Cli) -> None:
    told = cli("create", "refused", "--memory", "4T", code=5).stderr
    request_id = re.search(r"request id: (\S+)", told)
    assert request_id is not None

    def refusals() -> list[dict[str, Any]]:
        lines = cli("events", "-o", "json", "--after", "0").stdout.splitlines()
        events = [json.loads(line) for line in lines]
        return [one for one in events if one["type"] == "rejected" and one["data"]["request_id"] == request_id[1]]

    eventually(lambda: bool(refusals()), "the refusal is in the log")
    for known in (request_id[1], refusals()[0]["vm_id"]):
        assert "(no_capacity)" in cli("explain", known).stdout
    assert "rejected" in cli("events").stdout
    assert (
        "'01a20312-0000-7000-8000-000000000000'"
        in cli("explain", "01a20312-0000-7000-8000-000000000000", code=3).stderr
    )


def test_a_dry_run_says_whether_and_makes_nothing(cli: Cli) -> None:
    assert "would be accepted" in cli("create", "dry", "--dry-run").stderr
    assert cli("create", "dry", "--dry-run", "-o", "json").stdout.startswith("{")
    assert "(no_capacity)" in cli("create", "dry", "--dry-run", "--memory", "4T", code=5).stderr
    cli("show", "dry", code=3)


def test_hosts_images_and_versions(cli: Cli) -> None:
    assert len(cli.json("hosts")) == 3
    assert cli("images", "-o", "name").stdout == "tiny\n"
    assert cli.json("version")["api"]


# Changing


def test_the_verbs_wait_until_they_are_true(cli: Cli) -> None:
    cli("create", "one", "--no-wait")
    cli("create", "two", "--no-wait")
    for verb, state in (("stop", "stopped"), ("start", "running"), ("reboot", "running")):
        told = cli(verb, "one", "two", "--wait").stderr
        assert told.splitlines() in ([f"one: {state}", f"two: {state}"], [f"two: {state}", f"one: {state}"])
        assert {cli.json("show", name)["state"] for name in ("one", "two")} == {state}
    cli("delete", "one", "two", "--wait")
    assert not {"one", "two"} & {vm["name"] for vm in cli.json("list")}


def test_the_verbs_wait_for_what_was_queued_too(cli: Cli) -> None:
    """Before its verdict nothing is known of a request: how the VM stands is of before it."""
    cli("create", "queued")
    for verb, state in (("stop", "stopped"), ("start", "running"), ("reboot", "running"), ("delete", "deleted")):
        before = cli.json("show", "queued")["generation"]
        with frozen(cli, "conductor-1") as thaw:
            doing = cli.start(verb, "queued", "--wait", "-o", "json")
            assert doing.stderr is not None
            assert "queued: queued" in doing.stderr.readline()
            thaw()
            shown, told = doing.communicate(timeout=60)
        assert doing.returncode == 0, (verb, told)
        (vm,) = json.loads(shown)
        assert (vm["state"], vm["generation"]) == (state, before + 1), verb


def test_a_queued_request_that_is_refused_in_the_end_is_told_as_refused(cli: Cli) -> None:
    cli("create", "halted", "--stopped")
    with frozen(cli, "conductor-1") as thaw:
        doing = cli.start("reboot", "halted", "--wait")
        assert doing.stderr is not None
        assert "queued" in doing.stderr.readline()
        thaw()
        _, told = doing.communicate(timeout=60)
    assert doing.returncode == 4, told
    assert "(state_conflict)" in told


def test_wait_waits_for_several_and_its_exit_code_tells(cli: Cli) -> None:
    cli("create", "first", "--no-wait")
    cli("create", "second", "--no-wait")
    told = cli("wait", "--for", "ready", "first", "second").stderr
    assert {line.partition(" (")[0] for line in told.splitlines()} == {"first: ready", "second: ready"}
    assert "first: running" in cli("wait", "--for", "running", "first", "nobody", code=3).stderr
    cli("delete", "second")
    assert cli("wait", "--for", "deleted", "second", "nobody").returncode == 0


def test_a_vm_that_cannot_become_so_in_time_is_a_time_out(cli: Cli, frozen_hosts: Callable[[], None]) -> None:
    cli("create", "slow", "--no-wait")
    assert "not running after 1 s" in cli("wait", "--for", "running", "slow", "--timeout", "1", code=6).stderr
    frozen_hosts()
    cli("wait", "--for", "running", "slow")


def test_a_vm_is_renamed_and_labelled(cli: Cli) -> None:
    cli("create", "before", "--label", "old=1", "--no-wait")
    cli("create", "other", "--no-wait")
    vm_id = cli.json("show", "before")["id"]
    cli("rename", "before", "after")
    assert cli.json("show", "after")["id"] == vm_id
    assert "(name_taken)" in cli("rename", "after", "other", code=4).stderr
    cli("label", "after", "other", "tier=front", "old-")
    assert cli.json("show", "after")["labels"] == {"tier": "front"}
    assert cli.json("show", "other")["labels"] == {"tier": "front"}
    cli("label", "after", "tier-")
    assert cli.json("show", "after")["labels"] == {}


FLEET = """\
name: fleet-1
image: {name: tiny}
labels: {fleet: "1"}
---
- {name: fleet-2, image: {name: tiny}, labels: {fleet: "1"}, running: false}
- {name: fleet-3, image: {name: tiny}, labels: {fleet: "1"}, vcpus: 2}
"""


def applied(cli: Cli, text: str, *args: str, code: int = 0) -> dict[str, str]:
    done = cli("apply", "-f", "-", *args, "-o", "json", stdin=text, code=code)
    return {one["name"]: one["result"] for one in json.loads(done.stdout)}


def test_apply_makes_vms_what_a_file_says(cli: Cli) -> None:
    names = {"fleet-1", "fleet-2", "fleet-3"}
    assert applied(cli, FLEET, "--dry-run") == dict.fromkeys(names, "would be created")
    assert "fleet-1" not in cli("list", "-o", "name").stdout
    assert applied(cli, FLEET) == dict.fromkeys(names, "created")
    assert [cli.json("show", f"fleet-{n}")["state"] for n in (1, 2, 3)] == ["running", "stopped", "running"]
    assert applied(cli, FLEET) == dict.fromkeys(names, "unchanged")
    other = FLEET.replace("running: false", "running: true").replace('fleet: "1"}\n---', "fleet: two}\n---")
    assert applied(cli, other) == {"fleet-1": "changed", "fleet-2": "changed", "fleet-3": "unchanged"}
    assert cli.json("show", "fleet-1")["labels"] == {"fleet": "two"}
    assert cli.json("show", "fleet-2")["state"] == "running"
    done = cli("apply", "-f", "-", stdin=other.replace("vcpus: 2", "vcpus: 3"), code=4)
    assert "fleet-3: vcpus is 2 and cannot become 3" in done.stderr
    one = "{name: fleet-1, image: {name: tiny}}"
    assert "give --yes" in cli("apply", "-f", "-", "--prune", "-l", "fleet", stdin=one, code=2).stderr
    assert applied(cli, one, "--prune", "-l", "fleet", "--yes") == {
        "fleet-1": "unchanged",
        "fleet-2": "deleted",
        "fleet-3": "deleted",
    }
    assert cli("list", "-l", "fleet", "-o", "name").stdout == "fleet-1\n"


def test_apply_says_what_failed_and_does_the_rest(cli: Cli) -> None:
    text = "- {name: good, image: {name: tiny}}\n- {name: bad, image: {name: nothing}}\n"
    assert applied(cli, text, code=2) == {"good": "created", "bad": "failed"}


def test_following_survives_a_restart_of_the_api_and_says_how_to_resume(cli: Cli) -> None:
    following = cli.start("events", "-f", "--after", "0", "-o", "json")
    try:
        assert following.stdout is not None
        seen = [json.loads(following.stdout.readline())["seq"]]
        os.kill(cli.process("api")["pid"], signal.SIGKILL)
        cli("up")
        cli("create", "afterwards")
        while True:
            event = json.loads(following.stdout.readline())
            seen.append(event["seq"])
            if (event["vm_name"], event["type"]) == ("afterwards", "guest_ready"):
                break
        assert seen == list(range(1, len(seen) + 1))
    finally:
        following.send_signal(signal.SIGINT)
        _, told = following.communicate(timeout=30)
    assert following.returncode == 130
    assert "leveret events -f --after " in told
    assert "Traceback" not in told


def test_one_that_is_not_there_does_not_keep_the_others(cli: Cli) -> None:
    cli("create", "there", "--no-wait")
    assert "'gone'" in cli("delete", "gone", "there", "--wait", code=3).stderr
    assert "there" not in {vm["name"] for vm in cli.json("list")}


def test_a_running_vm_cannot_be_tried_again(cli: Cli) -> None:
    cli("create", "healthy")
    assert "(state_conflict)" in cli("retry", "healthy", code=4).stderr


# Completing


def completions(cli: Cli, *words: str) -> list[str]:
    """What bash is offered for the last word."""
    env = cli.env | {
        "_LEVERET_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["leveret", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([LEVERET], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    return done.stdout.split()


def test_a_shell_completes_commands_vms_images_hosts_projects_and_contexts(cli: Cli) -> None:
    cli("create", "completed", "--no-wait")
    assert completions(cli, "expl") == ["explain"]
    assert completions(cli, "show", "complet") == ["completed"]
    assert completions(cli, "create", "--image", "ti") == ["tiny"]
    assert completions(cli, "list", "--host", cli.json("hosts")[0]["name"]) == [cli.json("hosts")[0]["name"]]
    assert completions(cli, "project", "show", "def") == ["default"]
    assert completions(cli, "context", "use", "lo") == ["local"]
    cli("token", "create", "completed-token", "-o", "name")
    assert completions(cli, "token", "revoke", "completed-t") == ["completed-token"]
    cli("project", "create", "completing")
    assert completions(cli, "token", "revoke", "-p", "completing", "completed-t") == []
    cli("project", "add-amqp-user", "completing", "completed-user")
    assert completions(cli, "project", "remove-amqp-user", "completing", "comp") == ["completed-user"]
    assert completions(cli, "--context", "local", "show", "complet") == ["completed"]
    assert completions(cli, "--context", "nowhere", "show", "complet") == []


# Reaching


def test_nobody_at_the_address_is_unreachable(cli: Cli) -> None:
    (cli.root / "token").write_text("any")
    told = cli("--url", "http://127.0.0.1:9", "--token-file", str(cli.root / "token"), "list", code=7).stderr
    assert "http://127.0.0.1:9" in told


def test_a_wrong_token_is_refused_with_a_hint(cli: Cli) -> None:
    (cli.root / "token").write_text("lv_wrong")
    told = cli("--token-file", str(cli.root / "token"), "list", code=2).stderr
    assert "(unauthenticated)" in told
    assert "Traceback" not in told
    assert "lv_wrong" not in told


@pytest.mark.parametrize("token", ["lv_sec ret\n", "lv_s\u00e9cret\n", "\n"])
def test_a_token_that_cannot_be_sent_is_a_usage_error_and_is_not_told(cli: Cli, token: str) -> None:
    (cli.root / "token").write_text(token)
    for args in (("list",), ("doctor", "--no-machine")):
        done = cli("--token-file", str(cli.root / "token"), *args, code=2 if args == ("list",) else 0)
        assert "cannot be a token" in done.stderr + done.stdout
        assert "cret" not in done.stderr + done.stdout
    ours = Cli(cli.root, cli.env | {"LEVERET_URL": cli.json("whoami")["url"], "LEVERET_TOKEN": token})
    assert "cret" not in ours("list", code=2).stderr


def test_a_line_break_after_a_token_in_the_environment_does_no_harm(cli: Cli) -> None:
    token = (cli.root / "state/token").read_text().strip()
    ours = Cli(cli.root, cli.env | {"LEVERET_URL": cli.json("whoami")["url"], "LEVERET_TOKEN": f"{token}\n"})
    assert ours("whoami").returncode == 0


def test_a_selector_that_cannot_be_read_is_a_usage_error(cli: Cli) -> None:
    for selector in ("a=b=c", "", "!", "a in"):
        assert "label: cannot be read from character" in cli("list", "-l", selector, code=2).stderr


def test_no_event_has_so_great_a_number(cli: Cli) -> None:
    assert "at most" in cli("events", "--after", str(2**63), code=2).stderr
    told = cli("events", "--after", str(2**63 - 1), code=5).stderr
    assert "went back to event" in told


# On a terminal


def on_a_terminal(cli: Cli, *args: str, columns: int, **env: str) -> str:
    """What a terminal of this width shows."""
    terminal, theirs = pty.openpty()
    with subprocess.Popen(
        [LEVERET, *args], env=cli.env | env | {"COLUMNS": str(columns)}, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # Linux says EIO when the last writer has gone
                break
            if not part:
                break
            shown += part
        process.wait()
    os.close(terminal)
    return shown.decode()


def test_a_terminal_gets_colour_unless_it_asks_for_none(cli: Cli) -> None:
    cli("create", "coloured", "--no-wait")
    assert "\x1b[" in on_a_terminal(cli, "list", columns=120)
    assert "\x1b[" not in on_a_terminal(cli, "list", columns=120, NO_COLOR="1")


def test_a_narrow_terminal_gets_whole_lines_of_what_matters(cli: Cli) -> None:
    cli("create", "narrow", "--no-wait")
    lines = on_a_terminal(cli, "list", columns=40, NO_COLOR="1").splitlines()
    assert lines[0].split()[:2] == ["NAME", "STATE"]
    assert all(len(line) <= 40 for line in lines)


@pytest.mark.parametrize("columns", [60, 70, 80])
def test_no_line_is_longer_than_the_terminal(cli: Cli, columns: int) -> None:
    cli("create", f"wide-{columns}", "--label", "a=b", "--no-wait")
    for args in (("list",), ("doctor",), ("create", "--memory", "4T"), ("events", "-n", "200")):
        shown = on_a_terminal(cli, *args, columns=columns, NO_COLOR="1", TERM="dumb")
        assert "\x1b" not in shown, args
        # A path is not cut: it is there to be copied.
        long = [line for line in shown.splitlines() if len(line) > columns and "/" not in line]
        assert not long, (args, long)


def test_only_colours_that_can_be_read_on_any_ground_are_used(cli: Cli) -> None:
    cli("create", "seen", "--no-wait")
    for args in (("list",), ("doctor",), ("events",), ("timeline", "seen")):
        shown = on_a_terminal(cli, *args, columns=120)
        codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", shown) for code in found.split(";")}
        assert codes <= {"0", "1", "2", "31", "32", "35"}, args


# The end: it has the installation to itself no longer


def test_down_stops_everything_and_up_brings_it_back(cli: Cli) -> None:
    cli("create", "survivor")
    cli("down")
    assert "leveret up" in cli("list", code=7).stderr
    assert {one["state"] for one in json.loads(cli("status", "-o", "json", code=5).stdout)} == {"stopped"}
    cli("down")  # again: nothing to do is success
    cli("up")
    eventually(lambda: cli.json("show", "survivor")["state"] == "running", "the VM is still there")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_up_or_down_that_was_killed_anywhere_is_finished_by_the_next() -> None:
    root = Path(tempfile.mkdtemp(prefix="leveret-cli-"))
    root.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "HOME": str(root / "home"), "LEVERET_STATE_DIR": str(root / "state")}
    cli = Cli(root, env)
    try:
        for seconds in (0.5, 1.0, 2.0, 3.0, 5.0, 7.0):
            starting = cli.start("up", "--fake-hosts", "2")
            time.sleep(seconds)
            starting.kill()
            starting.communicate()
        cli("up", "--fake-hosts", "2")
        for seconds in (0.4, 0.8, 1.6):
            stopping = cli.start("down")
            time.sleep(seconds)
            stopping.kill()
            stopping.communicate()
            cli("up")
            assert {one["state"] for one in cli.json("status")} == {"ready"}
            assert len(cli.json("hosts")) == 2
    finally:
        cli("down", "--purge")
        left = [file.name for file in (root / "state").iterdir()]
        shutil.rmtree(root, ignore_errors=True)
    assert left == ["lock"]
