"""An answer that is made while it is sent: what its reader does, and what becomes of it then."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from leveret.api.streaming import Streamed, begun
from leveret.shared.errors import Code, LeveretError, fail

pytestmark = pytest.mark.unit

SCOPE = {"type": "http"}


class Pieces:
    """Pieces that know how many were made, and whether nobody wants more."""

    def __init__(self, *pieces: bytes | LeveretError) -> None:
        self._pieces = pieces
        self.made = 0
        self.closed = False

    async def each(self) -> AsyncGenerator[bytes, None]:
        try:
            for piece in self._pieces:
                if isinstance(piece, LeveretError):
                    raise piece
                self.made += 1
                yield piece
        finally:
            self.closed = True


class Reader:
    """The other side: takes so many messages and then nothing; leaves when told to."""

    def __init__(self, takes: int = 1000) -> None:
        self.taken: list[Message] = []
        self.leaves = asyncio.Event()
        self._takes = takes

    async def send(self, message: Message) -> None:
        self.taken.append(message)
        if len(self.taken) > self._takes:
            await asyncio.Event().wait()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.taken)

    @property
    def has_all(self) -> bool:
        return not self.taken[-1].get("more_body", True)


async def told(pieces: Pieces, reader: Reader) -> None:
    answer = Streamed(pieces.each(), media_type="text/plain", headers={"X-Test": "1"})
    assert "content-length" not in answer.headers
    assert answer.headers["x-test"] == "1"
    async with asyncio.timeout(5):
        await answer(SCOPE, reader.receive, reader.send)


async def test_an_answer_is_told_to_the_end() -> None:
    pieces, reader = Pieces(b"a", b"b"), Reader()
    await told(pieces, reader)
    assert (reader.body, reader.has_all, pieces.closed) == (b"ab", True, True)


async def test_an_answer_that_fails_under_way_has_no_end() -> None:
    pieces, reader = Pieces(b"a", fail(Code.UNAVAILABLE, "Away.")), Reader()
    await told(pieces, reader)
    assert (reader.body, reader.has_all, pieces.closed) == (b"a", False, True)


async def test_nothing_is_made_ahead_of_its_reader_and_nothing_after_it_has_gone() -> None:
    pieces, reader = Pieces(*[b"x"] * 10), Reader(takes=3)
    telling = asyncio.create_task(told(pieces, reader))
    for _ in range(20):
        await asyncio.sleep(0)
    assert pieces.made == 3  # the head and two pieces were taken, and the third is offered
    reader.leaves.set()
    await telling
    assert (pieces.made, pieces.closed, reader.has_all) == (3, True, False)


async def test_a_reader_that_takes_nothing_for_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.api.streaming.SEND_TIMEOUT_S", 0.05)
    pieces, reader = Pieces(*[b"x"] * 10), Reader(takes=2)
    await told(pieces, reader)
    assert (pieces.made, pieces.closed, reader.has_all) == (2, True, False)


async def test_a_defect_is_not_hidden() -> None:
    async def broken() -> AsyncGenerator[bytes, None]:
        yield b"a"
        raise ValueError("a defect")

    reader = Reader()
    with pytest.raises(ValueError, match="a defect"):
        await Streamed(broken(), media_type="text/plain")(SCOPE, reader.receive, reader.send)
    assert not reader.has_all


async def test_what_fails_before_the_first_piece_can_still_be_told_otherwise() -> None:
    pieces = Pieces(fail(Code.UNAVAILABLE, "Away."))
    with pytest.raises(LeveretError):
        await begun(pieces.each())
    assert pieces.closed


async def test_pieces_that_have_begun_are_all_there_and_are_closed_with_their_reader() -> None:
    pieces = Pieces(b"a", b"b", b"c")
    following = await begun(pieces.each())
    assert pieces.made == 1
    assert [await anext(following), await anext(following)] == [b"a", b"b"]
    await following.aclose()
    assert (pieces.made, pieces.closed) == (2, True)
