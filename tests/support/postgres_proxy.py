"""A proxy to Postgres that reads along: it cuts a session at its COMMIT, just before or just after, or holds it up."""

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from enum import StrEnum, auto
from urllib.parse import urlsplit

#: Codes of the messages that come before a session begins (PostgreSQL, "Message Formats").
_CANCEL, _SSL, _GSS = 80877102, 80877103, 80877104


class Fate(StrEnum):
    """What becomes of a COMMIT: it passes, it is never heard, or it is carried out and its answer is never heard."""

    PASS = auto()
    UNHEARD = auto()
    UNANSWERED = auto()


class PostgresProxy:
    """Stands before a server on loopback. `decide` is asked for the fate of every COMMIT; `met` counts them."""

    def __init__(self, port: int, decide: Callable[[], Fate]) -> None:
        self._target = port
        self._decide = decide
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()
        self.met: Counter[Fate] = Counter()
        self.commit_delay_s = 0.0

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def url_of(self, dsn: str) -> str:
        """The same server, through this proxy."""
        there = urlsplit(dsn)
        return there._replace(netloc=there.netloc.replace(f":{there.port}", f":{self.port}")).geturl()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.create_task(self._carry(reader, writer))
        self._sessions.add(session)
        session.add_done_callback(self._sessions.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_writer: asyncio.StreamWriter | None = None
        with suppress(OSError, asyncio.IncompleteReadError):
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
                answering = _Answering(far_reader, writer)
                try:
                    await self._forward(reader, far_writer, answering)
                finally:
                    await answering.end()
            finally:
                writer.transport.abort()
                if far_writer is not None:
                    far_writer.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, far_writer: asyncio.StreamWriter, answering: "_Answering"
    ) -> None:
        """Carry the client's messages, one by one, until one of them is its session's last."""
        await _greet(reader, far_writer)
        while True:
            head = await reader.readexactly(5)
            message = head + await reader.readexactly(struct.unpack("!I", head[1:])[0] - 4)
            fate = Fate.PASS
            if message.startswith(b"Q") and message[5:].startswith(b"COMMIT"):
                fate = self._decide()
                self.met[fate] += 1
                if fate is Fate.UNHEARD:
                    return
                answering.is_heard = fate is Fate.PASS
                await asyncio.sleep(self.commit_delay_s)
            far_writer.write(message)
            await far_writer.drain()
            if fate is Fate.UNANSWERED:
                await answering.unheard.wait()
                return


async def _greet(reader: asyncio.StreamReader, far_writer: asyncio.StreamWriter) -> None:
    """Carry what comes before a session: no types yet, only lengths."""
    while True:
        head = await reader.readexactly(8)
        length, code = struct.unpack("!II", head)
        far_writer.write(head + await reader.readexactly(length - 8))
        await far_writer.drain()
        if code not in {_SSL, _GSS, _CANCEL}:
            return


class _Answering:
    """Carries the server's answers, as long as they are to be heard."""

    def __init__(self, far_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.is_heard = True
        self.unheard = asyncio.Event()
        self._task = asyncio.create_task(self._carry(far_reader, writer))

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _carry(self, far_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await far_reader.read(65536):
                if not self.is_heard:
                    return
                writer.write(data)
                await writer.drain()
        finally:
            self.unheard.set()
            writer.transport.abort()


@asynccontextmanager
async def proxied(port: int, decide: Callable[[], Fate] = lambda: Fate.PASS) -> AsyncIterator[PostgresProxy]:
    """A proxy to the server on this port, for as long as it is needed."""
    proxy = PostgresProxy(port, decide)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()
