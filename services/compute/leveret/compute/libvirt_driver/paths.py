"""Where everything lies in the pool: every path follows from an id, so that any half-done state can be found again."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from heapq import nlargest
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

    def cached(self, at_most: int) -> tuple[str, ...]:
        """The sha256 of the images in the cache, those used last first: each use sets a file's time. Blocking."""
        used: dict[str, float] = {}
        for entry in os.scandir(self.images):
            if _IMAGE.fullmatch(entry.name):
                sha256 = entry.name.partition(".")[0]
                with suppress(FileNotFoundError):  # collected meanwhile
                    used[sha256] = max(used.get(sha256, 0.0), entry.stat().st_mtime)
        return tuple(nlargest(at_most, used, key=used.__getitem__))

    def leftovers(self, at_most: int) -> tuple[str, ...]:
        """The paths in the pool, from its root, that belong to nothing. Blocking.

        What is being fetched is not among them, nor what a file system itself puts there.
        """
        # In this order: a VM's directory is there before its lease and after it.
        leases = [path for path in self.dhcp.glob("*/*") if _as_id(path.name) is not None]
        vms = self.vms()
        found = [entry for entry in self.root.iterdir() if _as_id(entry.name) is None and entry.name not in _OWN_NAMES]
        found += [path for path in self.images.iterdir() if not _is_image(path)]
        found += [path for path in leases if _as_id(path.name) not in vms]
        return tuple(sorted(str(path.relative_to(self.root)) for path in found)[:at_most])


#: The file with which the worker tries the pool.
PROBE = "pool-probe"
#: What the worker keeps in the pool beside VMs: images, leases, and what it found out about KVM.
_OWN_NAMES = frozenset({"images", "dhcp", "kvm-probe.json", "kvm-probe.json.tmp", PROBE, "lost+found"})
_IMAGE = re.compile(r"[0-9a-f]{64}\.(qcow2|raw)")
#: A download takes no longer: an unfinished file that is older was left by a worker that was killed.
_UNFINISHED_S = 6 * 3600


def _is_image(path: Path) -> bool:
    """Whether it is one of the cache, or on the way there."""
    if _IMAGE.fullmatch(path.name):
        return True
    with suppress(FileNotFoundError):  # finished meanwhile
        return path.name.startswith(".") and time.time() - path.stat().st_mtime < _UNFINISHED_S
    return True


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
