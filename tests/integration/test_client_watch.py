"""The watcher of the client against a server that is cut off, restarted, overloaded and struck dumb."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sized
from contextlib import aclosing, suppress
from functools import partial

import pytest
from peers import eventually
from proxy import Proxy

from leveret.client import ApiError, Leveret, Unreachable
from leveret.client.http import Http
from leveret.client.watching import Watch
from leveret.shared.ids import name_for, new_id

pytestmark = pytest.mark.integration

VM_ID = new_id()
CUTS = 50


class EventServer:
    """HTTP/1.1 over plain sockets: a log of events, told as a stream from where the asker was."""

    def __init__(self) -> None:
        self.port = 0
        self.log: list[bytes] = []
        self.asked: list[dict[str, str]] = []
        self.refusals: list[bytes] = []
        self._grown = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        return len(self.asked)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def happen(self) -> None:
        seq = len(self.log) + 1
        view = {"seq": seq, "vm_id": str(VM_ID), "vm_name": name_for(VM_ID), "type": "progress", "state": "building"}
        data = json.dumps(view | {"at": "2026-11-22T08:00:00Z", "data": {"filler": "x" * 200}})
        async with self._grown:
            self.log.append(f"id: {seq}\nevent: vm.progress\ndata: {data}\n\n".encode())
            self._grown.notify_all()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            self._serving.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        self.asked.append(headers)
        if self.refusals:
            writer.write(self.refusals.pop(0))
            await writer.drain()
            writer.close()
            return
        given = lines[0].split("after=")[1].split(" ")[0] if "after=" in lines[0] else "0"
        at = int(headers.get("last-event-id", given))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nretry: 1000\n\n")
        while True:
            writer.write(b"".join(self.log[at:]))
            at = len(self.log)
            await writer.drain()
            async with self._grown:
                await self._grown.wait_for(lambda: len(self.log) > at)  # noqa: B023  (used at once)


@pytest.fixture
async def server() -> AsyncIterator[EventServer]:
    server = EventServer()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def proxy(server: EventServer) -> AsyncIterator[Proxy]:
    proxy = Proxy(server.port)
    await proxy.open()
    yield proxy
    await proxy.close()


def through(proxy: Proxy) -> Leveret:
    return Leveret(f"http://127.0.0.1:{proxy.port}", "secret")


def is_longer(found: Sized, than: int) -> bool:
    return len(found) > than


async def test_a_watcher_that_is_cut_off_fifty_times_sees_each_event_once_in_order(
    server: EventServer, proxy: Proxy
) -> None:
    enough = asyncio.Event()

    async def flow() -> None:
        while not enough.is_set():
            for _ in range(20):
                await server.happen()
            await asyncio.sleep(0.005)

    seen: list[int] = []

    async def look() -> None:
        async with through(proxy) as leveret, aclosing(leveret.watch()) as events:
            async for event in events:
                seen.append(event.seq)  # noqa: PERF401  (looked at while it grows)

    flowing, looking = asyncio.create_task(flow()), asyncio.create_task(look())
    for cut in range(1, CUTS + 1):
        await eventually(partial(is_longer, seen, len(seen)), what="events between two cuts")
        proxy.cut()
        await eventually(partial(is_longer, server.asked, cut), what=f"a connection after cut {cut}")
    enough.set()
    await flowing
    await eventually(partial(is_longer, seen, len(server.log) - 1), within_s=20, what="the last event")
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    assert seen == list(range(1, len(server.log) + 1))
    assert server.connections >= CUTS + 1


async def test_a_watcher_outlasts_a_restart_of_the_api(server: EventServer) -> None:
    async with Leveret(server.url, "secret") as leveret, aclosing(leveret.watch()) as events:
        await server.happen()
        assert (await anext(events)).seq == 1
        await server.stop()
        getting = asyncio.ensure_future(anext(events))
        await server.happen()
        await server.start()
        assert (await getting).seq == 2


async def test_a_connection_that_went_dumb_is_given_up_for_another(server: EventServer, proxy: Proxy) -> None:
    """Half open: nothing is refused and nothing comes, as after a firewall forgot it."""
    http = Http(f"http://127.0.0.1:{proxy.port}", "secret", retry_for_s=0)
    watch = Watch(http, "/v1/events", 0, silence_s=0.3)
    async with aclosing(watch.events()) as events:
        await server.happen()
        assert (await anext(events)).seq == 1
        proxy.swallow()
        getting = asyncio.ensure_future(anext(events))
        await server.happen()
        await asyncio.wait({getting}, timeout=0.5)
        assert not getting.done()
        proxy.swallow(swallowing=False)
        assert (await getting).seq == 2
        assert server.asked[-1]["last-event-id"] == "1"
    await http.close()


async def test_a_watcher_gives_up_on_an_api_that_stays_away(server: EventServer) -> None:
    async with Leveret(server.url, "secret") as leveret, aclosing(leveret.watch(give_up_s=0.5)) as events:
        await server.happen()
        await anext(events)
        await server.stop()
        began = time.monotonic()
        with pytest.raises(Unreachable):
            await anext(events)
        assert time.monotonic() - began < 5


async def test_a_slow_reader_does_not_count_as_an_api_that_is_away(server: EventServer, proxy: Proxy) -> None:
    async with through(proxy) as leveret, aclosing(leveret.watch(give_up_s=0.3)) as events:
        await server.happen()
        await anext(events)
        proxy.cut()
        await asyncio.sleep(0.5)  # longer than it would look for an API: the reader is at work
        await server.happen()
        assert (await anext(events)).seq == 2


async def test_a_revoked_token_ends_a_watch_when_it_resumes(server: EventServer, proxy: Proxy) -> None:
    body = b'{"code": "unauthenticated", "detail": "This token was revoked."}'
    async with through(proxy) as leveret, aclosing(leveret.watch()) as events:
        await server.happen()
        await anext(events)
        server.refusals.append(b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        proxy.cut()
        with pytest.raises(ApiError, match="revoked"):
            await anext(events)


async def test_an_overloaded_api_is_asked_again_when_it_wants_to_be(server: EventServer) -> None:
    server.refusals.append(b"HTTP/1.1 503 Later\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
    await server.happen()
    began = time.monotonic()
    async with Leveret(server.url, "secret") as leveret, aclosing(leveret.watch()) as events:
        assert (await anext(events)).seq == 1
    assert time.monotonic() - began >= 1


async def test_a_hundred_and_fifty_watchers_share_one_client(server: EventServer) -> None:
    async with Leveret(server.url, "secret") as leveret:
        watchers = [leveret.watch() for _ in range(150)]
        getting = [asyncio.ensure_future(anext(watcher)) for watcher in watchers]
        await eventually(lambda: server.connections == 150, what="all of them connected")
        await server.happen()
        assert {event.seq for event in await asyncio.gather(*getting)} == {1}
        for watcher in watchers:
            await watcher.aclose()
