"""Placement through the command line, against a whole installation with simulated hosts in two zones."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import LEVERET, Cli, eventually
from installation import Installation, installed

from leveret.stack.layout import Options
from leveret.stack.ports import free_port

pytestmark = pytest.mark.acceptance

SMALL = ("--memory", "128M", "--disk", "1G", "--image", "tiny")
#: A host of its own has been added under this taint.
TAINT = "gpu=yes"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Installation]:
    """Four hosts that take anybody, and a tainted one in a zone of its own that takes three VMs."""
    with installed(Options(conductors=2, fake_hosts=4, libvirt=False)) as house:
        more = {
            "LEVERET_ZONE": "lab",
            "LEVERET_TAINTS": json.dumps({"gpu": "yes"}),
            "LEVERET_MAX_VMS": "3",
            "LEVERET_METRICS_PORT": str(free_port(set())),
        }
        house.add_fake_hosts("kept", 1, **more)
        house.wait_ready()
        yield house


@pytest.fixture
def cli(fleet: Installation, tmp_path: Path) -> Iterator[Cli]:
    """The command as an administrator runs it; it leaves neither VMs nor groups."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LEVERET_URL": fleet.url, "LEVERET_TOKEN": fleet.token}
    made = Cli(tmp_path, env)
    eventually(lambda: len(made.json("host", "list")) == 5, "all hosts are there")
    yield made
    if mine := made("list", "-o", "name").stdout.split():
        made("delete", "--wait", *mine)
    if groups := made("group", "list", "-o", "name").stdout.split():
        made("group", "delete", *groups)


def hosts_of(cli: Cli, *names: str) -> list[Any]:
    return [cli.json("show", name)["host"] for name in names]


def test_several_are_made_at_once_and_their_names_are_told(cli: Cli) -> None:
    done = cli("create", "web", *SMALL, "--count", "3", "--wait", "running")
    assert done.stdout.splitlines() == ["web-1", "web-2", "web-3"]
    for name in ("web-1", "web-2", "web-3"):
        assert any(name in line and "scheduled" in line for line in done.stderr.splitlines()), done.stderr
        assert any(name in line and "running" in line for line in done.stderr.splitlines()), done.stderr
    assert [vm["state"] for vm in cli.json("list")] == ["running"] * 3
    told = cli("create", "web", *SMALL, "--count", "3", code=4).stderr
    assert "(name_taken)" in told
    assert len(cli.json("list")) == 3


def test_several_without_waiting_and_as_documents(cli: Cli) -> None:
    made = cli.json("create", "no", *SMALL, "--count", "2", "--no-wait")
    assert [vm["name"] for vm in made] == ["no-1", "no-2"]
    pleasant = cli("create", *SMALL, "--count", "2", "--wait", "running").stdout.split()
    assert len(set(pleasant)) == 2
    assert {vm["name"] for vm in cli.json("list")} == {"no-1", "no-2", *pleasant}


def test_a_hard_group_never_has_two_on_one_host_and_says_so_when_there_is_no_other(cli: Cli) -> None:
    assert "join it" in cli("group", "create", "db").stderr
    names = cli("create", "db", *SMALL, "--count", "4", "--group", "db", "--wait", "running").stdout.split()
    assert max(Counter(hosts_of(cli, *names)).values()) == 1
    assert cli.json("group", "show", "db")["vms"] == 4
    told = cli("create", "fifth", *SMALL, "--group", "db", code=5).stderr
    assert "(no_capacity)" in told
    assert "4 of 5 hosts are ruled out by its group" in told
    assert f"it would fit with --tolerate {TAINT} (1 host)" in told
    assert "fifth" not in cli("list").stdout
    assert "(group_in_use)" in cli("group", "delete", "db", code=4).stderr
    assert "no two on one host" in cli("group", "show", "db").stdout


def test_groups_are_listed_made_again_and_gone(cli: Cli) -> None:
    cli("group", "create", "a", "--policy", "pack", "--topology", "zone", "--soft")
    cli("group", "create", "a", "--policy", "pack", "--topology", "zone", "--soft")
    assert "(name_taken)" in cli("group", "create", "a", code=4).stderr
    assert "all in one zone, as far as there is room" in cli("group", "show", "a").stdout
    (listed,) = cli.json("group", "list")
    told = tuple(listed[field] for field in ("name", "policy", "enforcement", "topology"))
    assert told == ("a", "pack", "soft", "zone")
    assert "(group_unknown)" in cli("create", "x", *SMALL, "--group", "nobody", code=2).stderr
    cli("group", "delete", "a")
    assert "(group_not_found)" in cli("group", "show", "a", code=3).stderr
    assert "(group_not_found)" in cli("group", "delete", "a", code=3).stderr


def test_a_tainted_host_is_for_those_who_tolerate_it(cli: Cli, fleet: Installation) -> None:
    (kept,) = [host for host in cli.json("host", "list") if host["taints"]]
    assert (kept["zone"], kept["taints"], kept["vms_max"]) == ("lab", {"gpu": "yes"}, 3)
    assert TAINT in cli("host", "list").stdout
    assert "0 of 3" in cli("host", "show", kept["name"]).stdout
    told = cli("create", "x", *SMALL, "--zone", "lab", code=5).stderr
    assert "4 of 5 hosts are in another zone" in told
    assert "1 of 5 hosts are kept for others (tainted); 1 for this reason alone" in told
    cli("create", "x", *SMALL, "--zone", "lab", "--tolerate", TAINT, "--wait", "running")
    assert hosts_of(cli, "x") == [kept["name"]]
    cli("create", "y", *SMALL, "--on-host", kept["name"], "--tolerate", TAINT, "--wait", "running")
    assert hosts_of(cli, "y") == [kept["name"]]


def test_only_administrators_name_hosts(cli: Cli) -> None:
    token = cli.json("token", "create", "plain", "--role", "member")["token"]
    (cli.root / "token").write_text(token + "\n")
    (cli.root / "token").chmod(0o600)
    host = cli("host", "list", "-o", "name").stdout.split()[0]
    told = cli("--token-file", str(cli.root / "token"), "create", "x", *SMALL, "--on-host", host, code=2).stderr
    assert "(forbidden)" in told


def test_capacity_counts_what_fits_and_falls_with_every_vm(cli: Cli) -> None:
    lab = ("--zone", "lab", "--tolerate", TAINT)
    before = cli.json("capacity", *lab)
    assert before["zones"]["lab"] == before["total"] == 3
    cli("create", "x", *SMALL, *lab, "--wait", "running")
    eventually(lambda: cli.json("capacity", *lab)["total"] == 2, "one fits less")
    everywhere = cli.json("capacity", "--memory", "128M", "--disk", "1G")
    assert everywhere["total"] == sum(everywhere["zones"].values()) > 3
    table = [line.split() for line in cli("capacity", *lab).stdout.splitlines()]
    assert table[0] == ["ZONE", "VMS"]
    assert table[-1] == ["all", "2"]
    assert cli("capacity", *lab, "-o", "name").stdout.strip() == "2"


def test_who_waits_for_room_says_why_and_goes_on_when_there_is_some(cli: Cli) -> None:
    lab = ("--zone", "lab", "--tolerate", TAINT)
    first, *_ = cli("create", "full", *SMALL, *lab, "--count", "3", "--wait", "running").stdout.split()
    assert "(no_capacity)" in cli("create", "late", *SMALL, *lab, code=5).stderr
    cli("create", "late", *SMALL, *lab, "--wait-for-capacity", "--no-wait")
    vm = cli.json("show", "late")
    assert (vm["state"], vm["step"], vm["problem"]["code"]) == ("pending", "waiting_for_capacity", "no_capacity")
    assert "waiting for capacity" in cli("list").stdout
    explained = cli("explain", "late").stdout
    assert "on no host" in explained
    assert "1 of 5 hosts have as many VMs as they take" in explained
    with cli.start("create", "later", *SMALL, *lab, "--wait-for-capacity", "--wait", "running") as watched:
        eventually(lambda: "later" in cli("list").stdout, "the second waits too")
        cli("delete", "--wait", first)
        eventually(lambda: cli.json("show", "late")["state"] == "running", "the first that waited has its room")
        cli("delete", "--wait", "full-2")
        told, progress = watched.communicate(timeout=60)
    assert watched.returncode == 0, progress
    assert told.split() == ["later"]
    assert "no room yet" in progress
    assert "scheduled" in progress


def test_explain_says_where_a_vm_stands_and_why(cli: Cli) -> None:
    cli("create", "x", *SMALL, "--wait", "running")
    explained = cli("explain", "x").stdout
    host = cli.json("show", "x")["host"]
    assert f"attempt 1 on {host}" in explained
    assert "looked at could take it" in explained
    assert "chosen by" in explained
    placement = cli.json("explain", "x")["placement"]
    assert placement["host"] == placement["tried"][0]["host"] == host
    assert placement["tried"][0]["score"]


def test_all_or_none_of_several_are_made(cli: Cli) -> None:
    lab = ("--zone", "lab", "--tolerate", TAINT)
    told = cli("create", "many", *SMALL, *lab, "--count", "4", code=5).stderr
    assert "of 4 VMs 3 would fit" in told
    assert cli("list", "-o", "name").stdout == ""
    assert "It would be accepted now" in cli("create", "m", *SMALL, *lab, "--count", "3", "--dry-run").stderr
    cli("create", "many", *SMALL, *lab, "--count", "4", "--dry-run", code=5)
    assert cli("list", "-o", "name").stdout == ""


def test_groups_and_zones_are_completed(cli: Cli) -> None:
    cli("group", "create", "blue")

    def completed(*words: str) -> set[str]:
        line = " ".join(["leveret", *words, ""])
        env = {**cli.env, "_LEVERET_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) + 1)}
        done = subprocess.run([LEVERET], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert not done.stderr
        return set(done.stdout.split())

    assert "blue" in completed("group", "show")
    assert "blue" in completed("create", "--group")
    assert completed("create", "--zone") == completed("capacity", "--zone") >= {"default"}
