"""What hosts say of themselves (whom they take, how many, how much, which images they have), and what comes of it."""

import asyncio
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from conductor_world import World, conducting
from invariants import violations
from peers import Host, eventually, tiny

from leveret.conductor.database import open_pool, transaction
from leveret.conductor.store import hosts
from leveret.shared.documents import DeleteVm, Placement
from leveret.shared.errors import Code, Problem
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Observed, State, Wanted
from leveret.shared.messages import Capacity, Heartbeat, Verdict

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

LARGE = Capacity(vcpus=500, memory_mib=500_000, disk_gib=500)
TAINTS = {"dedicated": "team-a"}


def beat(host_id: UUID, **more: Any) -> Heartbeat:
    facts: dict[str, Any] = {
        "epoch": 1,
        "name": "h1",
        "zone": "z1",
        "labels": {},
        "virt_type": "simulated",
        "total": LARGE,
        "placeable": LARGE,
        "digest": "",
        "version": "test",
    }
    return Heartbeat(host_id=host_id, **(facts | more))


def sha256s(count: int) -> tuple[str, ...]:
    return tuple(hashlib.sha256(bytes([number])).hexdigest() for number in range(count))


def told(verdicts: list[Verdict]) -> Counter[str]:
    return Counter(str(verdict.problem.code) if verdict.problem else "accepted" for verdict in verdicts)


# What stands in the row.


async def test_what_a_host_says_of_itself_is_what_the_scheduler_sees_and_what_it_says_no_more_is_gone(
    database: str,
) -> None:
    one, other = uuid4(), uuid4()
    images = sha256s(3)
    pool = await open_pool(database, max_size=1)
    async with pool, transaction(pool) as connection:
        said = beat(one, labels={"disk": "ssd"}, taints={"dedicated": "team-a"}, vms_max=0, images=images)
        await hosts.register(connection, [said, beat(other)])
        seen = {host.id: host for host in await hosts.snapshot(connection)}
        assert (seen[one].taints, seen[one].vms_max, seen[one].vms) == ({"dedicated": "team-a"}, 0, 0)
        assert (seen[one].labels, seen[one].images) == ({"disk": "ssd"}, frozenset(images))
        assert (seen[other].taints, seen[other].vms_max, seen[other].images) == ({}, None, frozenset())
        assert await hosts.lock(connection, [one, other]) == seen

        await hosts.register(connection, [beat(one, vms_max=7, images=images[:1]), beat(other, taints={"gpu": "yes"})])
        seen = await hosts.lock(connection, [one, other])
        assert (seen[one].taints, seen[one].vms_max, seen[one].images) == ({}, 7, frozenset(images[:1]))
        assert seen[other].taints == {"gpu": "yes"}


async def test_heartbeats_that_say_the_same_write_no_images_and_tell_of_no_room(database: str) -> None:
    """64 hashes are stored beside the row: they are written when they are others, whatever their order."""
    host_id, images = uuid4(), sha256s(64)
    pool = await open_pool(database, max_size=1)

    async def beside_and_rooms() -> tuple[int, int]:
        async with pool.acquire() as connection:
            size = await connection.fetchval(
                "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = 'hosts'::regclass"
            )
            return size, await hosts.rooms(connection)

    async def say(said: tuple[str, ...]) -> None:
        async with transaction(pool) as connection:
            heartbeat = beat(host_id, taints={"a": "b"}, vms_max=3, labels={"c": "d"}, images=said)
            await hosts.register(connection, [heartbeat])

    async with pool:
        await say(images)
        before, rooms = await beside_and_rooms()
        assert before > 0
        for turn in range(50):
            await say(images[turn:] + images[:turn])
        assert await beside_and_rooms() == (before, rooms)
        for turn in range(50):
            await say(images[turn:])
        after, still = await beside_and_rooms()
        assert after > before, "others are written"
        assert still == rooms


# How many.


@asynccontextmanager
async def four_conductors(world: World) -> AsyncIterator[None]:
    """Three more than the world's own."""
    dsn = world.conductor.settings.database_url
    async with AsyncExitStack() as stack:
        more = [await stack.enter_async_context(conducting(world.rabbit, dsn)) for _ in range(3)]
        consumers = [consumer for conductor in more for consumer in conductor.consumers]
        await eventually(lambda: all(consumer.is_consuming for consumer in consumers), within_s=30)
        yield


def limited(world: World, name: str, vms_max: int) -> Host:
    host = Host(world.rabbit, name=name, size=LARGE)
    host.vms_max = vms_max
    return host


async def placed(world: World) -> Counter[UUID]:
    rows = await world.db.fetch("SELECT host_id FROM vms WHERE host_id IS NOT NULL")
    return Counter(row["host_id"] for row in rows)


async def test_of_those_who_chose_the_last_place_of_a_host_one_has_it(world: World) -> None:
    """Every conductor has chosen the host and waits for its row: what it has by then is not what was read before."""
    host = limited(world, "h1", 1)
    projects = [f"p{n}" for n in range(8)]  # of as many projects, since those of one take turns
    await world.db.executemany("INSERT INTO projects (id) VALUES ($1)", [(project,) for project in projects])
    async with four_conductors(world), world.hosts(host):
        async with world.db.transaction():
            await world.db.execute("SELECT FROM hosts FOR NO KEY UPDATE")
            asking = [asyncio.create_task(world.gateway.ask(new_id(), tiny(), project=project)) for project in projects]

            async def four_wait() -> bool:
                return bool(await world.db.fetchval("SELECT count(DISTINCT pid) = 4 FROM pg_locks WHERE NOT granted"))

            await eventually(four_wait, within_s=30, what="four conductors that wait")
        verdicts = await asyncio.gather(*asking)
        assert told(verdicts) == {"accepted": 1, Code.NO_CAPACITY: len(projects) - 1}
        assert await placed(world) == {host.id: 1}
        await eventually(lambda: holds(world), what="every rule of the database")


async def holds(world: World) -> bool:
    return await violations(world.db) == {}


async def test_hundreds_who_race_for_few_places_fill_them_exactly_and_places_come_back(world: World) -> None:
    free = [3, 1, 0, 2, 5]
    those = [limited(world, f"h{n}", vms_max) for n, vms_max in enumerate(free)]
    full = {host.id: count for host, count in zip(those, free, strict=True) if count}
    async with four_conductors(world), world.hosts(*those):
        for _ in range(2):
            verdicts = await asyncio.gather(*(world.gateway.ask(new_id(), tiny(), wait_s=60) for _ in range(150)))
            assert told(verdicts) == {"accepted": sum(free), Code.NO_CAPACITY: 150 - sum(free)}
            assert await placed(world) == full
            made = [verdict.vm_id for verdict in verdicts if verdict.accepted and verdict.vm_id]
            await asyncio.gather(*(world.gateway.ask(vm_id, DeleteVm(), wait_s=60) for vm_id in made))
            assert await placed(world) == full, "a place is free when the host has said that the VM is gone"
            for vm_id in made:
                await gone(those, vm_id)
            for vm_id in made:
                await world.until(vm_id, State.DELETED)
        await eventually(lambda: holds(world), what="every rule of the database")


async def gone(those: list[Host], vm_id: UUID) -> None:
    """Whichever host was told to remove the VM says that it has."""

    def told_to() -> Any:
        return next(
            ((host, c) for host in those for c in host.heard if c.vm_id == vm_id and c.wanted is Wanted.ABSENT), None
        )

    host, command = await eventually(told_to, what=f"somebody told to remove {vm_id}")
    await host.say(host.seen(command, Observed.ABSENT))


async def test_a_host_that_takes_fewer_than_it_has_keeps_them_and_takes_no_more(world: World) -> None:
    host = limited(world, "h1", 3)
    async with world.hosts(host):
        ids = [new_id() for _ in range(3)]
        for vm_id in ids:
            assert (await world.gateway.ask(vm_id, tiny())).accepted
        host.vms_max = 1
        await host.beat()
        await eventually(lambda: says(world, vms_max=1))
        refused = await world.gateway.ask(new_id(), tiny())
        assert refused.problem is not None
        assert refused.problem.code == Code.NO_CAPACITY
        assert await placed(world) == {host.id: 3}
        host.vms_max = None
        await host.beat()
        await eventually(lambda: says(world, vms_max=None))
        assert (await world.gateway.ask(new_id(), tiny())).accepted


async def says(world: World, **expected: Any) -> bool:
    """Whether the only host's row says so."""
    row = await world.db.fetchrow("SELECT * FROM hosts")
    return row is not None and all(row[name] == value for name, value in expected.items())


# A worker's settings.


@asynccontextmanager
async def worker(world: World, state_dir: Path, **settings: str) -> AsyncIterator[None]:
    """The worker of one simulated host with these settings; killed in the end. Its VMs are kept."""
    env = {
        **os.environ,
        "LEVERET_AMQP_URL": world.rabbit.url_of("leveret-compute"),
        "LEVERET_HOST_STATE_DIR": str(state_dir),
        "LEVERET_HOST_NAME": "lab",
        "LEVERET_HEARTBEAT_S": "0.2",
        "LEVERET_POOL_CHECK_S": "0.2",
        "LEVERET_SIMULATE_PERSIST": "true",
        "LEVERET_SIMULATE_VCPUS": "4",
        "LEVERET_SIMULATE_MEMORY_MIB": "4096",
        "LEVERET_SIMULATE_DISK_GIB": "100",
        "LEVERET_RESERVE_MEMORY_MIB": "0",
        "LEVERET_RESERVE_DISK_GIB": "0",
        "LEVERET_VCPU_RATIO": "2",
        **settings,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "leveret.compute.app", "--simulate", "1", env=env
    )
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_what_an_operator_sets_anew_counts_with_the_next_heartbeats_and_overbooks_nothing(
    world: World, tmp_path: Path
) -> None:
    ids = [new_id() for _ in range(6)]
    async with worker(world, tmp_path):
        await eventually(lambda: says(world, vcpus=8, memory_mib=4096, disk_gib=100), within_s=20)
        for vm_id in ids:
            assert (await world.gateway.ask(vm_id, tiny())).accepted
        for vm_id in ids:
            await world.until(vm_id, State.RUNNING)
        await eventually(lambda: says(world, images=["0" * 64]), what="the image that was fetched is told")
    less = {"LEVERET_RESERVE_VCPUS": "2", "LEVERET_VCPU_RATIO": "1.5", "LEVERET_RESERVE_DISK_GIB": "90"}
    async with worker(world, tmp_path, **less):
        await eventually(lambda: says(world, epoch=2, vcpus=6, vcpus_used=6, disk_gib=10), within_s=20)
        refused = await world.gateway.ask(new_id(), tiny())
        assert refused.problem is not None
        assert refused.problem.code == Code.NO_CAPACITY
        assert (await placed(world)).total() == 6, "it is full, and keeps what it has"
    more = {"LEVERET_SIMULATE_DISK_GIB": "200", "LEVERET_VCPU_RATIO": "4"}
    async with worker(world, tmp_path, **more, LEVERET_TAINTS=json.dumps(TAINTS), LEVERET_MAX_VMS="7"):
        await eventually(lambda: says(world, epoch=3, vcpus=16, disk_gib=200, taints=TAINTS, vms_max=7), within_s=20)
        assert not (await world.gateway.ask(new_id(), tiny())).accepted, "it is kept for others"
        tolerant = tiny(placement=Placement(tolerate=TAINTS))
        assert (await world.gateway.ask(new_id(), tolerant)).accepted
        assert not (await world.gateway.ask(new_id(), tolerant)).accepted, "seven are as many as it takes"


# Why it is out of use.


async def test_a_host_on_which_too_many_builds_failed_says_why_the_last_one_did(world: World) -> None:
    host = Host(world.rabbit)
    async with world.hosts(host):
        for n in range(5):
            vm_id = new_id()
            await world.gateway.ask(vm_id, tiny())
            problem = Problem.of(Code.DISK_FULL, f"The pool is full: try {n}.", step="disk")
            await host.fails(await host.command(vm_id), problem)
            await world.until(vm_id, State.ERROR)
        reason = "5 builds failed in a row; the last: disk_full, The pool is full: try 4."
        assert await says(world, state="cordoned", state_reason=reason)
