"""The host's image cache: `<pool>/images/<sha256>.<format>`, each checked once and never changed afterwards."""

import asyncio
import errno
import hashlib
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import psutil
import structlog

from leveret.compute.libvirt_driver import qemu_img
from leveret.compute.libvirt_driver.fetching import Fetcher
from leveret.compute.libvirt_driver.lane import Lane
from leveret.compute.libvirt_driver.paths import Pool, fsync_directory
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.messages import Image

log = structlog.get_logger()

T = TypeVar("T")

GIB = 1024**3
#: How often a fetch of unknown length looks at the space that is left.
SPACE_EVERY_BYTES = 64 * 1024 * 1024
_TEMPORARY = ".fetching"
#: What an image may have more than the disk it is for: its own tables, and snapshots. Nobody waits for an endless one.
SLACK = 2


class Images:
    """Fetches, checks, keeps and forgets base images. All blocking work goes through `files`."""

    def __init__(self, pool: Pool, settings: LibvirtSettings, files: Lane) -> None:
        self._pool = pool
        self._settings = settings
        self._files = files
        self._fetcher = Fetcher(settings, self._in_thread)
        self._fetches: dict[Image, _Fetch] = {}
        self._in_use: Counter[Path] = Counter()
        self._doomed: dict[Path, asyncio.Future[None]] = {}

    def path(self, image: Image) -> Path:
        return self._pool.image(image.sha256, image.format)

    @asynccontextmanager
    async def using(self, image: Image, disk_gib: int) -> AsyncIterator[Path]:
        """The image's file, fetched if need be; it is not collected while the block runs.

        Raises LeveretError: `image_unreachable`, `image_forbidden`, `image_too_large`, `image_hash_mismatch`,
        `image_invalid` or `disk_full`.
        """
        path = self.path(image)
        while (leaving := self._doomed.get(path)) is not None:
            await asyncio.shield(leaving)
        self._in_use[path] += 1
        try:
            virtual_bytes = await self._in_thread(_touch, path, image)
            if virtual_bytes is None:
                await self._fetch_once(image, SLACK * disk_gib * GIB)
                virtual_bytes = await self._in_thread(_touch, path, image)
            if virtual_bytes is None:
                raise fail(Code.IMAGE_UNREACHABLE, f"{path.name} was removed from the cache by somebody else.")
            if virtual_bytes > disk_gib * GIB:
                needed = f"{virtual_bytes / GIB:.2f}".rstrip("0").rstrip(".")
                raise fail(Code.IMAGE_TOO_LARGE, f"The image is a disk of {needed} GiB; the VM's has {disk_gib} GiB.")
            yield path
        finally:
            self._in_use[path] -= 1
            if not self._in_use[path]:
                del self._in_use[path]

    async def sweep(self) -> None:
        """Remove what killed workers left of their fetches."""
        await self._in_thread(_sweep, self._pool.images)

    async def collect(self, keep_s: float) -> list[Path]:
        """Remove images that were last used more than `keep_s` ago and that no overlay is based on."""
        before = time.time() - keep_s
        removed = []
        for path in await self._in_thread(_unneeded, self._pool, before):
            if path in self._in_use or path in self._doomed:
                continue
            self._doomed[path] = asyncio.get_running_loop().create_future()
            try:
                if await self._in_thread(_remove_unneeded, self._pool, path, before):
                    removed.append(path)
                    log.info("image.collected", image=path.name)
            finally:
                self._doomed.pop(path).set_result(None)
        return removed

    async def check_space(self, needed_bytes: int) -> None:
        """Raises `disk_full` when this many bytes more would touch the reserve."""
        free_bytes = await self._in_thread(_free_bytes, self._pool.root)
        reserve_bytes = self._settings.disk_reserve_gib * GIB
        if free_bytes - needed_bytes < reserve_bytes:
            raise fail(
                Code.DISK_FULL,
                f"The pool has {free_bytes / GIB:.1f} GiB free, {needed_bytes / GIB:.1f} GiB are needed and "
                f"{self._settings.disk_reserve_gib:g} GiB are kept in reserve.",
            )

    async def _fetch_once(self, image: Image, most_bytes: int) -> None:
        """Fetch, or wait for the fetch under way. A failure is everybody's who waited; the next one tries anew.

        The fetch goes on while one of those who wait for it is left, up to what the largest of their disks can be of.
        """
        fetch = self._fetches.get(image)
        if fetch is None:
            fetch = self._fetches[image] = _Fetch(self._settings.image_max_bytes)
            fetch.task = asyncio.create_task(self._fetch(image, fetch), name=f"fetch-{image.sha256[:12]}")
            fetch.task.add_done_callback(partial(self._fetch_ended, image, fetch))
        fetch.allow(most_bytes)
        fetch.waiting += 1
        try:
            await asyncio.shield(fetch.task)
        finally:
            fetch.waiting -= 1
            if not fetch.waiting and not fetch.task.done():
                self._fetch_ended(image, fetch)
                fetch.task.cancel()
                await asyncio.wait((fetch.task,))

    def _fetch_ended(self, image: Image, fetch: "_Fetch", *_task: object) -> None:
        if self._fetches.get(image) is fetch:
            del self._fetches[image]

    async def _fetch(self, image: Image, fetch: "_Fetch") -> None:
        temporary = (
            self._pool.images / f".{image.sha256}.{image.format}.{os.getpid()}.{secrets.token_hex(4)}{_TEMPORARY}"
        )
        started = time.monotonic()
        try:
            try:
                async with asyncio.timeout(self._settings.image_timeout_s):
                    size_bytes = await self._receive(image, temporary, fetch)
            except TimeoutError as error:
                raise fail(
                    Code.IMAGE_UNREACHABLE, f"The image did not arrive within {self._settings.image_timeout_s:g} s."
                ) from error
            await self._inspect(temporary, image)
            await self._in_thread(_keep, temporary, self.path(image))
        except OSError as error:
            raise _disk_error(error) from error
        finally:
            await self._in_thread(temporary.unlink, True)
        seconds = round(time.monotonic() - started, 3)
        log.info("image.fetched", image=self.path(image).name, bytes=size_bytes, seconds=seconds)

    async def _receive(self, image: Image, temporary: Path, fetch: "_Fetch") -> int:
        """Write the source's bytes to a file while they are hashed; their number."""
        digest = hashlib.sha256()
        size_bytes = checked_bytes = 0
        async with self._fetcher.open(image.url) as source:
            fetch.check_size(source.size_bytes or 0)
            await self.check_space(source.size_bytes or 0)
            file = await self._create(temporary)
            try:
                async for chunk in source.chunks:
                    size_bytes += len(chunk)
                    fetch.check_size(size_bytes)
                    if size_bytes - checked_bytes >= SPACE_EVERY_BYTES:
                        checked_bytes = size_bytes
                        await self.check_space(0)
                    await self._in_thread(_write, file, digest, chunk)
            finally:
                file.close()
            if source.size_bytes is not None and size_bytes != source.size_bytes:
                raise fail(
                    Code.IMAGE_UNREACHABLE, f"The image was cut short: {size_bytes} of {source.size_bytes} bytes came."
                )
        if (found := digest.hexdigest()) != image.sha256:
            raise fail(
                Code.IMAGE_HASH_MISMATCH, f"What arrived has sha256 {found}, not {image.sha256} ({size_bytes} bytes)."
            )
        return size_bytes

    async def _create(self, path: Path) -> BinaryIO:
        """A new file. Who is cancelled while it is made leaves no open one behind."""
        made: list[BinaryIO] = []
        unwanted = threading.Event()

        def create() -> None:
            made.append(path.open("xb", 0))
            if unwanted.is_set():  # it hung so long that it was given up
                made[0].close()
                path.unlink(missing_ok=True)

        try:
            await self._in_thread(create)
        except BaseException:
            unwanted.set()
            for file in made:
                file.close()
            raise
        return made[0]

    async def _inspect(self, path: Path, image: Image) -> None:
        header = await self._in_thread(qemu_img.read_header, path, image.format)
        if header.backing_file is not None:
            raise fail(Code.IMAGE_INVALID, "The image cannot be used: it has a backing file.")
        size = await qemu_img.check(path, image.format, timeout_s=self._settings.qemu_img_timeout_s)
        if image.format == "qcow2" and size != header.virtual_size_bytes:
            raise fail(Code.IMAGE_INVALID, "The image cannot be used: its size is not what its header says.")

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        doing = f"{getattr(call, '__name__', 'working')} in the image cache".replace("_", " ").strip()
        return await self._files.run(call, *args, timeout_s=self._settings.file_timeout_s, doing=doing)


class _Fetch:
    """One fetch under way, how many wait for it, and how much they wait for at most."""

    task: asyncio.Task[None]

    def __init__(self, host_max_bytes: int) -> None:
        self.waiting = 0
        self._host_max_bytes = host_max_bytes
        self._wanted_bytes = 0

    def allow(self, most_bytes: int) -> None:
        """Somebody waits for an image of up to so many bytes."""
        self._wanted_bytes = max(self._wanted_bytes, most_bytes)

    def check_size(self, size_bytes: int) -> None:
        """Raises `image_too_large` when nobody has any use for so many bytes."""
        if size_bytes > (limit := self._host_max_bytes):
            raise fail(Code.IMAGE_TOO_LARGE, f"The image has more than the {limit} bytes that this host fetches.")
        if size_bytes > (limit := self._wanted_bytes):
            disk_gib = limit // SLACK // GIB
            raise fail(
                Code.IMAGE_TOO_LARGE, f"The image has more than {limit} bytes; the VM's disk has {disk_gib} GiB."
            )


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn the errors of files into reasons."""
    try:
        yield
    except OSError as error:
        raise _disk_error(error, doing) from error


def _disk_error(error: OSError, doing: str = "writing to the pool") -> LeveretError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return fail(Code.DISK_FULL, f"The pool's file system is full, found while {doing}.")
    return fail(Code.DISK_FAILED, f"{error.strerror or error} while {doing}.")


def _touch(path: Path, image: Image) -> int | None:
    """Note that an image is used, and give its virtual size in bytes; None when it is not there."""
    try:
        os.utime(path)
        return qemu_img.read_header(path, image.format).virtual_size_bytes
    except FileNotFoundError:
        return None


def _write(file: BinaryIO, digest: Any, chunk: bytes) -> None:
    digest.update(chunk)
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


def _keep(temporary: Path, path: Path) -> None:
    fd = os.open(temporary, os.O_RDONLY)
    try:
        os.fchmod(fd, 0o444)  # QEMU reads it as another user; nobody writes it
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    fsync_directory(path.parent)


def _free_bytes(root: Path) -> int:
    stat = os.statvfs(root)
    return stat.f_bavail * stat.f_frsize


def _sweep(directory: Path) -> None:
    for path in directory.glob(f".*{_TEMPORARY}"):
        pid = path.suffixes[-3].removeprefix(".") if len(path.suffixes) >= 3 else ""
        if not _is_being_written(path, pid):
            path.unlink(missing_ok=True)


def _is_being_written(path: Path, pid: str) -> bool:
    """Whether the process that made a temporary file is still the one that has this id, and alive."""
    try:
        process = psutil.Process(int(pid))
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() <= path.stat().st_mtime
    except (ValueError, psutil.Error, FileNotFoundError):
        return False


def _unneeded(pool: Pool, before: float) -> list[Path]:
    """Images that were last used before a point in time and that are nobody's backing file."""
    old = [path for path in pool.images.iterdir() if not path.name.startswith(".") and path.stat().st_mtime < before]
    if not old:
        return []
    needed = _backing_files(pool)
    return [path for path in old if path not in needed]


def _backing_files(pool: Pool) -> set[Path]:
    needed = set()
    for vm_id in pool.vms():
        disk = pool.vm(vm_id).disk
        for overlay in (disk, disk.with_name(disk.name + ".tmp")):
            try:
                header = qemu_img.read_header(overlay, "qcow2")
            except FileNotFoundError:
                continue
            if header.backing_file is not None:
                needed.add(header.backing_file)
    return needed


def _remove_unneeded(pool: Pool, path: Path, before: float) -> bool:
    if path not in _unneeded(pool, before):
        return False
    path.unlink()
    fsync_directory(path.parent)
    return True
