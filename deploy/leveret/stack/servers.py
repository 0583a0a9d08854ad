"""What all private servers have in common, and starting several of them at once."""

from collections.abc import Iterable
from typing import Protocol


class Server(Protocol):
    """A server that lives under one directory and outlives the process that started it."""

    def start(self) -> None:
        """Start it, or do nothing when it runs; returns before it is ready."""

    def wait_ready(self, timeout_s: float = ...) -> None:
        """Return when it serves; raises StackError with the tail of its log when it does not."""

    def is_running(self) -> bool:
        """Tell whether its main process is alive."""

    def stop(self) -> None:
        """Stop it in good order; the data stays."""

    def kill(self) -> None:
        """SIGKILL it, as a fault would."""

    def destroy(self) -> None:
        """Stop it and delete its directory."""


def start_all(servers: Iterable[Server], timeout_s: float = 60.0) -> None:
    """Start the servers side by side and return when all are ready; `timeout_s` is for each."""
    started = list(servers)
    for server in started:
        server.start()
    for server in started:
        server.wait_ready(timeout_s)
