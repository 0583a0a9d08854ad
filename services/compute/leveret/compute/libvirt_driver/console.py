"""The guest's serial console, as virtlogd writes it: `console.log`, and `console.log.0`, `.1`, ... as it rotates."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from leveret.compute.libvirt_driver.paths import VmPaths

#: What guests print when they are up: our own appliance, and cloud-init.
_READY = re.compile(rb"LEVERET-GUEST-READY|Cloud-init v\. [^\r\n]{1,200}? finished at ")
#: Longer than any line that matters: as much of one increment is looked at again with the next.
_OVERLAP_BYTES = 512
_CHUNK_BYTES = 256 * 1024


@dataclass(slots=True)
class _Position:
    """How far one guest's console was read: a file, an offset in it, and the last bytes before that."""

    inode: int
    offset: int
    overlap: bytes = b""


@dataclass(slots=True)
class Readiness:
    """Looks for the announcement in what was written since the guest was started. Blocking; one call per guest at
    a time.

    Where the console stood at the start is kept beside it, so that another worker goes on where this one ended.
    """

    _positions: dict[Path, _Position] = field(default_factory=dict)
    _ready: set[Path] = field(default_factory=set)

    def started(self, paths: VmPaths) -> None:
        """The guest is about to be started or reset: what is on the console now does not count."""
        self.forget(paths)
        try:
            stat = paths.console.stat()
            mark = {"inode": stat.st_ino, "offset": stat.st_size}
        except FileNotFoundError:
            mark = {"inode": 0, "offset": 0}
        _write_mark(paths, mark)

    def forget(self, paths: VmPaths) -> None:
        self._positions.pop(paths.console, None)
        self._ready.discard(paths.console)

    def is_ready(self, paths: VmPaths) -> bool:
        console = paths.console
        if console in self._ready:
            return True
        position = self._positions.get(console)
        if position is None:
            mark = _read_mark(paths)
            if mark.get("ready"):
                self._ready.add(console)
                return True
            position = _Position(mark.get("inode", 0), mark.get("offset", 0))
            self._positions[console] = position
        if not _find_ready(console, position):
            return False
        self._ready.add(console)
        _write_mark(paths, {"inode": position.inode, "offset": position.offset, "ready": True})
        return True


def tail(console: Path, max_bytes: int) -> bytes:
    """The last bytes of a console, across its rotated files. Blocking."""
    found = b""
    for path in reversed(_oldest_first(console)):
        missing = max_bytes - len(found)
        if missing <= 0:
            break
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - missing))
                found = file.read(missing) + found
        except FileNotFoundError:  # rotated away just now
            continue
    return found


def _oldest_first(console: Path) -> list[Path]:
    rotated = [path for path in console.parent.glob(console.name + ".*") if path.suffix[1:].isdecimal()]
    rotated.sort(key=lambda path: int(path.suffix[1:]), reverse=True)
    return [*rotated, console]


def _find_ready(console: Path, position: _Position) -> bool:
    """Read on from a position, which moves; whether the announcement was in it."""
    try:
        if (stat := console.stat()).st_ino == position.inode and stat.st_size == position.offset:
            return False  # the usual case: nothing new
    except FileNotFoundError:
        return False
    files = _open_all(_oldest_first(console))
    try:
        inodes = [os.fstat(file.fileno()).st_ino for file in files]
        # A file that was rotated away entirely leaves a gap: then everything that is left counts.
        first = inodes.index(position.inode) if position.inode in inodes else 0
        for file, inode in zip(files[first:], inodes[first:], strict=True):
            if inode != position.inode:
                position.inode, position.offset = inode, 0
            if _scan(file, position):
                return True
    finally:
        for file in files:
            file.close()
    return False


def _open_all(paths: list[Path]) -> list[BinaryIO]:
    files: list[BinaryIO] = []
    for path in paths:
        try:
            files.append(path.open("rb"))
        except FileNotFoundError:
            continue
    return files


def _scan(file: BinaryIO, position: _Position) -> bool:
    if os.fstat(file.fileno()).st_size < position.offset:
        position.offset = 0  # somebody emptied it
    file.seek(position.offset)
    while chunk := file.read(_CHUNK_BYTES):
        position.offset += len(chunk)
        text = position.overlap + chunk
        if _READY.search(text):
            return True
        position.overlap = text[-_OVERLAP_BYTES:]
    return False


def _write_mark(paths: VmPaths, mark: dict[str, int]) -> None:
    """Not fsynced: what is lost in a power cut was about a guest that is gone with it."""
    temporary = paths.console_mark.with_name(paths.console_mark.name + ".tmp")
    temporary.write_text(json.dumps(mark))
    temporary.replace(paths.console_mark)


def _read_mark(paths: VmPaths) -> dict[str, int]:
    try:
        mark = json.loads(paths.console_mark.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}
