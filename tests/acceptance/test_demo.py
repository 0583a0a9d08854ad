"""A newcomer's first minutes: from the checkout to a shell in a real guest, by one command; and then once more."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def env() -> Iterator[dict[str, str]]:
    root = Path(tempfile.mkdtemp(prefix="leveret-demo-"))
    root.chmod(0o755)
    env = os.environ | {"LEVERET_STATE_DIR": str(root / "state"), "XDG_CONFIG_HOME": str(root / "config")}
    env["PATH"] = f"{ROOT / '.venv/bin'}:{env['PATH']}"
    try:
        yield env
    finally:
        subprocess.run(["leveret", "down", "--purge"], env=env, check=True, timeout=120)
        shutil.rmtree(root, ignore_errors=True)


def demo(env: dict[str, str]) -> str:
    done = subprocess.run(
        [ROOT / "script/demo", "--virt-type", "qemu"], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_ends_in_a_guest_and_runs_again_with_the_same_one(env: dict[str, str]) -> None:
    first = demo(env)
    assert re.search(r"^Linux web ", first, re.MULTILINE)  # what uname said in there
    assert "This is my user-data" in first
    assert "LEVERET-GUEST-READY web" in first
    assert "guest ready" in first
    second = demo(env)
    assert "is used again" in second
    assert re.search(r"^Linux web ", second, re.MULTILINE)


def test_guests_that_down_shut_down_are_started_again_by_up(env: dict[str, str]) -> None:
    demo(env)
    down = subprocess.run(["leveret", "down"], env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "guests shut down: 1" in down.stderr
    up = subprocess.run(["leveret", "up"], env=env, capture_output=True, text=True, timeout=180, check=True)
    assert "started again: web" in up.stderr
    # `ssh` waits until the guest is ready; its answer shows that the disk, with its host key, is the same one.
    argv = ["leveret", "ssh", "web", "--timeout", "120", "--", "hostname"]
    said = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=180, check=True)
    assert said.stdout == "web\n"
