"""Answers of any length in little memory: what a slow reader has not taken yet is not made yet."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from leveret.shared.errors import LeveretError

log = structlog.get_logger()

#: A reader that takes nothing for so long has gone, or might as well have.
SEND_TIMEOUT_S = 60.0


class Streamed(Response):
    """An answer that is made while it is sent.

    It waits for its reader before it makes the next piece. A failure under way cuts the connection: an answer that
    ends as it should is whole. The pieces are closed when the reader goes away.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], *, media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "HEAD":
            await self._pieces.aclose()
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b""})
            return
        sending = asyncio.create_task(self._send(send), name="answer.sending")
        leaving = asyncio.create_task(_reader_leaves(receive), name="answer.leaving")
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    async with asyncio.timeout(SEND_TIMEOUT_S):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
        except LeveretError as error:
            log.warning("answer.cut", code=error.problem.code)
            return
        except TimeoutError:
            log.warning("answer.cut", why="the reader takes nothing")
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _reader_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def begun(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same pieces, of which the first is made already: what goes wrong before it can still be told as a problem."""
    return _resumed(await anext(pieces), pieces)


async def _resumed(first: bytes, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece
