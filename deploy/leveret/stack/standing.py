"""`leveret status`: every process of this machine's installation, and whether it is of use."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil

from leveret.stack.errors import StackError
from leveret.stack.layout import Layout
from leveret.stack.libvirtd import Libvirtd, answers
from leveret.stack.ports import is_listening
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit, greets
from leveret.stack.services import Runner


@dataclass(frozen=True, slots=True)
class Standing:
    """One process. `not ready` means: it runs and is of no use yet."""

    name: str
    state: Literal["ready", "not ready", "stopped"]
    pid: int | None
    since: datetime | None
    log: Path


def standing(layout: Layout) -> list[Standing]:
    """Raises StackError when there is no installation here."""
    if not layout.exists():
        raise StackError(f"there is no installation in {layout.root}: `leveret up` makes one")
    rabbit, postgres, runner = Rabbit(layout.rabbitmq), Postgres(layout.postgres), Runner(layout.services)
    found = [
        _judge("postgres", postgres.pid, lambda: is_listening(postgres.port), postgres.log_file),
        _judge("rabbitmq", rabbit.pid, lambda: greets(rabbit.port), rabbit.log_file),
    ]
    libvirtd = Libvirtd(layout.libvirt)
    if libvirtd.directory.exists():
        found.append(_judge("libvirtd", libvirtd.pid, lambda: answers(libvirtd.uri, 5.0), libvirtd.log_file))
    for name in runner.known():
        daemon = runner.daemon(name)
        found.append(_judge(name, daemon.pid, runner.check_of(name).passes, daemon.log_file))
    return found


def _judge(name: str, pid: int | None, is_ready: Callable[[], bool], log: Path) -> Standing:
    if pid is None:
        return Standing(name, "stopped", None, None, log)
    try:
        since = datetime.fromtimestamp(psutil.Process(pid).create_time(), UTC)
    except psutil.NoSuchProcess:
        return Standing(name, "stopped", None, None, log)
    return Standing(name, "ready" if is_ready() else "not ready", pid, since, log)
