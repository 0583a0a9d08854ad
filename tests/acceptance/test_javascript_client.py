"""Clients that know the published contract and nothing else of Leveret, in two languages, against an installation."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import Installation
from peers import eventually

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

HERE = Path(__file__).resolve().parent
JAVASCRIPT = HERE / "javascript"
USER = "shop"

without_node = pytest.mark.skipif(
    shutil.which("node") is None or not (JAVASCRIPT / "node_modules").exists(),
    reason="NO CLIENT IN JAVASCRIPT WAS TESTED: node or its packages are missing; script/setup --dev installs them",
)


@pytest.fixture(scope="module")
def installation(house: Installation) -> Iterator[Installation]:
    """An installation at which a broker user speaks for the project `default`."""
    house.rabbit.create_client(USER, "default")
    asyncio.run(house.query("INSERT INTO amqp_users (name, project_id, role) VALUES ($1, 'default', 'member')", USER))
    # A conductor makes the exchanges of all projects in the first seconds of its life.
    asyncio.run(eventually(lambda: has_events(house), within_s=30, what="the project's exchange"))
    yield house
    house.rabbit.delete_client(USER)
    asyncio.run(house.query("DELETE FROM amqp_users WHERE name = $1", USER))


def has_events(installation: Installation) -> bool:
    return "leveret.events.default" in installation.rabbit.ctl("list_exchanges", "name", "-p", "leveret")


def run(installation: Installation, *command: str | Path, **env: str) -> list[str]:
    """The lines that a client prints while it does its work."""
    told = {"AMQP_URL": installation.rabbit.url_of(USER), "PROJECT": "default", "IMAGE": "tiny"} | env
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env={**os.environ, **told})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def queues(installation: Installation) -> set[str]:
    """The names of our client's queues."""
    names = installation.rabbit.ctl("list_queues", "name", "-p", "leveret").split()
    return {name for name in names if name.startswith(f"client.{USER}.")}


@without_node
def test_a_client_in_javascript_lives_by_the_published_file_alone(installation: Installation) -> None:
    lines = run(installation, "node", JAVASCRIPT / "client.mjs")
    moves = [line for line in lines if line.endswith((".running.v1 running", ".stopped.v1 stopped", " deleted"))]
    assert moves == [
        "leveret.vm.running.v1 running",
        "leveret.vm.stopped.v1 stopped",
        "leveret.vm.running.v1 running",
        "leveret.vm.deleted.v1 deleted",
    ]
    verdicts = [line for line in lines if line.startswith("verdict ")]
    assert verdicts == [f"verdict accepted generation {generation}" for generation in (1, 1, 2, 3, 4)]
    (refused,) = (line for line in lines if line.startswith("refused "))
    assert refused.startswith("refused image_unknown - ")
    assert refused.endswith("or give its url and sha256.")
    made = asyncio.run(installation.query("SELECT state FROM vms WHERE labels ->> 'made' = 'in-javascript'"))
    assert [row["state"] for row in made] == ["deleted"]
    assert queues(installation) == set()


@without_node
def test_the_client_in_javascript_is_told_why_when_it_may_not(installation: Installation) -> None:
    with pytest.raises(AssertionError, match="ACCESS_REFUSED"):
        run(installation, "node", JAVASCRIPT / "client.mjs", PROJECT="other")


def test_a_client_in_plain_python_follows_a_vm_from_create_to_deleted(installation: Installation) -> None:
    lines = run(installation, sys.executable, HERE / "plain_client.py")
    assert lines[0].startswith("verdict {'request_id':")
    assert "'accepted': True" in lines[0]
    assert lines[-1] == "leveret.vm.deleted.v1 deleted"
    assert "leveret.vm.running.v1 running" in lines
