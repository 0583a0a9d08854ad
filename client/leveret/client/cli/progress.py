"""Steps with elapsed times on standard error: lines that stay, and on a terminal one below them that ticks."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from leveret.client.cli.output import paint
from leveret.client.cli.values import duration

if TYPE_CHECKING:
    from rich.status import Status


class Steps:
    """`done` writes a line, `doing` sets what the ticking line says. Without a terminal only the lines are written."""

    def __init__(self, started: float | None = None) -> None:
        self._started = time.monotonic() if started is None else started
        self._status: Status | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.hush()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def done(self, name: str, note: str = "", *, ok: bool = True, whose: str = "") -> None:
        """One step is over, now; `whose` says of which of several things."""
        elapsed = paint(duration(self.elapsed_s).rjust(7), "dim", sys.stderr)
        subject = f"{whose}  " if whose else ""
        line = f"{elapsed}  {subject}{paint(name.ljust(14), '' if ok else 'red', sys.stderr)}  {note}".rstrip()
        status = self._status
        if status is not None:
            status.stop()  # or its line would stay in the middle of ours
        print(line, file=sys.stderr, flush=True)
        if status is not None:
            status.start()

    def doing(self, what: str) -> None:
        """What is under way; nothing where nobody watches."""
        if not sys.stderr.isatty():
            return
        if self._status is None:
            from rich.console import Console
            from rich.status import Status

            console = Console(stderr=True, highlight=False, markup=False)
            self._status = Status(what, console=console, spinner="dots", spinner_style="dim")
            self._status.start()
        self._status.update(f"{what} ...")

    def say(self, text: str) -> None:
        """A line that is no step."""
        self.hush()
        print(text, file=sys.stderr, flush=True)

    def hush(self) -> None:
        """Take the ticking line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None
