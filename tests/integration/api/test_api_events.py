"""Streams of events: each exactly once and in order, however often the connection breaks, in constant memory."""

import asyncio
import random
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
from api_process import Api, running_api
from api_world import Tenant, problem_of
from httpx2 import AsyncClient
from peers import eventually
from proxy import Proxy
from sse_reader import ACCEPT, Event, streaming

from leveret.api.streams import PAGE
from leveret.shared.documents import EventView
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import new_id
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration

HEARTBEAT_S = 0.3


@pytest.fixture(scope="module")
def quick_api(tmp_path_factory: pytest.TempPathFactory, rabbit: Rabbit, api_dsn: str) -> Iterator[Api]:
    """An API whose heart beats fast, and that lets a project have few streams."""
    with running_api(
        tmp_path_factory.mktemp("quick"),
        amqp_url=rabbit.url_of("leveret-api"),
        database_url=api_dsn,
        heartbeat_s=HEARTBEAT_S,
        streams_max=3,
    ) as api:
        api.wait_ready()
        yield api


def client_of(api_url: str, tenant: Tenant, role: str = "reader") -> AsyncClient:
    return AsyncClient(base_url=api_url, headers=tenant.headers(role), timeout=30, trust_env=False)


def seqs(events: list[Event]) -> list[int]:
    """Their numbers; what they are called and what they say must agree with them."""
    for event in events:
        assert event.id is not None
        assert EventView.model_validate(event.data).seq == int(event.id)
    return [int(event.id or 0) for event in events]


async def test_a_stream_tells_what_was_and_then_what_comes(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    for kind, state in (("accepted", "pending"), ("scheduled", "building")):
        await tenant.tell(vm_id, kind, state)
    await tenant.tell(None, "token.created", None)
    async with streaming(client) as stream:
        assert stream.response.headers["cache-control"] == "no-store"
        assert "content-length" not in stream.response.headers
        first = await stream.take(3)
        assert seqs(first) == [1, 2, 3]
        assert [event.name for event in first] == ["vm.accepted", "vm.scheduled", "token.created"]
        assert first[0].data == (await client.get("/v1/events")).json()["items"][0]
        assert first[2].data["vm_id"] is None
        assert stream.retry_ms == 1000
        await tenant.tell(vm_id, "running", "running")
        assert [(event.id, event.name) for event in await stream.take(1)] == [("4", "vm.running")]


async def test_a_stream_goes_on_where_it_is_asked_to(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    for _ in range(5):
        await tenant.tell(vm_id, "progress", "building")
    async with streaming(client, after=3) as stream:
        assert seqs(await stream.take(2)) == [4, 5]
    async with streaming(client, after=1, last_id="4") as stream:
        assert seqs(await stream.take(1)) == [5]
    async with streaming(client, after="latest") as stream:
        await tenant.tell(vm_id, "running", "running")
        assert seqs(await stream.take(1)) == [6]


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9" * 20, "latest", "1 2"])
async def test_a_place_that_no_stream_has_given_out_is_refused(client: AsyncClient, given: str) -> None:
    answer = await client.get("/v1/events", headers=ACCEPT | {"Last-Event-ID": given})
    assert problem_of(answer, 422, Code.INVALID_REQUEST)["errors"][0]["field"] == "Last-Event-ID"


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("text/event-stream", True),
        ("application/json, text/event-stream", True),
        ("Text/Event-Stream;charset=utf-8", True),
        ("application/json;q=0.9, text/event-stream", True),
        ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream;q=0", False),
        ("text/event-stream;q=x", False),
        ("*/*", False),
        ("application/json", False),
        ("", False),
    ],
)
async def test_a_stream_is_for_those_who_ask_for_one(client: AsyncClient, accept: str, streams: bool) -> None:
    async with client.stream("GET", "/v1/events", headers={"Accept": accept}) as response:
        kind = response.headers["content-type"].partition(";")[0]
        assert kind == ("text/event-stream" if streams else "application/json")


async def test_the_events_of_one_vm_are_streamed_alone(client: AsyncClient, tenant: Tenant) -> None:
    one, two = await tenant.insert(), await tenant.insert()
    for vm_id in (one, two, one):
        await tenant.tell(vm_id, "progress", "building")
    async with streaming(client, f"/v1/vms/{one}/events") as stream:
        assert seqs(await stream.take(2)) == [1, 3]
        await tenant.tell(two, "running", "running")
        await tenant.tell(one, "running", "running")
        assert seqs(await stream.take(1)) == [5]


async def test_no_stream_begins_of_what_is_not_there_or_not_ones_own(client: AsyncClient, tenant: Tenant) -> None:
    other = Tenant(f"{tenant.project}-2", tenant.connection)
    await other.move_in()
    theirs = await other.insert()
    await other.tell(theirs, "running", "running")
    for vm_id in (new_id(), theirs):
        answer = await client.get(f"/v1/vms/{vm_id}/events", headers=ACCEPT)
        problem_of(answer, 404, Code.VM_NOT_FOUND)
    refused = new_id()
    await tenant.refuse(refused, "r-1", Problem.of(Code.NO_CAPACITY, "None of 2 hosts."))
    problem_of(await client.get(f"/v1/vms/{refused}/events", headers=ACCEPT), 409, Code.NO_CAPACITY)
    for role in ("member", "reader"):
        answer = await client.get(f"/v1/projects/{other.project}/events", headers=tenant.headers(role))
        problem_of(answer, 404, Code.PROJECT_NOT_FOUND)
    async with streaming(client) as ours:
        await other.tell(theirs, "stopped", "stopped")
        seq = await tenant.tell(await tenant.insert(), "running", "running")
        assert seqs(await ours.take(1)) == [seq]


async def test_the_events_of_a_project_are_for_its_own_and_for_administrators(
    client: AsyncClient, tenant: Tenant
) -> None:
    other = Tenant(f"{tenant.project}-2", tenant.connection)
    await other.move_in()
    await tenant.tell(await tenant.insert(), "running", "running")
    for headers in (*(tenant.headers(role) for role in ("admin", "member", "reader")), other.headers("admin")):
        path = f"/v1/projects/{tenant.project}/events"
        assert [item["seq"] for item in (await client.get(path, headers=headers)).json()["items"]] == [1]
        client.headers.update(headers)
        async with streaming(client, path) as stream:
            assert seqs(await stream.take(1)) == [1]
    problem_of(await client.get(f"/v1/projects/{tenant.project}-3/events"), 404, Code.PROJECT_NOT_FOUND)
    problem_of(await client.get("/v1/projects/-/events"), 404, Code.PROJECT_NOT_FOUND)


async def test_a_watcher_that_is_cut_off_again_and_again_sees_every_event_once_and_in_order(
    api: Api, tenant: Tenant
) -> None:
    chance = random.Random(7)
    proxy = Proxy(urlsplit(api.url).port or 0)
    await proxy.open()
    vm_id = await tenant.insert()
    most, seen, connections = 600, list[int](), 0

    async def write() -> None:
        for n in range(most):
            await tenant.tell(vm_id, "progress", "building", notify=n % 10 != 3)

    async def cut() -> None:
        while len(seen) < most:
            await asyncio.sleep(chance.uniform(0.0, 0.12))
            proxy.cut()

    writing, cutting = asyncio.create_task(write()), asyncio.create_task(cut())
    last_id = ""
    async with client_of(f"http://127.0.0.1:{proxy.port}", tenant) as client:
        while len(seen) < most:
            with suppress(httpx2.TransportError):
                async with streaming(client, last_id=last_id) as stream:
                    connections += 1
                    while len(seen) < most and (event := await stream.next()) is not None:
                        seen += seqs([event])
                        last_id = stream.last_id
    cutting.cancel()
    await writing
    await proxy.close()
    print(f"{most} events over {connections} connections")
    assert seen == list(range(1, most + 1))
    assert connections > 10


async def test_an_event_reaches_its_watchers_at_once(api: Api, tenant: Tenant) -> None:
    """Few watchers, and more than a few: the feed tells them in different ways."""
    vm_id = await tenant.insert()
    delays = []
    async with client_of(api.url, tenant) as client, AsyncExitStack() as stack:
        for _ in range(2):
            streams = [await stack.enter_async_context(streaming(client, after="latest")) for _ in range(4)]
            for _ in range(10):
                waiting = asyncio.gather(*(stream.take(1) for stream in streams))
                await asyncio.sleep(0.05)
                began = time.perf_counter()
                await tenant.tell(vm_id, "progress", "building")
                await waiting
                delays.append(1000 * (time.perf_counter() - began))
    delays.sort()
    print(f"commit to watcher: median {delays[10]:.1f} ms, worst {delays[-1]:.1f} ms")
    assert delays[10] < 100


async def test_many_watchers_at_one_place_each_see_every_event_once(api: Api, tenant: Tenant) -> None:
    """They share what they read, from wherever they began, also when nobody tells them of an event."""
    vm_id, most, before = await tenant.insert(), 80, 3
    for _ in range(before):
        await tenant.tell(vm_id, "progress", "building")
    async with client_of(api.url, tenant) as client, AsyncExitStack() as stack:
        starts = [n % 4 for n in range(40)]
        streams = [await stack.enter_async_context(streaming(client, after=start)) for start in starts]
        taking = [asyncio.create_task(stream.take(most - start)) for stream, start in zip(streams, starts, strict=True)]
        for n in range(before, most):
            await tenant.tell(vm_id, "progress", "building", notify=n % 5 != 4)
        for start, events in zip(starts, await asyncio.gather(*taking), strict=True):
            assert seqs(events) == list(range(start + 1, most + 1))


async def test_a_stream_says_that_it_lives(quick_api: Api, tenant: Tenant) -> None:
    async with client_of(quick_api.url, tenant) as client, streaming(client) as stream:
        for _ in range(4):
            async with asyncio.timeout(HEARTBEAT_S + 3):
                await stream.next_comment()
        await tenant.tell(await tenant.insert(), "running", "running")
        assert seqs(await stream.take(1)) == [1]


async def test_a_project_has_only_so_many_streams(quick_api: Api, tenant: Tenant) -> None:
    other = Tenant(f"{tenant.project}-2", tenant.connection)
    await other.move_in()
    async with client_of(quick_api.url, tenant) as client, client_of(quick_api.url, other) as theirs:
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(streaming(client))
            answer = await client.get("/v1/events", headers=ACCEPT)
            problem_of(answer, 429, Code.RATE_LIMITED)
            assert int(answer.headers["retry-after"]) > 0
            await stack.enter_async_context(streaming(theirs))
            assert (await client.get("/v1/events")).status_code == 200
            assert "leveret_api_streams 4.0" in (await client.get("/metrics")).text

        async def has_room() -> bool:
            return "leveret_api_streams 0.0" in (await client.get("/metrics")).text

        await eventually(has_room, what="streams that were left are closed")
        async with streaming(client):
            assert "leveret_api_streams 1.0" in (await client.get("/metrics")).text
            assert "leveret_api_watches 1.0" in (await client.get("/metrics")).text


async def test_a_watcher_whose_place_is_forgotten_is_told(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    for _ in range(6):
        await tenant.tell(vm_id, "progress", "building")
    await tenant.forget(4)
    page = (await client.get("/v1/events", params={"after": 2})).json()
    assert ([item["seq"] for item in page["items"]], page["forgotten_seq"]) == ([5, 6], 4)
    for last, path in ((6, "/v1/events"), (7, f"/v1/vms/{vm_id}/events")):
        async with streaming(client, path, last_id="2") as stream:
            gap, *rest = await stream.take(3)
            assert gap == Event(None, "gap", {"after": 2, "forgotten_seq": 4, "last_seq": last})
            assert seqs(rest) == [5, 6]
            await tenant.tell(vm_id, "running", "running")
            assert len(seqs(await stream.take(1))) == 1  # told once
    for place in ("4", "5"):
        async with streaming(client, last_id=place) as stream:
            assert seqs(await stream.take(1)) == [int(place) + 1]
    async with streaming(client, after=0) as stream:
        assert seqs(await stream.take(1)) == [5]  # there is no place that could be forgotten


@pytest.mark.parametrize("whose", ["project", "vm"])
async def test_a_watcher_who_knows_of_more_than_there_ever_was_is_told_and_goes_on(
    client: AsyncClient, tenant: Tenant, whose: str
) -> None:
    """It comes from before a restore of the database, or from another installation."""
    vm_id = await tenant.insert()
    path = "/v1/events" if whose == "project" else f"/v1/vms/{vm_id}/events"
    for _ in range(3):
        await tenant.tell(vm_id, "progress", "building")
    lost = Event("3", "gap", {"after": 9, "forgotten_seq": 0, "last_seq": 3})
    async with streaming(client, path, last_id="9") as stream, streaming(client, path, after=9) as other:
        assert await stream.take(1) == [lost]
        assert await other.take(1) == [lost]
        await tenant.tell(vm_id, "running", "running")
        assert (seqs(await stream.take(1)), seqs(await other.take(1))) == ([4], [4])
    for asked in (
        {"params": {"after": 9}},
        {"headers": {"Last-Event-ID": "9"}},
        {"params": {"after": 9, "wait_s": 20}},
    ):
        problem = problem_of(await client.get(path, **asked), 409, Code.STATE_CONFLICT)
        assert problem["details"] == {"after": 9, "last_seq": 4}
    assert (await client.get(path, params={"after": 4})).json()["next"] == 4


async def test_a_stream_notices_that_the_log_became_shorter(client: AsyncClient, tenant: Tenant) -> None:
    vm_id = await tenant.insert()
    for _ in range(5):
        await tenant.tell(vm_id, "progress", "building")
    async with streaming(client) as stream:
        assert seqs(await stream.take(5)) == [1, 2, 3, 4, 5]
        await tenant.connection.execute("DELETE FROM events WHERE project_id = $1 AND seq > 2", tenant.project)
        await tenant.connection.execute("UPDATE projects SET last_seq = 2 WHERE id = $1", tenant.project)
        assert await stream.take(1) == [Event("2", "gap", {"after": 5, "forgotten_seq": 0, "last_seq": 2})]
        await tenant.tell(vm_id, "running", "running")
        assert seqs(await stream.take(1)) == [3]


async def test_a_quiet_vms_watcher_has_missed_nothing_of_others_that_were_forgotten(
    quick_api: Api, tenant: Tenant
) -> None:
    quiet, loud = await tenant.insert(), await tenant.insert()
    await tenant.tell(quiet, "running", "running")
    async with (
        client_of(quick_api.url, tenant) as client,
        streaming(client, f"/v1/vms/{quiet}/events", last_id="1") as stream,
    ):
        for _ in range(5):
            await tenant.tell(loud, "progress", "building")
        for _ in range(2):  # before each heartbeat it looks at the log, and the first may have been under way
            await stream.next_comment()
        await tenant.forget(4)
        seq = await tenant.tell(quiet, "stopped", "stopped")
        assert [event.name for event in await stream.take(1)] == ["vm.stopped"]
        assert stream.last_id == str(seq)


async def test_a_stream_ends_when_the_process_stops_and_goes_on_at_the_next(
    run_dir: Path, rabbit: Rabbit, api_dsn: str, tenant: Tenant
) -> None:
    vm_id = await tenant.insert()
    settings = {"amqp_url": rabbit.url_of("leveret-api"), "database_url": api_dsn}
    with running_api(run_dir, **settings) as first, running_api(run_dir, **settings) as second:
        second.wait_ready()
        async with client_of(first.url, tenant) as client, streaming(client) as stream:
            await tenant.tell(vm_id, "running", "running")
            assert seqs(await stream.take(1)) == [1]
            first.process.send_signal(signal.SIGTERM)
            assert await stream.next() is None  # the end, and no error
            assert await asyncio.to_thread(first.process.wait, 10) == 0
            await tenant.tell(vm_id, "stopped", "stopped")
        async with client_of(second.url, tenant) as client, streaming(client, last_id=stream.last_id) as again:
            assert seqs(await again.take(1)) == [2]


async def test_a_stream_outlives_an_outage_of_the_database(
    run_dir: Path, rabbit: Rabbit, api_dsn: str, tenant: Tenant
) -> None:
    vm_id = await tenant.insert()
    proxy = Proxy(urlsplit(api_dsn).port or 0)
    await proxy.open()
    through = api_dsn.replace(f":{urlsplit(api_dsn).port}/", f":{proxy.port}/")
    with running_api(
        run_dir, amqp_url=rabbit.url_of("leveret-api"), database_url=through, heartbeat_s=HEARTBEAT_S
    ) as api:
        await asyncio.to_thread(api.wait_ready)  # the proxy runs here
        async with client_of(api.url, tenant) as client, streaming(client) as stream:
            await tenant.tell(vm_id, "running", "running")
            assert seqs(await stream.take(1)) == [1]
            await proxy.close()
            await tenant.tell(vm_id, "stopped", "stopped")
            for _ in range(3):
                await stream.next_comment()
            await proxy.open()
            assert seqs(await stream.take(1)) == [2]
    await proxy.close()


async def test_a_slow_watcher_costs_no_memory_and_misses_nothing(
    run_dir: Path, rabbit: Rabbit, api_dsn: str, tenant: Tenant
) -> None:
    """It takes nothing while 30,000 events (15 MB) are there for it, and then all of them."""
    most, vm_id = 30_000, await tenant.insert()
    await tenant.connection.execute(
        """INSERT INTO events (project_id, vm_id, vm_name, seq, type, state, data)
        SELECT $1, $2, 'x', n, 'progress', 'building', jsonb_build_object('filling', repeat('x', 300))
        FROM generate_series(1, $3::integer) AS n""",
        tenant.project,
        vm_id,
        most,
    )
    await tenant.connection.execute("UPDATE projects SET last_seq = $2 WHERE id = $1", tenant.project, most)
    with running_api(run_dir, amqp_url=rabbit.url_of("leveret-api"), database_url=api_dsn) as api:
        api.wait_ready()
        process = psutil.Process(api.process.pid)
        async with client_of(api.url, tenant) as client, AsyncExitStack() as stack:
            async with streaming(client, after=most - PAGE) as warm:
                await warm.take(PAGE)
            before = process.memory_info().rss
            slow = [await stack.enter_async_context(streaming(client)) for _ in range(5)]
            # They are as far as they will get when the process has nothing to do any more.
            await eventually(lambda: asyncio.to_thread(process.cpu_percent, 0.3), what="it reads ahead")
            await eventually(lambda: is_idle(process), what="it stops reading ahead")
            waiting = process.memory_info().rss
            assert seqs(await slow[0].take(most)) == list(range(1, most + 1))
            after = process.memory_info().rss
    mib = [round(rss / 2**20, 1) for rss in (before, waiting, after)]
    print(f"resident MiB: {mib[0]} before, {mib[1]} with 5 watchers that take nothing, {mib[2]} after one took all")
    assert waiting - before < 10 * 2**20
    assert after - before < 15 * 2**20


async def is_idle(process: psutil.Process) -> bool:
    return await asyncio.to_thread(process.cpu_percent, 0.3) < 5
