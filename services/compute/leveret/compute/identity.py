"""Who a host is: an id made once, and an epoch that grows with every start of its worker.

Both stand in files, not in the machine's name: a renamed host is the same host.
"""

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4, uuid5

ID_FILE, EPOCH_FILE, LOCK_FILE = "host-id", "epoch", "lock"


class IdentityError(Exception):
    """The host's identity cannot be had; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Held by one process at a time, until `release` or its end."""

    host_id: UUID
    epoch: int
    lock_fd: int

    def of_simulated(self, index: int) -> UUID:
        """The id of the n-th simulated host of this process: the same at every start."""
        return uuid5(self.host_id, str(index))

    def release(self) -> None:
        os.close(self.lock_fd)


def take_identity(state_dir: Path) -> Identity:
    """The identity kept in this directory, made when there is none, in its next epoch.

    Raises IdentityError when another process has it, or when the id file is not an id: a new id is never made in
    its place, since the host's VMs are known under the old one.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock_fd = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_fd)
        raise IdentityError(f"Another worker runs with the identity in {state_dir}.") from error
    try:
        known = (state_dir / ID_FILE).exists()
        host_id = _read_id(state_dir / ID_FILE) if known else uuid4()
        if not known:
            _write(state_dir / ID_FILE, str(host_id))
        epoch = _next_epoch(state_dir / EPOCH_FILE, known=known)
        _write(state_dir / EPOCH_FILE, str(epoch))
    except BaseException:
        os.close(lock_fd)
        raise
    return Identity(host_id, epoch, lock_fd)


def _read_id(path: Path) -> UUID:
    try:
        return UUID(path.read_text().strip())
    except ValueError as error:
        raise IdentityError(
            f"{path} holds no host id. Write the host's id into it (`leveret hosts` lists them), or remove it to "
            "make this a new host."
        ) from error


def _next_epoch(path: Path, *, known: bool) -> int:
    """One more than the last. When the last was lost the seconds since 1970 stand in: more starts than any host had."""
    try:
        return int(path.read_text()) + 1
    except (FileNotFoundError, ValueError):
        return int(time.time()) if known else 1


def _write(path: Path, text: str) -> None:
    """Killed anywhere, the file is the old one or the new one, whole."""
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    fresh.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
