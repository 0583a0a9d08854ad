"""Leveret's own processes on this machine: start them, judge them, stop them."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2

from leveret.stack.layout import write_private
from leveret.stack.process import Daemon

DRAIN_S = 15.0
_PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Check:
    """How to see that a process is of use: `url` answers 200, and its answer holds every one of `marks`.

    Without a url it is ready when it runs; a host shows elsewhere that it is.
    """

    url: str | None = None
    marks: tuple[str, ...] = ()

    def passes(self) -> bool:
        if self.url is None:
            return True
        try:
            answer = httpx2.get(self.url, timeout=_PROBE_TIMEOUT_S, trust_env=False, verify=False)
        except httpx2.TransportError:
            return False
        return answer.is_success and all(mark in answer.text for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Service:
    """One process: a module to run with its arguments, and its settings."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    check: Check = Check()

    @property
    def fingerprint(self) -> str:
        """Another one whenever it would have to be started differently. Settings hold passwords: it is a hash."""
        text = json.dumps([version("leveret"), sys.executable, self.argv, sorted(self.env.items())])
        return hashlib.sha256(text.encode()).hexdigest()


class Runner:
    """The services of one installation. What it must know later stands in `<name>.json` beside their pid files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def daemon(self, name: str) -> Daemon:
        return Daemon(name, self._directory)

    def known(self) -> list[str]:
        """The services that belong to the installation, whether they run or not."""
        return sorted(file.stem for file in self._directory.glob("*.json"))

    def check_of(self, name: str) -> Check:
        kept = self._kept(name)
        return Check(kept["check"]["url"], tuple(kept["check"]["marks"])) if kept else Check()

    def ensure(self, service: Service) -> bool:
        """Have it running with these settings; one that runs with others is restarted. Whether it had to be started."""
        daemon, kept = self.daemon(service.name), self._kept(service.name)
        if daemon.is_running() and kept and kept["fingerprint"] == service.fingerprint:
            return False
        daemon.stop(DRAIN_S)
        # Written before the start: killed in between, the next `ensure` finds a stopped service and starts it.
        document = {"fingerprint": service.fingerprint, "check": asdict(service.check)}
        write_private(self._file(service.name), json.dumps(document))
        daemon.start([sys.executable, "-m", *service.argv], env=service.env)
        return True

    def wait_ready(self, service: Service, timeout_s: float) -> None:
        """Raises ProcessExitedError or NotReadyError with the end of its log."""
        self.daemon(service.name).wait_ready(service.check.passes, timeout_s)

    def stop(self, names: Iterable[str], on_stopped: Callable[[str], None]) -> None:
        """Stop these at the same time; each finishes what it has in hand. Those that do not run are not mentioned."""
        running = [name for name in names if self.daemon(name).is_running()]

        def stop_one(name: str) -> str:
            self.daemon(name).stop(DRAIN_S)
            return name

        with ThreadPoolExecutor(max_workers=max(1, len(running))) as pool:
            for name in pool.map(stop_one, running):
                on_stopped(name)

    def forget(self, name: str) -> None:
        """It does not belong to the installation any more. Its log stays."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _kept(self, name: str) -> dict[str, Any] | None:
        try:
            document: dict[str, Any] = json.loads(self._file(name).read_text())
        except FileNotFoundError:
            return None
        return document
