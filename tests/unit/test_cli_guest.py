"""The console as it grows, and the ssh that is run."""

import uuid
from pathlib import Path

import pytest

from leveret.client.cli.guest import grown, plain, ssh_argv
from leveret.client.errors import ConfigError
from leveret.shared.documents import Endpoint, VmView

pytestmark = pytest.mark.unit


def test_only_what_is_new_is_shown() -> None:
    assert grown("one\ntwo\n", "one\ntwo\nthree\n") == "three\n"


def test_nothing_new_is_nothing() -> None:
    assert grown("one\ntwo\n", "one\ntwo\n") == ""


def test_a_window_that_moved_on_is_followed() -> None:
    console = "".join(f"line {number}\n" for number in range(1000))
    assert grown(console[:5000], console[2000:6000]) == console[5000:6000]


def test_a_console_that_began_anew_is_shown_whole() -> None:
    assert grown("old guest\n" * 40, "new guest\n") == "new guest\n"


def test_the_first_look_shows_all() -> None:
    assert grown("", "hello\n") == "hello\n"


VM = VmView.model_validate(
    {
        "id": uuid.UUID(int=7),
        "project": "default",
        "name": "web",
        "state": "running",
        "step": None,
        "desired": "running",
        "generation": 1,
        "observed_generation": 1,
        "vcpus": 1,
        "memory_mib": 64,
        "disk_gib": 1,
        "image": "appliance",
        "network": "default",
        "address": "10.80.0.2",
        "mac": None,
        "ssh": {"host": "10.80.0.2", "port": 22},
        "host": "host-1",
        "zone": "default",
        "labels": {},
        "guest_ready": True,
        "problem": None,
        "attempts": 1,
        "created_at": "2026-11-22T08:00:00Z",
        "updated_at": "2026-11-22T08:00:00Z",
    }
)


def argv(vm: VmView = VM, key: Path | None = None, command: list[str] | None = None) -> list[str]:
    return ssh_argv(vm, login="root", key=key, hosts_file=Path("/state dir/hosts"), command=command or [])


def test_ssh_goes_to_the_address_and_knows_each_vm_by_its_id() -> None:
    line = argv()
    assert line[-1] == "10.80.0.2"
    assert line[line.index("-p") + 1] == "22"
    assert f"-oHostKeyAlias={VM.id}" in line
    assert '-oUserKnownHostsFile="/state dir/hosts"' in line
    assert "-oStrictHostKeyChecking=accept-new" in line


def test_ssh_goes_to_the_forwarded_port_when_there_is_one() -> None:
    line = argv(VM.model_copy(update={"ssh": Endpoint(host="127.0.0.1", port=40022)}))
    assert line[-1] == "127.0.0.1"
    assert line[line.index("-p") + 1] == "40022"


def test_a_command_comes_after_the_host_and_is_no_option_of_ours() -> None:
    assert argv(command=["uname", "-a"])[-4:] == ["10.80.0.2", "--", "uname", "-a"]


def test_a_key_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    key = tmp_path / "id"
    assert "-i" not in argv(key=key)
    key.touch()
    assert argv(key=key)[-3:-1] == ["-i", str(key)]


def test_a_vm_that_no_host_offers_a_way_into_is_not_looked_for_in_the_world_outside() -> None:
    with pytest.raises(ConfigError, match="simulated"):
        argv(VM.model_copy(update={"ssh": None}))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\ttwo\r\n", "one\ttwo\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("root@web:~# \x1b[6n", "root@web:~# "),
        ("\x1b]0;your new title\x07after", "after"),
        ("\x1bP+q544e\x1b\\after", "after"),
        ("\x1b]52;c;bGlz", ""),  # a control string without an end swallows what follows it, as on a terminal
        ("\x9b31mred", "31mred"),
        ("\x1bc\x1b(Bkept\x07\x08", "kept"),
        ("Größe ✓", "Größe ✓"),
    ],
)
def test_a_guest_cannot_speak_to_the_terminal(text: str, shown: str) -> None:
    assert plain(text) == shown
