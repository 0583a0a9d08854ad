"""/openapi.json is a contract: what it says is so, and a client can be made from it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import Installation, installed

from leveret.stack.layout import Options

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).resolve().parents[2]
#: Made by `script/setup --dev`, since it needs older packages than Leveret does.
GENERATOR = ROOT / "build/client-generator/bin"


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    with installed(Options(fake_hosts=4, libvirt=False)) as installation:
        asyncio.run(
            installation.query("INSERT INTO images VALUES ('debian-12', 'file:///debian-12', $1, 'qcow2')", "1" * 64)
        )
        yield installation


def test_every_operation_keeps_the_contract(installation: Installation, tmp_path: Path) -> None:
    explore(installation, tmp_path, "--max-examples=2", "--generation-deterministic")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_operation_keeps_the_contract_a_thousand_times(installation: Installation, tmp_path: Path) -> None:
    explore(installation, tmp_path, "--max-examples=1000", "--generation-database=none", "--suppress-health-check=all")


def explore(installation: Installation, directory: Path, *more: str) -> None:
    """Every phase and every check: examples, edges, chance, and sequences that follow the links."""
    command: list[str | Path] = [
        Path(sys.executable).parent / "schemathesis",
        "run",
        f"{installation.url}/openapi.json",
        f"--header=Authorization: Bearer {installation.token}",
        "--phases=examples,coverage,fuzzing,stateful",
        # The hooks have these two with what no schema can say.
        "--exclude-checks=positive_data_acceptance,use_after_free",
        "--continue-on-failure",
        "--request-timeout=20",
        "--workers=2",
        "--no-color",
        *more,
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "contract_hooks", "PYTHONPATH": str(ROOT / "tests/support")}
    done = subprocess.run(command, cwd=directory, env=os.environ | hooks, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]


def test_a_client_made_from_the_description_makes_a_vm(installation: Installation, tmp_path: Path) -> None:
    assert GENERATOR.exists(), "run script/setup --dev"
    environment = os.environ | {"PATH": f"{GENERATOR}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    use = ROOT / "tests/acceptance/generated_client/use.py"
    said = ""
    for command in (
        f"openapi-python-client generate --url={installation.url}/openapi.json --meta=none --fail-on-warning "
        f"--output-path={tmp_path}/generated",
        f"python {use} {installation.url} {installation.token}",
    ):
        program, *arguments = command.split()
        done = subprocess.run(
            [GENERATOR / program, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        said = done.stdout
        assert done.returncode == 0, said + done.stderr
    assert said.split() == ["accepted", "running", "renamed", "stale", "deleted"]
