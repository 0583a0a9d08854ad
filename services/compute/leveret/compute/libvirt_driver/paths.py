"""Where everything lies in the pool: every path follows from an id, so that any half-done state can be found again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

#: QEMU runs as another user than the worker and must get through to its files; nobody needs to list them.
DIRECTORY_MODE = 0o711
FILE_MODE = 0o600


@dataclass(frozen=True, slots=True)
class VmPaths:
    """The files of one VM."""

    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk.qcow2"

    @property
    def config_drive(self) -> Path:
        return self.directory / "config.iso"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def console_mark(self) -> Path:
        return self.directory / "console.mark"


@dataclass(frozen=True, slots=True)
class Pool:
    """The directory that holds all files of the worker."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def dhcp(self) -> Path:
        """A directory for each network, in it a file for each VM."""
        return self.root / "dhcp"

    def image(self, sha256: str, image_format: str) -> Path:
        return self.images / f"{sha256}.{image_format}"

    def vm(self, vm_id: UUID) -> VmPaths:
        return VmPaths(self.root / str(vm_id))

    def make(self) -> None:
        """Create what is missing. Blocking."""
        for directory in (self.root, self.images):
            make_directory(directory)

    def vms(self) -> frozenset[UUID]:
        """The VMs that have a directory. Blocking."""
        found = set()
        for entry in os.scandir(self.root):
            if (vm_id := _as_id(entry.name)) is not None:
                found.add(vm_id)
        return frozenset(found)


def _as_id(name: str) -> UUID | None:
    try:
        vm_id = UUID(name)
    except ValueError:
        return None
    return vm_id if str(vm_id) == name else None


def make_directory(directory: Path) -> None:
    """Create it, with its parents, so that QEMU gets through whatever the umask. Blocking."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(DIRECTORY_MODE)


def fsync_directory(directory: Path) -> None:
    """Make renames and removals in a directory durable. Blocking."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, durably, when the block ends well. Blocking.

    The temporary name is always the same: what a killed worker left is overwritten by the next try. Callers see
    to it that one file is made by one at a time.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
