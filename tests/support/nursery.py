"""A nursery: a process that has imported Leveret's services already and forks them, so that a killed one is soon back.

What it forks is the real process: main() with its own environment, log and pid file. Only the importing is spared,
which is most of what a start costs.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from leveret.stack.process import BASE_ENV, Daemon, ProcessIdentity

MODULES = ("leveret.conductor.app", "leveret.api.app", "leveret.compute.app")


class Nursery:
    """The side of who wants processes."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(BASE_ENV)
        )

    def start(self, daemon: Daemon, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Have this daemon running: `argv` is a module and its arguments."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        wish = {"argv": list(argv), "env": {**BASE_ENV, **env}, "log": str(daemon.log_file)}
        print(json.dumps(wish), file=self._parent.stdin, flush=True)
        identity = ProcessIdentity.of(int(self._parent.stdout.readline()))
        if identity is not None:
            pending = daemon.pid_file.with_suffix(".pid.new")
            pending.write_text(json.dumps(asdict(identity)))
            pending.replace(daemon.pid_file)

    def close(self) -> None:
        self._parent.communicate(timeout=10)


def _fork_for_ever() -> None:
    """Read wishes, one a line, and answer with the pids of the children."""
    for module in MODULES:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in iter(sys.stdin.readline, ""):
        wish = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(wish["argv"], wish["env"], Path(wish["log"]))
        print(pid, flush=True)


def _become(argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    os.chdir("/")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, descriptor)
    sys.argv = list(argv)
    try:
        code = sys.modules[argv[0]].main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    _fork_for_ever()
