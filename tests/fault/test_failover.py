"""A standby takes over from a Postgres that died, hangs, or comes back: row 15 of the fault table."""

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import pytest
from installation import Installation, installed
from load import Load, redelivered
from peers import eventually
from standby import freeze, promote, standby_of, unfence, url_of

from leveret.shared import topology
from leveret.shared.primary import Primary
from leveret.stack.layout import Options
from leveret.stack.postgres import Postgres

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

ASKERS = ("conductor-1", "conductor-2", "api")


@dataclass
class Pair:
    """An installation whose database has a primary and a standby, and everything that was ever heard from it."""

    house: Installation
    primary: Postgres
    standby: Postgres
    events: list[tuple[int, str]] = field(default_factory=list)
    tokens: list[tuple[int, str]] = field(default_factory=list)

    def point_services(self) -> None:
        """At both, the older one first, as in settings that nobody has touched since."""
        for name in ASKERS:
            dsn = self.house.services[name].env["LEVERET_DATABASE_URL"]
            self.house.reconfigure(name, LEVERET_DATABASE_URL=url_of(dsn, self.primary, self.standby))
        self.house.wait_ready()

    def take_over(self) -> None:
        promote(self.standby)
        self.house.postgres = self.standby

    @asynccontextmanager
    async def hearing(self) -> AsyncIterator[None]:
        """Listen to what clients and hosts are told."""
        async with await aio_pika.connect(self.house.rabbit.url) as connection:
            queue = await (await connection.channel()).declare_queue(exclusive=True)
            await queue.bind("leveret.events.default", "#")
            for row in await self.house.query("SELECT id FROM hosts"):
                await queue.bind(topology.HOSTS.name, str(row["id"]))
            await queue.consume(self._hear, no_ack=True)
            yield

    async def _hear(self, message: Any) -> None:
        body = json.loads(message.body)
        if message.type == "host.desired":
            self.tokens.append((body["token"], body["vm_id"]))
        elif message.type == "vm.event.v1":
            self.events.append((int(body["sequence"]), message.body.decode()))

    def nothing_was_used_twice(self) -> None:
        """No number of an event, and no fence, ever stood for two things."""
        assert len({seq for seq, _ in self.events}) == len(set(self.events))
        numbers = sorted({seq for seq, _ in self.events})
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert len({token for token, _ in self.tokens}) == len(set(self.tokens))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with installed(Options(conductors=2, fake_hosts=8, libvirt=False)) as house:
        house.reconfigure("fake-hosts", LEVERET_HEARTBEAT_S="1")
        pair = Pair(house, house.postgres, standby_of(house.postgres, house.layout.root / "standby"))
        try:
            pair.point_services()
            yield pair
        finally:
            pair.standby.destroy()


async def test_a_standby_takes_over_with_all_that_was_accepted(
    pair: Pair, record_property: Callable[[str, object], None]
) -> None:
    """The primary is killed under load. What was told stays true, and no number of any kind is used again."""
    house, load = pair.house, Load(pair.house, random.Random(7))
    before = await redelivered(house)
    async with pair.hearing(), load.going_on(pause_s=0.05):
        await eventually(lambda: len(load.told) > 20, within_s=60, what="some asked before")
        await asyncio.to_thread(pair.primary.kill)
        asked = len(load.lives)
        await eventually(lambda: len(load.lives) > asked + 10, within_s=60, what="some asked while there is none")
        await asyncio.to_thread(pair.take_over)
        recovery_s = await load.caught_up(within_s=60)
        asked = len(load.told)
        await eventually(lambda: len(load.told) > asked + 10, within_s=60, what="some asked afterwards")
    record_property("recovery_s", round(recovery_s, 2))
    print(f"recovery {recovery_s:.2f} s, {dict(load.statuses)}")
    await load.is_kept()
    pair.nothing_was_used_twice()
    assert await redelivered(house) == before


async def test_a_former_primary_that_runs_again_is_not_written_to(pair: Pair) -> None:
    """Not by sessions that are made anew, not by processes that are, and not while the new one is away."""
    house, load = pair.house, Load(pair.house, random.Random(8))
    await asyncio.to_thread(unfence, pair.primary)

    def last_write() -> str:
        return pair.primary.psql("SELECT pg_snapshot_xmax(pg_current_snapshot())")

    before = await asyncio.to_thread(last_write)
    async with load.going_on(pause_s=0.05):
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename IN ('conductor', 'api')"
        await asyncio.to_thread(pair.standby.psql, ended)
        await asyncio.to_thread(house.kill, "conductor-1")
        await asyncio.to_thread(house.restart, "conductor-1")
        await asyncio.to_thread(house.wait_ready)
        await asyncio.to_thread(pair.standby.stop, "immediate")
        asked = len(load.lives)
        await eventually(lambda: len(load.lives) > asked + 10, within_s=60, what="some asked while it is away")
        assert await asyncio.to_thread(last_write) == before
        await asyncio.to_thread(pair.standby.start)
        await asyncio.to_thread(pair.standby.wait_ready)
        await load.caught_up(within_s=60)
    await load.is_kept()
    assert await asyncio.to_thread(last_write) == before
    await asyncio.to_thread(pair.primary.kill)


async def test_a_server_without_power_keeps_nobody_from_the_other(pair: Pair) -> None:
    """It takes no connection and refuses none: to wait for it would take all the time there is."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        silent.listen(0)
        ours = pair.house.postgres
        url = ours.dsn().replace(f":{ours.port}/", f":{silent.getsockname()[1]},127.0.0.1:{ours.port}/")
        began = time.monotonic()
        session = await Primary(url).connect(timeout=10)
        took_s = time.monotonic() - began
        try:
            assert await session.fetchval("SELECT 1") == 1
        finally:
            await session.close()
    assert took_s < 5


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_primary_that_hangs_is_left_behind(pair: Pair, record_property: Callable[[str, object], None]) -> None:
    """Its sessions stay and nobody answers: known by the time limits, as in a partition."""
    house, load = pair.house, Load(pair.house, random.Random(9))
    former = pair.standby
    pair.primary, pair.standby = former, await asyncio.to_thread(standby_of, former, house.layout.root / "third")
    try:
        await asyncio.to_thread(pair.point_services)
        async with load.going_on(pause_s=0.2):
            await eventually(lambda: len(load.told) > 20, within_s=60, what="some asked before")
            await asyncio.to_thread(freeze, former)
            await asyncio.to_thread(pair.take_over)
            recovery_s = await load.caught_up(within_s=120)
            asked = len(load.told)
            await eventually(lambda: len(load.told) > asked + 10, within_s=60, what="some asked afterwards")
        record_property("recovery_s", round(recovery_s, 2))
        print(f"recovery {recovery_s:.2f} s, {dict(load.statuses)}")
        await load.is_kept()
    finally:
        await asyncio.to_thread(former.destroy)
