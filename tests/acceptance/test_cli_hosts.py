"""Hosts through the command line, against a whole installation: taken out of use, silent, fenced, and back again."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Cli, eventually
from installation import Installation

pytestmark = pytest.mark.acceptance

VM = ("--memory", "128M", "--disk", "1G", "--image", "tiny")


@pytest.fixture
def cli(house: Installation, tmp_path: Path) -> Iterator[Cli]:
    """The command as an administrator of the installation that all share runs it; it leaves no VM and no mark."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LEVERET_URL": house.url,
        "LEVERET_TOKEN": house.token,
    }
    made = Cli(tmp_path, env)
    before = set(made("list", "-o", "name").stdout.split())
    yield made
    if mine := set(made("list", "-o", "name").stdout.split()) - before:
        made("delete", "--wait", *mine)
    assert {host["state"] for host in made.json("host", "list")} == {"up"}


@pytest.fixture
def thaw(house: Installation) -> Iterator[Callable[[], None]]:
    """All hosts are frozen from now on, until this is called or the test is over."""
    house.freeze("fake-hosts")
    yield lambda: house.thaw("fake-hosts")
    house.thaw("fake-hosts")


def state_of(cli: Cli, host: str) -> Any:
    return cli.json("host", "show", host)["state"]


def test_cordoned_hosts_keep_their_vms_and_get_no_more(cli: Cli) -> None:
    cli("create", "kept", *VM)
    home = cli.json("show", "kept")["host"]
    free, *rest = [name for name in cli("host", "list", "-o", "name").stdout.split() if name != home]
    told = cli("host", "cordon", home, *rest, "--reason", "new memory").stderr
    assert f"{home}: cordoned; its " in told
    assert cli("host", "list").stdout.count("new memory") == len(rest) + 1
    assert f"leveret host uncordon {home}" in cli("host", "show", home).stdout
    for name in ("new-one", "new-other"):
        cli("create", name, *VM, "--strategy", "spread")
        assert cli.json("show", name)["host"] == free
    assert cli.json("show", "kept")["state"] == "running"
    assert {host["state"] for host in cli.json("host", "uncordon", home, *rest)} == {"up"}
    assert cli("hosts", "-o", "name").stdout == cli("host", "list", "-o", "name").stdout


def test_orders_for_many_hosts_are_carried_out_though_one_is_not_there(cli: Cli) -> None:
    one, other = cli("host", "list", "-o", "name").stdout.split()[:2]
    told = cli("host", "cordon", one, "nowhere", other, "-o", "name", code=3)
    assert "(host_not_found)" in told.stderr
    assert set(told.stdout.split()) == {one, other}
    cli("host", "uncordon", one, other)


def test_a_host_that_speaks_is_not_fenced_and_one_with_vms_is_not_retired(cli: Cli) -> None:
    cli("create", "kept", *VM)
    host = cli.json("show", "kept")["host"]
    told = cli("host", "fence", host, "--proof", "I think so", "--yes", code=4).stderr
    assert "It does not look as if it was off." in told
    assert "(host_conflict)" in told
    assert "(host_conflict)" in cli("host", "retire", host, "--yes", code=4).stderr


@pytest.mark.timeout(300)
def test_a_silent_host_is_fenced_with_proof_and_let_work_when_it_is_back_and_clean(
    cli: Cli, house: Installation, request: pytest.FixtureRequest
) -> None:
    cli("create", "lasting", *VM, "--on-host-failure", "restart")
    vm = cli.json("show", "lasting")
    assert vm["on_host_failure"] == "restart"
    empty = next(host["name"] for host in cli.json("host", "list") if host["vms"] == 0)
    thaw = request.getfixturevalue("thaw")
    eventually(lambda: state_of(cli, empty) == state_of(cli, vm["host"]) == "silent", "the hosts are silent")

    explained = cli("explain", "lasting").stdout
    assert f"Host {vm['host']} is silent since " in explained
    assert f"leveret host fence {vm['host']} --proof" in explained
    assert "silent since" in cli("show", "lasting").stdout
    assert "running (host silent)" in cli("list").stdout
    asked = cli("host", "fence", vm["host"], "--proof", "all is dark", code=2).stderr
    assert "give --yes" in asked

    told = cli("host", "fence", empty, "--proof", "all is dark", "--yes").stderr
    assert "No VM stands on it." in told
    assert f"leveret host uncordon {empty}" in told
    shown = cli("host", "list").stdout
    assert any(empty in line and "fenced (not clean)" in line and "all is dark" in line for line in shown.splitlines())
    refused = cli("host", "uncordon", empty, code=4).stderr
    assert "(host_conflict)" in refused
    assert "Start it and its worker" in refused

    thaw()
    eventually(lambda: cli.json("host", "show", empty)["clean"] is True, "the host has shown that it is clean")
    assert state_of(cli, empty) == "fenced"
    cli("host", "uncordon", empty)
    assert state_of(cli, empty) == "up"
    eventually(lambda: state_of(cli, vm["host"]) == "up", "the other host takes up where it was")
    assert "Nothing is wrong" in cli("explain", "lasting").stdout
    log = cli("events", "-n", "20").stdout
    assert f"{empty}: all is dark (by token" in log
