"""The event feed wakes whom an event concerns, and nobody is forgotten when its connection breaks."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest
from api_world import Tenant
from peers import eventually

from leveret.api.database import Database
from leveret.api.feed import FEW, EventFeed, Watch
from leveret.shared.ids import new_id

pytestmark = pytest.mark.integration


@pytest.fixture
async def feed(api_dsn: str) -> AsyncIterator[EventFeed]:
    database = Database(api_dsn, connections_max=2)
    await database.open()
    feed = EventFeed(database)
    feed.start()
    await eventually(lambda: feed.is_listening)
    yield feed
    await feed.stop()
    await database.close()


async def is_woken(watch: Watch, within_s: float = 5.0) -> bool:
    return await watch.wait(within_s)


async def watches_of(feed: EventFeed, tenant: Tenant, stack: ExitStack, vms: list[uuid.UUID]) -> list[Watch]:
    """More watches than a few, each told once already, so that what follows is news."""
    watches = [stack.enter_context(feed.watch(tenant.project, vm_id)) for vm_id in vms]
    await tenant.tell(vms[0], "running", "running")
    for watch in watches:
        assert await is_woken(watch)
    return watches


async def test_only_those_are_woken_whom_an_event_concerns(feed: EventFeed, tenant: Tenant) -> None:
    vms = [new_id() for _ in range(FEW + 2)]
    with ExitStack() as stack:
        first, second, *others = await watches_of(feed, tenant, stack, vms)
        anything = stack.enter_context(feed.watch(tenant.project))
        settled = stack.enter_context(feed.watch(tenant.project, vms[1], settled_only=True))
        await tenant.tell(vms[1], "progress", "building")
        assert await is_woken(second)
        assert await is_woken(anything)
        assert not any([await is_woken(watch, 0) for watch in (first, settled, *others)])
        await tenant.tell(vms[1], "running", "running")
        assert await is_woken(settled)
        assert not any([await is_woken(watch, 0) for watch in (first, *others)])
    assert feed.watching == 0


async def test_the_events_of_another_project_concern_nobody(feed: EventFeed, tenant: Tenant) -> None:
    other = Tenant(f"{tenant.project}-2", tenant.connection)
    await other.move_in()
    with feed.watch(tenant.project) as ours, feed.watch(other.project) as theirs:
        await is_woken(ours, 0)
        await other.tell(new_id(), "running", "running")
        assert await is_woken(theirs)


async def test_a_burst_that_is_larger_than_one_look_wakes_everybody_it_concerns(
    feed: EventFeed, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leveret.api.feed._BATCH", 3)
    vms = [new_id() for _ in range(10)]
    with ExitStack() as stack:
        watches = await watches_of(feed, tenant, stack, vms)
        async with tenant.connection.transaction():
            for vm_id in vms:
                await tenant.tell(vm_id, "running", "running")
        assert all(await asyncio.gather(*(is_woken(watch) for watch in watches)))


async def test_everybody_looks_again_when_the_connection_comes_back(feed: EventFeed, tenant: Tenant) -> None:
    vms = [new_id() for _ in range(FEW + 2)]
    with ExitStack() as stack:
        watches = await watches_of(feed, tenant, stack, vms)
        await tenant.connection.execute(
            """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE application_name = 'leveret-api' AND query LIKE 'LISTEN%'"""
        )
        assert all(await asyncio.gather(*(is_woken(watch) for watch in watches)))
        await eventually(lambda: feed.is_listening)


async def test_a_feed_that_closes_lets_everybody_go(feed: EventFeed, tenant: Tenant) -> None:
    with feed.watch(tenant.project) as watch:
        waiting = asyncio.create_task(is_woken(watch, 20))
        await asyncio.sleep(0)
        feed.close()
        assert await waiting
