"""Bytes of an image from where its url points: from allowed directories, or over HTTP from allowed addresses only."""

import asyncio
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import httpx2

from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, fail

Address = IPv4Address | IPv6Address
InThread = Callable[..., Awaitable[Any]]

CHUNK_BYTES = 1024 * 1024
#: Who does not send as much in `image_idle_s` is given up: at that pace no image is there before any deadline.
PACE_BYTES = 256 * 1024
MAX_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}
_WELL_KNOWN_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Source:
    """An open source: its size in bytes, when that is known, and its bytes."""

    size_bytes: int | None
    chunks: AsyncIterator[bytes]


class Fetcher:
    """Opens the sources that the settings allow. `in_thread(call, *args)` runs blocking file work."""

    def __init__(self, settings: LibvirtSettings, in_thread: InThread) -> None:
        self._settings = settings
        self._in_thread = in_thread
        self._tls: ssl.SSLContext | None = None

    @asynccontextmanager
    async def open(self, url: str) -> AsyncIterator[Source]:
        """Raises LeveretError: `image_forbidden` for what may not be read, `image_unreachable` for what cannot be."""
        if urlsplit(url).scheme == "file":
            async with self._open_file(url) as source:
                yield source
        else:
            async with self._open_http(url) as source:
                yield source

    @asynccontextmanager
    async def _open_file(self, url: str) -> AsyncIterator[Source]:
        path = Path(unquote(urlsplit(url).path))
        fd = await self._in_thread(_open_allowed, path, self._settings.image_dirs)

        async def chunks() -> AsyncIterator[bytes]:
            while chunk := await self._in_thread(_read, fd, path):
                yield chunk

        try:
            yield Source(os.fstat(fd).st_size, chunks())
        finally:
            os.close(fd)

    @asynccontextmanager
    async def _open_http(self, url: str) -> AsyncIterator[Source]:
        idle = httpx2.Timeout(self._settings.image_idle_s)
        self._tls = self._tls or ssl.create_default_context()
        async with httpx2.AsyncClient(
            verify=self._tls, trust_env=False, timeout=idle, follow_redirects=False
        ) as client:
            try:
                async with self._answer(client, url) as response:
                    length = response.headers.get("content-length", "")
                    yield Source(int(length) if length.isdecimal() else None, self._paced(url, response))
            except httpx2.HTTPError as error:
                said = str(error) or type(error).__name__
                raise fail(Code.IMAGE_UNREACHABLE, f"{_shown(url)} cannot be fetched: {said}.") from error

    async def _paced(self, url: str, response: httpx2.Response) -> AsyncIterator[bytes]:
        """The bytes of an answer, as long as they come in time."""
        chunks, idle_s = response.aiter_raw(PACE_BYTES), self._settings.image_idle_s
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    chunk = await anext(chunks, None)
            except TimeoutError as error:
                slow = f"{_shown(url)} sends less than {PACE_BYTES // 1024} KiB in {idle_s:g} s"
                raise fail(Code.IMAGE_UNREACHABLE, f"{slow}: too slowly for any image.") from error
            if chunk is None:
                return
            yield chunk

    @asynccontextmanager
    async def _answer(self, client: httpx2.AsyncClient, url: str) -> AsyncIterator[httpx2.Response]:
        """The answer with the image, after redirects. Every hop is checked as the first one is."""
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._ask(client, url)
            try:
                if response.status_code not in _REDIRECTS:
                    if response.status_code != httpx2.codes.OK:
                        said = f"{_shown(url)} answers {response.status_code} {response.reason_phrase}"
                        raise fail(Code.IMAGE_UNREACHABLE, f"{said}.")
                    yield response
                    return
                url = urljoin(url, response.headers.get("location", ""))
            finally:
                await response.aclose()
        raise fail(Code.IMAGE_UNREACHABLE, f"More than {MAX_REDIRECTS} redirects, the last one to {_shown(url)}.")

    async def _ask(self, client: httpx2.AsyncClient, url: str) -> httpx2.Response:
        """Ask the very address that was checked: a name that resolves differently a moment later changes nothing."""
        parts = urlsplit(url)
        try:
            port = parts.port or _WELL_KNOWN_PORTS[parts.scheme]
            host = parts.hostname or ""
        except (KeyError, ValueError) as error:
            raise fail(Code.IMAGE_FORBIDDEN, f"{_shown(url)} is not an http or https address.") from error
        if not host or parts.username is not None:
            raise fail(Code.IMAGE_FORBIDDEN, f"{_shown(url)} names no host, or carries credentials.")
        failure: httpx2.HTTPError | None = None
        for address in await self._allowed_addresses(host, port):
            literal = f"[{address}]" if address.version == 6 else str(address)
            request = client.build_request(
                "GET",
                parts._replace(netloc=f"{literal}:{port}", fragment="").geturl(),
                headers={"Host": parts.netloc, "Accept-Encoding": "identity", "User-Agent": "leveret"},
                extensions={"sni_hostname": host},
            )
            try:
                return await client.send(request, stream=True)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                failure = error
        raise failure or fail(Code.IMAGE_UNREACHABLE, f"{host} has no address.")

    async def _allowed_addresses(self, host: str, port: int) -> list[Address]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._settings.image_idle_s):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError, UnicodeError) as error:
            raise fail(Code.IMAGE_UNREACHABLE, f"The name {host!r} cannot be resolved: {error}.") from error
        addresses = list(dict.fromkeys(ip_address(entry[4][0]) for entry in found))
        refused = [address for address in addresses if not self._may_ask(address)]
        if refused:
            raise fail(
                Code.IMAGE_FORBIDDEN,
                f"{host} is at {refused[0]}, an inner address that hosts do not fetch images from.",
            )
        return addresses

    def _may_ask(self, address: Address) -> bool:
        """Whether an address is public, or allowed by name. What is written as IPv6 but means IPv4 counts as that."""
        meant = _meant_by(address)
        if any(meant in network for network in self._settings.image_inner_allowed if network.version == meant.version):
            return True
        return meant.is_global and not meant.is_multicast and not meant.is_reserved


def _meant_by(address: Address) -> Address:
    """The IPv4 address in an IPv4-mapped, 6to4 or NAT64 one."""
    if isinstance(address, IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if int(address) >> 32 == 0x0064FF9B << 64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _open_allowed(path: Path, directories: tuple[Path, ...]) -> int:
    """A descriptor of a regular file in one of these directories, wherever symbolic links lead. Blocking."""
    refusal = fail(Code.IMAGE_FORBIDDEN, f"{path} is not in a directory that images may be read from.")
    allowed = [directory.resolve() for directory in directories]
    real = path.resolve()
    if not any(real.is_relative_to(directory) for directory in allowed):
        raise refusal
    try:
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise fail(Code.IMAGE_UNREACHABLE, f"{path} cannot be read: {error.strerror}.") from error
    # Somebody may have changed a directory on the way into a link since: what counts is what was opened.
    opened = Path(f"/proc/self/fd/{fd}").readlink()
    if not stat.S_ISREG(os.fstat(fd).st_mode) or not any(opened.is_relative_to(directory) for directory in allowed):
        os.close(fd)
        raise refusal
    return fd


def _read(fd: int, path: Path) -> bytes:
    try:
        return os.read(fd, CHUNK_BYTES)
    except OSError as error:
        raise fail(Code.IMAGE_UNREACHABLE, f"{path} cannot be read: {error.strerror}.") from error


def _shown(url: str) -> str:
    """A url for people: its query may be a signature."""
    return urlsplit(url)._replace(query="", fragment="").geturl()
