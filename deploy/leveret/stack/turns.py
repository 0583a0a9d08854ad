"""Taking turns: one `up` or `down` of an installation at a time, and what it tells meanwhile."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from leveret.stack.layout import Layout


class Progress(Protocol):
    """Who tells the user how it goes."""

    def doing(self, what: str) -> None: ...
    def done(self, name: str, note: str = "") -> None: ...


@contextmanager
def alone(layout: Layout, progress: Progress) -> Iterator[None]:
    """One `up` or `down` at a time; another one waits for it."""
    with layout.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.doing("another `leveret up` or `leveret down` is under way: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
