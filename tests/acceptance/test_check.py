"""`leveret check` on a whole installation: all is well, or it says what is wrong and what repairs it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aio_pika
import httpx2
import pytest
from installation import Installation

from leveret.conductor.invariants import INVARIANTS
from leveret.shared import topology

pytestmark = pytest.mark.acceptance


def check(house: Installation, *args: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LEVERET_URL": house.url, "LEVERET_TOKEN": house.token}
    command = [str(Path(sys.executable).with_name("leveret")), "check", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=90)


@pytest.fixture
def tidy(house: Installation) -> Installation:
    """The installation without the dead letters that others have left in it, and at rest."""

    async def purge() -> None:
        async with await aio_pika.connect(house.rabbit.url) as connection:
            await (await (await connection.channel()).get_queue(topology.DEAD_QUEUE.name)).purge()
        await house.settle()

    asyncio.run(purge())
    return house


@contextmanager
def one_vcpu_too_many(house: Installation) -> Iterator[str]:
    """A host that counts one VCPU that nobody has; its name."""

    def move(by: str) -> list[Any]:
        return asyncio.run(
            house.query(
                f"UPDATE hosts SET vcpus_used = vcpus_used {by} 1 WHERE id = (SELECT min(id::text)::uuid FROM hosts) "
                "RETURNING name"
            )
        )

    [row] = move("+")
    try:
        yield str(row["name"])
    finally:
        move("-")


def test_an_installation_that_is_well_is_told_so(tidy: Installation) -> None:
    done = check(tidy)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines] == [["ok", invariant.name] for invariant in INVARIANTS]
    assert f"{len(INVARIANTS)} rules checked" in done.stderr
    assert f"{tidy.options.fake_hosts} hosts asked: all hold." in done.stderr


def test_what_is_broken_is_said_with_an_example_and_the_repair(tidy: Installation) -> None:
    [rule] = [one for one in INVARIANTS if one.name == "host_counters_match_placements"]
    with one_vcpu_too_many(tidy) as host:
        done = check(tidy, "--no-hosts")
        assert done.returncode == 5, done.stdout + done.stderr
        assert f"fail  {rule.name} (1)\n" in done.stdout
        assert f"host {host}" in done.stdout
        assert f"-> {rule.repair}" in done.stdout
        assert "1 broken." in done.stderr
        told = check(tidy, "-o", "json")
        assert told.returncode == 5
        report = json.loads(told.stdout)
        assert [one["name"] for one in report["rules"] if one["broken"]] == [rule.name]
        assert report["rules"][[one["name"] for one in report["rules"]].index(rule.name)]["examples"][0]["host"] == host
        assert check(tidy, "-o", "name").stdout.split() == [rule.name]
        assert measured(tidy, rule.name) == 1
    assert check(tidy, "-o", "yaml").returncode == 0


def measured(house: Installation, rule: str) -> float:
    """The gauge, at its worst over all conductors: one of them was asked."""
    values = []
    for name, service in house.services.items():
        if name.startswith("conductor"):
            text = httpx2.get(f"http://127.0.0.1:{service.env['LEVERET_METRICS_PORT']}/metrics").text
            head = f'leveret_invariant_violations{{name="{rule}"}} '
            values += [float(line.removeprefix(head)) for line in text.splitlines() if line.startswith(head)]
    return max(values)
