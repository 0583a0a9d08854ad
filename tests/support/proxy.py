"""A TCP proxy on loopback: the line between two processes, to be cut, held, slowed and left half open."""

import asyncio
from contextlib import suppress
from urllib.parse import urlsplit

CHUNK_BYTES = 64 * 1024


class Line:
    """One connection, in both directions. While it does not flow nothing gets through, not even word of an end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.near_reader, self.near_writer = reader, writer
        self.flowing = asyncio.Event()
        self.is_stranded = False
        self.task: asyncio.Task[None] | None = None


class Proxy:
    """Carries connections to a port of this machine. It serves while the event loop runs that opened it.

    `delay_s` is how long every byte takes to get through, `bytes_per_s` how many do in a second; None: as many as come.
    """

    def __init__(self, port: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        self.bytes_per_s: int | None = None
        self._target = port
        self._server: asyncio.Server | None = None
        self._lines: set[Line] = set()
        self._is_swallowing = False

    @property
    def is_used(self) -> bool:
        """Whether anybody is connected through it."""
        return bool(self._lines)

    async def open(self) -> None:
        """Take connections; on the same port as before, if it was open before."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Refuse newcomers and cut everybody off."""
        if self._server is not None:
            self._server.close()
        self.cut()

    def cut(self) -> None:
        """End every connection at once; both sides are told."""
        for line in self._lines:
            if line.task is not None:
                line.task.cancel()

    def swallow(self, *, swallowing: bool = True) -> None:
        """Hold back every byte and every end, in both directions, as a partition does; or let everything go on."""
        self._is_swallowing = swallowing
        for line in self._lines:
            if swallowing or line.is_stranded:
                line.flowing.clear()
            else:
                line.flowing.set()

    def strand(self) -> None:
        """Leave the connections of now half open for ever: no side hears of the other again. Newcomers get through."""
        for line in self._lines:
            line.is_stranded = True
            line.flowing.clear()

    def through(self, url: str) -> str:
        """This address, by way of the proxy."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}").geturl()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        self._lines.add(line)
        if not self._is_swallowing:
            line.flowing.set()
        line.task = asyncio.create_task(self._carry(line))
        line.task.add_done_callback(lambda _: self._lines.discard(line))

    async def _carry(self, line: Line) -> None:
        writers = [line.near_writer]
        try:
            await line.flowing.wait()
            with suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
                writers.append(far_writer)
                await self.converse(line, far_reader, far_writer)
        except asyncio.CancelledError:
            return  # cut
        finally:
            for writer in writers:
                writer.transport.abort()

    async def converse(self, line: Line, far_reader: asyncio.StreamReader, far_writer: asyncio.StreamWriter) -> None:
        """Carry both directions until one of them ends."""
        pumps = {
            asyncio.create_task(self._pump(line, line.near_reader, far_writer)),
            asyncio.create_task(self._pump(line, far_reader, line.near_writer)),
        }
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, line: Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b"first"
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except OSError:
                data = b""
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await line.flowing.wait()
            await self._pass(data, writer)

    async def _pass(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        step = max(1, self.bytes_per_s // 10) if self.bytes_per_s else len(data) or 1
        for at in range(0, len(data), step):
            writer.write(data[at : at + step])
            await writer.drain()
            if self.bytes_per_s:
                await asyncio.sleep(0.1)
