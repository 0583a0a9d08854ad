"""The image cache against real servers on loopback, some of them malicious, and against real qemu-img."""

import asyncio
import errno
import gzip
import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

import httpx2
import psutil
import pytest
from peers import eventually

from leveret.compute.libvirt_driver import fetching, images, qemu_img
from leveret.compute.libvirt_driver.images import Images
from leveret.compute.libvirt_driver.lane import Lane
from leveret.compute.libvirt_driver.paths import Pool
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, LeveretError
from leveret.shared.ids import new_id
from leveret.shared.messages import Image

pytestmark = pytest.mark.integration

LOOPBACK = (ip_network("127.0.0.1/32"),)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A qcow2 image of a disk of 1 MiB, with something on it."""
    return qcow2(tmp_path_factory.mktemp("plain"), size="1M")


def qcow2(directory: Path, *arguments: str, size: str) -> bytes:
    path = directory / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments, path, size], check=True)
    return path.read_bytes()


class World:
    """A pool, the directory that file: urls may name, and the cache."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.served = directory / "served"
        self.served.mkdir()
        self.pool = Pool(directory / "pool")
        self.pool.make()
        self.settings = LibvirtSettings(
            pool_dir=self.pool.root,
            image_dirs=(self.served,),
            image_inner_allowed=LOOPBACK,
            disk_reserve_gib=0,
            image_idle_s=2,
            image_timeout_s=10,
        )
        self.images = self.made()

    def made(self, **settings: Any) -> Images:
        self.settings = replace(self.settings, **settings)
        lane = Lane("files", width=4, max_hung=4, timeout_code=Code.DISK_FAILED)
        self.images = Images(self.pool, self.settings, lane)
        return self.images

    def image(self, content: bytes, url: str | None = None, image_format: Literal["qcow2", "raw"] = "qcow2") -> Image:
        sha256 = hashlib.sha256(content).hexdigest()
        if url is None:
            path = self.served / sha256
            path.write_bytes(content)
            url = f"file://{path}"
        return Image(url=url, sha256=sha256, format=image_format)

    async def fetch(self, image: Image, disk_gib: int = 1) -> Path:
        async with self.images.using(image, disk_gib) as path:
            return path

    async def refusal(self, image: Image, disk_gib: int = 1) -> LeveretError:
        """Why it is not fetched. Whatever the reason, nothing may be left of it."""
        with pytest.raises(LeveretError) as caught:
            await self.fetch(image, disk_gib)
        assert self.left() == []
        return caught.value

    def left(self) -> list[str]:
        return sorted(path.name for path in self.pool.images.iterdir())


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Site:
    """An HTTP server of our making."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked: list[bytes] = []

    def url(self, host: str = "127.0.0.1", path: str = "/image") -> str:
        return f"http://{host}:{self.port}{path}"


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Site]:
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            site.asked.append(await reader.readuntil(b"\r\n\r\n"))
            await handler(reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    site = Site(server.sockets[0].getsockname()[1])
    try:
        yield site
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answering(
    body: bytes, *, status: str = "200 OK", length: int | None = None, pause_s: float = 0, **headers: str
) -> Handler:
    """An answer; `length` is what it claims to have."""

    async def handler(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        lines.append(f"Content-Length: {len(body) if length is None else length}")
        writer.write("\r\n".join([f"HTTP/1.1 {status}", *lines, "Connection: close", "", ""]).encode())
        await writer.drain()
        await asyncio.sleep(pause_s)
        writer.write(body)

    return handler


async def silence(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def endless(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def trickle(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


# What arrives.


async def test_an_image_is_fetched_once_checked_and_read_only(world: World, plain: bytes) -> None:
    async with serving(answering(plain)) as site:
        image = world.image(plain, site.url())
        path = await world.fetch(image)
        await world.fetch(image)

        assert len(site.asked) == 1
    assert path == world.pool.images / f"{image.sha256}.qcow2"
    assert path.read_bytes() == plain
    assert path.stat().st_mode & 0o777 == 0o444
    assert world.left() == [path.name]


async def test_an_image_of_a_file_url_is_copied(world: World, plain: bytes) -> None:
    path = await world.fetch(world.image(plain))

    assert path.read_bytes() == plain


async def test_a_raw_image_needs_no_magic(world: World) -> None:
    content = os.urandom(4096)

    path = await world.fetch(world.image(content, image_format="raw"))

    assert path.suffix == ".raw"


async def test_ten_vms_share_one_fetch(world: World, plain: bytes) -> None:
    async with serving(answering(plain, pause_s=0.1)) as site:
        image = world.image(plain, site.url())
        paths = await asyncio.gather(*(world.fetch(image) for _ in range(10)))

        assert len(site.asked) == 1
    assert len(set(paths)) == 1


async def test_a_failure_is_shared_by_all_who_waited_and_not_remembered(world: World, plain: bytes) -> None:
    bodies = [b"", plain]

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answering(bodies.pop(0), pause_s=0.1)(reader, writer)

    async with serving(handler) as site:
        image = world.image(plain, site.url())
        results = await asyncio.gather(*(world.fetch(image) for _ in range(5)), return_exceptions=True)
        assert {type(result) for result in results} == {LeveretError}
        assert len(site.asked) == 1

        await world.fetch(image)


async def test_one_who_stops_waiting_does_not_stop_the_others(world: World, plain: bytes) -> None:
    release = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await answering(plain)(reader, writer)

    async with serving(handler) as site:
        image = world.image(plain, site.url())
        first, second = asyncio.create_task(world.fetch(image)), asyncio.create_task(world.fetch(image))
        await until(lambda: bool(site.asked))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        release.set()

        assert (await second).exists()
        assert len(site.asked) == 1


async def test_when_the_last_one_stops_waiting_the_fetch_ends_and_leaves_nothing(world: World, plain: bytes) -> None:
    async with serving(endless) as site:
        tasks = [asyncio.create_task(world.fetch(world.image(plain, site.url()))) for _ in range(2)]
        await until(lambda: bool(world.left()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert world.left() == []


async def test_one_who_comes_while_an_abandoned_fetch_ends_gets_a_new_one(world: World, plain: bytes) -> None:
    handlers: list[Handler] = [silence, answering(plain)]

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await handlers.pop(0)(reader, writer)

    async with serving(handler) as site:
        image = world.image(plain, site.url())
        first = asyncio.create_task(world.fetch(image))
        await until(lambda: bool(site.asked))
        first.cancel()
        await asyncio.sleep(0)

        assert (await world.fetch(image)).exists()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  (what it waits for happens elsewhere)
            await asyncio.sleep(0.005)


# What is refused.


async def test_another_content_is_refused_by_its_hash(world: World, plain: bytes) -> None:
    async with serving(answering(plain[:-1] + b"x")) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_HASH_MISMATCH


async def test_a_truncated_answer_is_refused(world: World, plain: bytes) -> None:
    async with serving(answering(plain[:1000], length=len(plain))) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_UNREACHABLE


async def test_an_endless_answer_ends_at_the_limit(world: World, plain: bytes) -> None:
    world.made(image_max_bytes=10 * 1024 * 1024)
    async with serving(endless) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_TOO_LARGE


async def test_an_endless_answer_ends_at_what_the_disk_can_be_of(
    world: World, plain: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "GIB", 1024 * 1024)
    async with serving(endless) as site:
        error = await world.refusal(world.image(plain, site.url()), disk_gib=3)

    assert error.problem.code is Code.IMAGE_TOO_LARGE
    assert "the VM's disk has 3 GiB" in error.problem.message


async def test_a_larger_disk_that_waits_for_the_same_image_lets_it_be_larger(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "GIB", 1024 * 1024)
    content = os.urandom(5 * 1024 * 1024)
    async with serving(answering(content, pause_s=0.2)) as site:
        image = world.image(content, site.url(), "raw")
        small, large = await asyncio.gather(
            world.fetch(image, disk_gib=1), world.fetch(image, disk_gib=5), return_exceptions=True
        )

    assert isinstance(small, LeveretError)  # it is there, and larger than this one's disk
    assert small.problem.code is Code.IMAGE_TOO_LARGE
    assert isinstance(large, Path)


async def test_an_answer_that_announces_too_much_is_not_read(world: World, plain: bytes) -> None:
    world.made(image_max_bytes=1000)
    async with serving(answering(plain, pause_s=60)) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_TOO_LARGE


@pytest.mark.parametrize("handler", [silence, answering(b"", length=1000, pause_s=60)], ids=["no answer", "no body"])
async def test_a_server_that_falls_silent_is_given_up(world: World, plain: bytes, handler: Handler) -> None:
    world.made(image_idle_s=0.2)
    async with serving(handler) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_UNREACHABLE


async def test_a_server_that_trickles_is_given_up_long_before_the_whole_time(world: World, plain: bytes) -> None:
    world.made(image_idle_s=0.5)
    async with serving(trickle) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_UNREACHABLE
    assert "256 KiB in 0.5 s" in error.problem.message


async def test_a_server_that_is_slow_is_given_up_after_the_whole_time(world: World, plain: bytes) -> None:
    world.made(image_timeout_s=0.5)
    async with serving(trickle) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_UNREACHABLE
    assert "0.5 s" in error.problem.message


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "204 No Content", "401 Unauthorized"])
async def test_an_error_of_the_server_is_told(world: World, plain: bytes, status: str) -> None:
    async with serving(answering(b"sorry", status=status)) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_UNREACHABLE
    assert status[:3] in error.problem.message


async def test_nobody_listening_is_told(world: World, plain: bytes) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = await world.refusal(world.image(plain, f"http://127.0.0.1:{unused.getsockname()[1]}/"))

    assert error.problem.code is Code.IMAGE_UNREACHABLE


async def test_bytes_count_as_they_are_sent_not_as_they_unpack(world: World, plain: bytes) -> None:
    """A small answer that unpacks to terabytes is not unpacked."""
    packed = gzip.compress(plain)
    async with serving(answering(packed, Content_Encoding="gzip")) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_HASH_MISMATCH
    assert hashlib.sha256(packed).hexdigest() in error.problem.message


async def test_secrets_in_a_query_are_not_repeated(world: World, plain: bytes) -> None:
    async with serving(answering(b"", status="403 Forbidden")) as site:
        error = await world.refusal(world.image(plain, site.url(path="/image?signature=s3cr3t")))

    assert "s3cr3t" not in str(error.problem)


# Where it may come from.


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "192.168.1.1", "0.0.0.0",
             "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]", "[2002:7f00:1::]", "[64:ff9b::7f00:1]", "100.64.0.1",
             "224.0.0.1", "255.255.255.255", "2130706433", "0x7f.1"]
)  # fmt: skip
async def test_inner_addresses_are_not_asked(
    world: World, plain: bytes, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.made(image_inner_allowed=())

    async def connected(*_: object, **__: object) -> None:
        raise AssertionError("it was asked")

    monkeypatch.setattr(httpx2.AsyncClient, "send", connected)
    error = await world.refusal(world.image(plain, f"http://{host}:1/image"))

    assert error.problem.code is Code.IMAGE_FORBIDDEN


async def test_a_name_with_one_inner_address_among_public_ones_is_refused(
    world: World, plain: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, [["93.184.216.34", "10.0.0.1"]])

    error = await world.refusal(world.image(plain, "http://images.example/image"))

    assert error.problem.code is Code.IMAGE_FORBIDDEN


async def test_the_address_that_was_checked_is_the_one_that_is_asked(
    world: World, plain: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that resolves to something else when it is asked for a second time gains nothing by it."""
    resolved = resolving(monkeypatch, [["127.0.0.1"], ["10.255.255.1"]])
    async with serving(answering(plain)) as site:
        await world.fetch(world.image(plain, site.url("images.example")))

        assert f"Host: images.example:{site.port}".encode() in site.asked[0]
    assert resolved == ["images.example"]


def resolving(monkeypatch: pytest.MonkeyPatch, answers: list[list[str]]) -> list[str]:
    """Let names resolve to these addresses, one answer after the other; literal addresses to themselves."""
    asked: list[str] = []

    async def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
        if host.replace(".", "").isdecimal():
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port))]
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    return asked


async def test_a_redirect_is_followed(world: World, plain: bytes) -> None:
    async with (
        serving(answering(plain)) as there,
        serving(answering(b"", status="302 Found", Location=there.url())) as here,
    ):
        path = await world.fetch(world.image(plain, here.url()))

    assert path.exists()


async def test_a_relative_redirect_is_followed(world: World, plain: bytes) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        moved = b"/there" not in site.asked[-1]
        answer = answering(b"", status="307 Moved", Location="there") if moved else answering(plain)
        await answer(reader, writer)

    async with serving(handler) as site:
        assert (await world.fetch(world.image(plain, site.url()))).exists()


@pytest.mark.parametrize(
    "target",
    [
        "http://10.0.0.1/image",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "http://u:p@127.0.0.1/",
        "ftp://x/",
    ],
)
async def test_a_redirect_inwards_is_refused(world: World, plain: bytes, target: str) -> None:
    async with serving(answering(b"", status="302 Found", Location=target)) as site:
        error = await world.refusal(world.image(plain, site.url()))

    assert error.problem.code is Code.IMAGE_FORBIDDEN


async def test_redirects_have_an_end(world: World, plain: bytes) -> None:
    async with serving(answering(b"", status="302 Found", Location="/again")) as site:
        error = await world.refusal(world.image(plain, site.url()))

        assert len(site.asked) == fetching.MAX_REDIRECTS + 1
    assert error.problem.code is Code.IMAGE_UNREACHABLE


@pytest.mark.parametrize("trick", ["outside", "link", "linked directory", "dots", "directory", "pipe"])
async def test_files_outside_of_the_allowed_directories_are_not_read(
    world: World, plain: bytes, tmp_path: Path, trick: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "image").write_bytes(plain)
    path = world.served / "image"
    if trick == "outside":
        path = outside / "image"
    elif trick == "link":
        path.symlink_to(outside / "image")
    elif trick == "linked directory":
        (world.served / "linked").symlink_to(outside)
        path = world.served / "linked" / "image"
    elif trick == "dots":
        path = Path(f"{world.served}/../outside/image")
    elif trick == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)

    error = await world.refusal(world.image(plain, f"file://{path}"))

    assert error.problem.code is Code.IMAGE_FORBIDDEN


async def test_without_allowed_directories_no_file_is_read(world: World, plain: bytes) -> None:
    image = world.image(plain)
    world.made(image_dirs=())

    assert (await world.refusal(image)).problem.code is Code.IMAGE_FORBIDDEN


async def test_a_file_that_is_not_there_is_said_to_be_unreachable(world: World, plain: bytes) -> None:
    error = await world.refusal(world.image(plain, f"file://{world.served}/nothing"))

    assert error.problem.code is Code.IMAGE_UNREACHABLE


# What is in it.


async def test_an_image_with_a_backing_file_is_refused(world: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 4096)

    error = await world.refusal(world.image(qcow2(tmp_path, "-b", str(secret), "-F", "raw", size="1M")))

    assert error.problem.code is Code.IMAGE_INVALID


async def test_an_image_with_its_data_elsewhere_is_refused(world: World, tmp_path: Path) -> None:
    error = await world.refusal(world.image(qcow2(tmp_path, "-o", f"data_file={tmp_path}/data", size="1M")))

    assert error.problem.code is Code.IMAGE_INVALID


async def test_an_image_of_another_format_is_refused(world: World) -> None:
    error = await world.refusal(world.image(b"#!/bin/sh\n" * 100))

    assert error.problem.code is Code.IMAGE_INVALID


async def test_what_only_begins_like_an_image_is_refused_by_qemu_img(world: World, plain: bytes) -> None:
    broken = bytearray(plain)
    broken[36:40] = (2**31).to_bytes(4)  # a first-level table of 16 GiB

    error = await world.refusal(world.image(bytes(broken)))

    assert error.problem.code is Code.IMAGE_INVALID
    assert "qemu-img" in error.problem.message


async def test_a_disk_larger_than_the_vms_is_refused_and_fits_a_larger_vm(world: World, tmp_path: Path) -> None:
    image = world.image(qcow2(tmp_path, size="3G"))

    with pytest.raises(LeveretError, match="3 GiB") as caught:
        await world.fetch(image, disk_gib=2)

    assert caught.value.problem.code is Code.IMAGE_TOO_LARGE
    assert (await world.fetch(image, disk_gib=3)).exists()


async def test_qemu_img_is_killed_when_it_takes_too_long(
    tmp_path: Path, plain: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 600\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(qemu_img, "QEMU_IMG", str(sleeper))

    with pytest.raises(LeveretError, match="longer than"):
        await qemu_img.check(tmp_path / "image", "qcow2", timeout_s=0.5)

    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_qemu_img_runs_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teller = tmp_path / "teller"
    teller.write_text('#!/bin/sh\necho "$(ulimit -t) $(ulimit -v) $(ulimit -f) $(ulimit -c)" >&2\nexit 3\n')
    teller.chmod(0o755)
    monkeypatch.setattr(qemu_img, "QEMU_IMG", str(teller))

    with pytest.raises(LeveretError) as caught:
        await qemu_img.check(tmp_path / "image", "qcow2", timeout_s=10)

    cpu_s, memory_kib, file_blocks, core = caught.value.problem.message.rpartition(": ")[2].split()
    assert int(cpu_s) == qemu_img.CPU_LIMIT_S
    assert int(memory_kib) * 1024 == qemu_img.MEMORY_LIMIT_BYTES
    assert int(file_blocks) * 512 == qemu_img.FILE_LIMIT_BYTES
    assert core == "0"


async def test_an_overlay_is_what_was_asked_for(world: World, plain: bytes, tmp_path: Path) -> None:
    base = await world.fetch(world.image(plain))

    await qemu_img.create_overlay(tmp_path / "disk", base, "qcow2", 5, timeout_s=10)

    header = qemu_img.read_header(tmp_path / "disk", "qcow2")
    assert header.virtual_size_bytes == 5 * images.GIB
    assert header.backing_file == base


# Space.


async def test_an_image_is_not_fetched_into_the_reserve(world: World, plain: bytes) -> None:
    image = world.image(plain)
    world.made(disk_reserve_gib=10**9)

    assert (await world.refusal(image)).problem.code is Code.DISK_FULL


async def test_a_disk_that_fills_up_is_told_and_nothing_is_left(
    world: World, plain: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images, "_write", full)

    assert (await world.refusal(world.image(plain))).problem.code is Code.DISK_FULL


# What is left over.


async def test_what_a_killed_worker_left_is_swept(world: World, plain: bytes) -> None:
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    stale = world.pool.images / f".{'0' * 64}.qcow2.{gone.pid}.abcd.fetching"
    stale.write_bytes(b"half")
    other = world.pool.images / f".{'1' * 64}.qcow2.1.abcd.fetching"
    other.write_bytes(b"process 1 is alive, and older than this file")
    kept = await world.fetch(world.image(plain))

    await world.images.sweep()

    assert world.left() == sorted([other.name, kept.name])


async def test_what_a_killed_worker_left_is_swept_before_anybody_has_buried_it(world: World) -> None:
    """A container may have nobody who waits for the dead."""
    with subprocess.Popen(["true"]) as dead:  # noqa: ASYNC220  (asyncio would bury it)
        await eventually(lambda: psutil.Process(dead.pid).status() == psutil.STATUS_ZOMBIE, what="a zombie")
        stale = world.pool.images / f".{'0' * 64}.qcow2.{dead.pid}.abcd.fetching"
        stale.write_bytes(b"half")

        await world.images.sweep()

        assert world.left() == []


async def test_a_temporary_file_of_a_process_id_that_was_used_again_is_swept(world: World) -> None:
    stale = world.pool.images / f".{'0' * 64}.qcow2.{os.getppid()}.abcd.fetching"
    stale.write_bytes(b"half")
    os.utime(stale, (1, 1))

    await world.images.sweep()

    assert world.left() == []


async def test_only_old_images_without_overlays_are_collected(world: World, tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        content = os.urandom(512) + bytes([number])
        paths.append(await world.fetch(world.image(content, image_format="raw")))
    unused, based_on, recent = paths
    disk = world.pool.vm(new_id()).disk
    disk.parent.mkdir()
    await qemu_img.create_overlay(disk, based_on, "raw", 1, timeout_s=10)
    for path in (unused, based_on):
        os.utime(path, (time.time() - 1000,) * 2)

    removed = await world.images.collect(keep_s=500)

    assert removed == [unused]
    assert world.left() == sorted([based_on.name, recent.name])


async def test_an_image_in_use_is_not_collected(world: World, plain: bytes) -> None:
    async with world.images.using(world.image(plain), 1) as path:
        os.utime(path, (1, 1))

        assert await world.images.collect(keep_s=0) == []
        assert path.exists()


async def test_use_keeps_an_image_young(world: World, plain: bytes) -> None:
    image = world.image(plain)
    path = await world.fetch(image)
    os.utime(path, (1, 1))
    await world.fetch(image)

    assert await world.images.collect(keep_s=500) == []


async def test_one_who_needs_an_image_that_is_being_collected_fetches_it_again(
    world: World, plain: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = world.image(plain)
    path = await world.fetch(image)
    os.utime(path, (1, 1))
    loop, removing, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    remove = images._remove_unneeded

    def slowly(*args: Any) -> bool:
        loop.call_soon_threadsafe(removing.set)
        go_on.wait(5)
        return remove(*args)

    monkeypatch.setattr(images, "_remove_unneeded", slowly)
    collecting = asyncio.create_task(world.images.collect(keep_s=500))
    await removing.wait()
    fetching_it = asyncio.create_task(world.fetch(image))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not fetching_it.done()
    go_on.set()

    assert await collecting == [path]
    assert (await fetching_it).exists()
