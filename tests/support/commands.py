"""The `leveret` command as people and scripts use it, with an installation of its own behind it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEVERET = str(Path(sys.executable).with_name("leveret"))
WITHIN_S = 60.0


@dataclass(frozen=True)
class Cli:
    """The command with an installation of its own."""

    root: Path
    env: dict[str, str]

    def __call__(self, *args: str, code: int = 0, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [LEVERET, *args], env=self.env, input=stdin, capture_output=True, text=True, timeout=110, check=False
        )
        assert done.returncode == code, f"{args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *args: str) -> Any:
        return json.loads(self(*args, "-o", "json").stdout)

    def start(self, *args: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [LEVERET, *args], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def process(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(one for one in self.json("status") if one["name"] == name)
        return found


@contextmanager
def installed() -> Iterator[Cli]:
    """An installation with three simulated hosts, in a directory that the servers' accounts can reach."""
    root = Path(tempfile.mkdtemp(prefix="leveret-cli-"))
    root.chmod(0o755)
    images = root / "images"
    images.mkdir()
    (images / "tiny-0.qcow2").touch()
    (images / "tiny-0.qcow2.sha256").write_text("0" * 64 + "\n")
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(root / "home"),
        "XDG_CONFIG_HOME": str(root / "config"),
        "LEVERET_STATE_DIR": str(root / "state"),
        "TERM": "xterm-256color",
    }
    made = Cli(root, env)
    try:
        made("up", "--fake-hosts", "3", "--images", str(images))
        yield made
    finally:
        made("down", "--purge")
        shutil.rmtree(root, ignore_errors=True)


def eventually(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not look():
        assert time.monotonic() < deadline, f"{what}: not within {WITHIN_S:.0f} s"
        time.sleep(0.05)


def stopped(cli: Cli) -> set[str]:
    done = subprocess.run([LEVERET, "status", "-o", "json"], env=cli.env, capture_output=True, timeout=60, check=False)
    return {one["name"] for one in json.loads(done.stdout) if one["state"] == "stopped"}


@contextmanager
def frozen(cli: Cli, name: str) -> Iterator[Callable[[], None]]:
    """A process that does not move until it is told to."""
    pid = cli.process(name)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield lambda: os.kill(pid, signal.SIGCONT)
    finally:
        os.kill(pid, signal.SIGCONT)
