"""One detached process with a log and a pid file, which any later process can find, judge and stop."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from leveret.stack.account import Account
from leveret.stack.errors import NotReadyError, ProcessExitedError, StackError

POLL_S = 0.02
KILL_S = 10.0  # a SIGKILL that takes longer means a process stuck in the kernel
LOG_TAIL_LINES = 25

BASE_ENV: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}

# Says its own pid, then waits for the word: the pid file is written before the program runs, so a
# launcher that is killed half way leaves no process behind that nobody knows.
LAUNCH = 'echo $$; read -r _ || exit 1; exec "$@" </dev/null >&2'


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Which process exactly: a pid alone is reused, and a wall-clock start time moves with the clock."""

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """Describe a live process; None when there is none, or only its zombie."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()  # the name before may contain anything
        if fields[0] in "ZX":
            return None
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(pid, int(fields[19]), boot_id)


class Daemon:
    """A process of its own session, described by `<name>.pid` and `<name>.log` in a directory.

    Objects of this class hold no state: two of them over the same directory and name, in one process or
    in two, are the same daemon.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.pid_file = directory / f"{name}.pid"
        self.log_file = directory / f"{name}.log"

    @property
    def pid(self) -> int | None:
        """Return the process id while the process lives."""
        process = self.process()
        return None if process is None else process.pid

    def is_running(self) -> bool:
        """Tell whether the process that was started is alive: that very one, and not a zombie."""
        return self.process() is not None

    def process(self) -> psutil.Process | None:
        """Return a handle on the live process, or None."""
        try:
            known = ProcessIdentity(**json.loads(self.pid_file.read_text()))
        except FileNotFoundError:
            return None
        try:
            process = psutil.Process(known.pid)
        except psutil.NoSuchProcess:
            return None
        return process if ProcessIdentity.of(known.pid) == known else None

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        account: Account | None = None,
        cwd: Path = Path("/"),
    ) -> None:
        """Start the program detached: own session, no terminal, output to the log; a no-op when it runs.

        `env` is added to a minimal environment; the caller's own is not inherited. The log of the run
        before is kept as `<name>.log.1`. Raises StackError when nothing could be started at all; a
        program that ends at once is for `wait_ready` to report.
        """
        if self.is_running():
            return
        account = account or Account.current()
        if self.log_file.exists():
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        with (
            self.log_file.open("ab") as log,
            subprocess.Popen(
                ["/usr/bin/setsid", "--fork", "/bin/sh", "-c", LAUNCH, self.name, *argv],
                env={**BASE_ENV, **(env or {})},
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                **account.identity(),
            ) as launcher,
        ):
            self._release(launcher)

    def _release(self, launcher: "subprocess.Popen[str]") -> None:
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        line = launcher.stdout.readline()
        identity = ProcessIdentity.of(int(line)) if line else None
        if identity is None:
            raise StackError(f"{self.name} could not be started:\n{self.log_tail()}")
        pending = self.pid_file.with_suffix(".pid.new")
        pending.write_text(json.dumps(asdict(identity)))
        pending.replace(self.pid_file)
        launcher.stdin.write("go\n")

    def wait_ready(self, probe: Callable[[], bool], timeout_s: float) -> None:
        """Return as soon as `probe()` is true.

        Raises ProcessExitedError when the process ends first, NotReadyError after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not probe():
            if not self.is_running():
                raise ProcessExitedError(f"{self.name} ended before it was ready:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise NotReadyError(f"{self.name} was not ready after {timeout_s:g} s:\n{self.log_tail()}")
            time.sleep(POLL_S)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """Return the last lines of the log, each indented; says so when there are none."""
        try:
            text = self.log_file.read_text(errors="replace")
        except FileNotFoundError:
            text = ""
        tail = [f"  {line}" for line in text.splitlines()[-lines:]]
        return "\n".join(tail) or f"  (nothing in {self.log_file})"

    def stop(self, drain_s: float, sig: signal.Signals = signal.SIGTERM, *, children: bool = True) -> bool:
        """Ask the process to end, and make it end after `drain_s`; its children go with it unless kept.

        Return True when it left by itself, or was gone already.
        """
        process = self.process()
        polite = True
        if process is not None:
            family = _family(process) if children else [process]
            _signal(process, sig)
            polite = not _wait_gone([process], drain_s)
            _end(family)
        self.pid_file.unlink(missing_ok=True)
        return polite

    def kill(self, *, children: bool = True) -> None:
        """SIGKILL the process and all its children, as a power cut would; returns when they are gone."""
        process = self.process()
        if process is not None:
            _end(_family(process) if children else [process])
        self.pid_file.unlink(missing_ok=True)


def end_processes(pids: Sequence[int], drain_s: float) -> None:
    """SIGTERM these processes, SIGKILL what is left after `drain_s`, and wait until all are gone."""
    processes = []
    for pid in pids:
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    for process in processes:
        _signal(process, signal.SIGTERM)
    _wait_gone(processes, drain_s)
    _end(processes)


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [process]


def _signal(process: psutil.Process, sig: signal.Signals) -> None:
    try:
        process.send_signal(sig)
    except psutil.NoSuchProcess:
        return


def _is_gone(process: psutil.Process) -> bool:
    """A zombie counts as gone: nobody may ever collect it where process 1 is a plain program."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _wait_gone(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Return the processes that are still alive after `timeout_s`; none as soon as all are gone."""
    deadline = time.monotonic() + timeout_s
    while alive := [process for process in processes if not _is_gone(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return alive


def _end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        _signal(process, signal.SIGKILL)
    if stuck := _wait_gone(processes, KILL_S):
        raise StackError(f"processes {[process.pid for process in stuck]} survive SIGKILL")
