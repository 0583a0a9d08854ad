"""What a watcher makes of bytes: every legal way to write a stream of events means the same events."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.client.errors import ApiError, ClientError, EventGap, Missing
from leveret.client.http import Http
from leveret.client.watching import Watch
from leveret.shared.documents import EventView

pytestmark = pytest.mark.unit

STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}
Answer = httpx2.Response


def event(seq: int, **data: Any) -> dict[str, Any]:
    return {
        "seq": seq,
        "vm_id": "0192f0c1-0000-7000-8000-000000000001",
        "vm_name": "web",
        "type": "running",
        "state": "running",
        "at": "2026-11-22T08:00:00Z",
        "data": data,
    }


def frame(seq: int, **data: Any) -> bytes:
    return f"id: {seq}\nevent: vm.running\ndata: {json.dumps(event(seq, **data))}\n\n".encode()


def gap(after: int, forgotten_seq: int) -> bytes:
    return f'event: gap\ndata: {{"after": {after}, "forgotten_seq": {forgotten_seq}}}\n\n'.encode()


def stream(*chunks: bytes) -> Answer:
    async def content() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    return httpx2.Response(200, headers=STREAM, content=content())


def over() -> Answer:
    """What ends a watch: it is not asked again."""
    return httpx2.Response(404, json={"code": "vm_not_found", "detail": "It is gone."})


class Api:
    """Answers one after the other, and time that passes at once."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.pauses: list[float] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def watch(self, *, after: int = 0, **more: Any) -> Watch:
        transport = httpx2.MockTransport(self)
        http = Http("http://leveret.test", "secret", retry_for_s=0, transport=transport, sleep=self.sleep)
        return Watch(http, "/v1/events", after, **more)


async def told(watch: Watch) -> tuple[list[EventView], ClientError]:
    """Everything until the watch ends, and what ended it."""
    events: list[EventView] = []
    stream = watch.events()
    while True:
        try:
            events.append(await anext(stream))
        except ClientError as error:
            return events, error


async def seen(watch: Watch) -> list[EventView]:
    """Everything until the watch is told that it is over."""
    events, end = await told(watch)
    assert isinstance(end, Missing), end
    return events


@st.composite
def written(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Some events, and a stream that means them, cut into chunks anywhere."""
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    events = [event(seq, note=draw(texts)) for seq in range(1, draw(st.integers(1, 4)) + 1)]
    noise = st.sampled_from([": heartbeat\n", "retry: 1000\n\n", "\n", "unknown: field\n", "retry: soon\n", ":\n\n"])
    text = ""
    for one in events:
        text += "".join(draw(st.lists(noise, max_size=3)))
        indent = draw(st.sampled_from([None, 1]))
        space = draw(st.sampled_from(["", " "]))
        lines = [f"id:{space}{one['seq']}", f"event:{space}vm.running"]
        body = json.dumps(one, ensure_ascii=draw(st.booleans()), indent=indent)
        # A line break within the data is a new data line; what JSON leaves unescaped is none.
        lines += [f"data:{space}{line}" for line in body.split("\n")]
        text += "\n".join(draw(st.permutations(lines[:2])) + lines[2:]) + "\n\n"
    text = text.replace("\n", draw(st.sampled_from(["\n", "\r\n", "\r"])))
    raw = text.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    return events, [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


@given(written())
async def test_every_way_to_write_a_stream_means_the_same(story: tuple[list[dict[str, Any]], list[bytes]]) -> None:
    events, chunks = story
    found = await seen(Api(stream(*chunks), over()).watch())
    assert found == [EventView.model_validate(one) for one in events]


def prefixes(raw: bytes) -> Iterator[bytes]:
    return (raw[:end] for end in range(len(raw) + 1))


async def test_an_event_that_was_cut_off_is_asked_for_again() -> None:
    """Wherever a connection ends: what was not complete was not seen, what was complete is not seen twice."""
    whole = frame(1) + frame(2)
    for beginning in prefixes(whole):
        api = Api(stream(beginning), stream(frame(1), frame(2), frame(3)), over())
        assert [one.seq for one in await seen(api.watch())] == [1, 2, 3]
        known = [request.headers.get("last-event-id") for request in api.requests]
        complete = beginning.count(b"\n\n")
        assert known == [None, str(complete), "3"]


async def test_the_first_request_says_where_to_begin_and_what_it_wants() -> None:
    api = Api(over())
    await seen(api.watch(after=7))
    (request,) = api.requests
    assert request.url.params["after"] == "7"
    assert request.headers["accept"] == "text/event-stream"


async def test_events_that_were_seen_before_are_dropped() -> None:
    api = Api(stream(frame(4), frame(5), frame(5), frame(4), frame(6)), over())
    assert [one.seq for one in await seen(api.watch(after=4))] == [5, 6]


async def test_a_gap_is_an_error_that_says_what_is_lost() -> None:
    api = Api(stream(frame(3), gap(3, 9), frame(10)))
    events, end = await told(api.watch(after=2))
    assert [one.seq for one in events] == [3]
    assert isinstance(end, EventGap)
    assert (end.after, end.until) == (3, 9)


async def test_who_wants_to_hears_of_a_gap_and_goes_on() -> None:
    gaps: list[EventGap] = []
    api = Api(stream(gap(0, 9), frame(10), gap(0, 9)), stream(frame(11)), over())
    assert [one.seq for one in await seen(api.watch(on_gap=gaps.append))] == [10, 11]
    assert [(one.after, one.until) for one in gaps] == [(0, 9)]


def gone_back(after: int, last_seq: int) -> bytes:
    """What is told of a log that was restored from an older copy."""
    return f'event: gap\ndata: {{"after": {after}, "forgotten_seq": 0, "last_seq": {last_seq}}}\n\n'.encode()


async def test_a_log_that_went_back_is_told_and_watched_on_from_its_end() -> None:
    gaps: list[EventGap] = []
    api = Api(stream(frame(90)), stream(gone_back(90, 4), frame(5), frame(6)), stream(gone_back(6, 6)), over())
    assert [one.seq for one in await seen(api.watch(after=89, on_gap=gaps.append))] == [90, 5, 6]
    assert [(one.after, one.until) for one in gaps] == [(90, 4)]
    assert "went back to event 4" in str(gaps[0])
    assert [request.headers.get("last-event-id") for request in api.requests] == [None, "90", "6", "6"]
    _, end = await told(Api(stream(gone_back(90, 4))).watch(after=90))
    assert isinstance(end, EventGap)


async def test_a_gap_that_says_less_than_it_could_is_none() -> None:
    api = Api(stream(b"event: gap\ndata: {}\n\n", frame(8)), over())
    assert [one.seq for one in await seen(api.watch(after=7))] == [8]


@pytest.mark.parametrize("status", [401, 403, 404, 422])
async def test_a_refusal_ends_a_watch_at_once(status: int) -> None:
    api = Api(httpx2.Response(status, json={"code": "some_code", "detail": "No.", "hint": "Do this."}))
    with pytest.raises(ApiError) as caught:
        await anext(aiter(api.watch().events()))
    assert (caught.value.status, caught.value.code, caught.value.hint) == (status, "some_code", "Do this.")
    assert api.pauses == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_what_passes_is_waited_for(status: int) -> None:
    later = httpx2.Response(status, json={"code": "unavailable"}, headers={"Retry-After": "3"})
    api = Api(later, stream(frame(1)), over())
    assert [one.seq for one in await seen(api.watch())] == [1]
    assert api.pauses[0] == 3.0


async def test_an_api_that_is_away_is_knocked_at_more_and_more_seldom() -> None:
    api = Api(*[httpx2.ConnectError("refused")] * 8, stream(frame(1)), over())
    assert [one.seq for one in await seen(api.watch())] == [1]
    assert api.pauses[0] <= 0.1
    assert max(api.pauses) <= 5.0
    assert sum(api.pauses) > 5.0
    assert api.pauses[8] <= 0.1  # it worked again: the next cut is the first


async def test_a_redirect_or_a_page_instead_of_a_stream_is_an_error() -> None:
    for answer in (httpx2.Response(307, headers={"Location": "http://elsewhere.test/"}), httpx2.Response(200, json={})):
        with pytest.raises(ApiError):
            await anext(aiter(Api(answer).watch().events()))


async def test_an_event_that_is_none_is_an_error() -> None:
    for data in ("{}", "nonsense", '{"seq": "many"}'):
        with pytest.raises(ApiError) as caught:
            await anext(aiter(Api(stream(f"data: {data}\n\n".encode())).watch().events()))
        assert caught.value.code == "unreadable_answer"
