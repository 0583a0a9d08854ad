"""Trying the pool: a small file goes to the disk and comes back."""

import errno
import os
from contextlib import suppress
from pathlib import Path

SIZE_BYTES = 4096


def probe(path: Path) -> None:
    """Write, read and remove a small file, by way of the disk itself. Raises OSError. Blocking.

    A worker that is killed meanwhile leaves the file; the next try overwrites it.
    """
    written = os.urandom(SIZE_BYTES)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, written)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what is read must not come from memory
        if os.pread(fd, SIZE_BYTES, 0) != written:
            raise OSError(errno.EIO, "What was written is not what is read")
    finally:
        os.close(fd)
        with suppress(FileNotFoundError):
            path.unlink()
