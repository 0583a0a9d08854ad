"""Row 4 of the fault table: many want the last of something at once, at several conductors.

One wins, nobody gets what is not there, the losers try the next host, and who is refused is told the true reason. The
conductors run in this process, each with connections of its own to a real broker and a real database, where they meet.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from conductor_world import World, conducting
from invariants import violations
from peers import Asker, Gateway, Host, eventually, tiny, up
from pydantic import BaseModel

from leveret.conductor.app import Conductor
from leveret.conductor.database import prepare
from leveret.shared.documents import CreateVm, DeleteVm, ImageByName, Placement, UpdateVm
from leveret.shared.errors import Code, LeveretError
from leveret.shared.groups import CreateGroup
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Observed
from leveret.shared.messages import Capacity, Verdict
from leveret.stack.rabbitmq import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

CONDUCTORS = 4
PROJECTS = tuple(f"p{n}" for n in range(8))
SLOT_MIB = 128  # of memory: what one `tiny` takes
WAIT_S = 120.0
ASKING_MAX = 300


@dataclass
class Arena:
    """Several conductors, two gateways, and a look into the database."""

    conductors: list[Conductor]
    gateways: tuple[Gateway, Gateway]
    db: "asyncpg.Connection[asyncpg.Record]"
    rabbit: Rabbit
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(ASKING_MAX))

    async def ask(self, project: str, vm_id: UUID, verb: BaseModel) -> Verdict:
        """The verdict on what one of the gateways asks for."""
        headers = {"vm_id": str(vm_id), "request_id": new_id().hex, "project": project}
        while True:
            try:
                async with self.turns:
                    return await random.choice(self.gateways).ask_with(verb, headers, wait_s=WAIT_S)
            except LeveretError as error:  # this process is too busy to hear a confirm in time: the same once more
                if error.problem.code is not Code.UNAVAILABLE:
                    raise

    async def create(self, project: str, spec: CreateVm | None = None, vm_id: UUID | None = None) -> Verdict:
        return await self.ask(project, vm_id or new_id(), spec or tiny())

    @asynccontextmanager
    async def hosts(self, *hosts: Host) -> AsyncIterator[None]:
        """These hosts, of which none falls silent."""

        async def beat() -> None:
            while True:
                await asyncio.sleep(5)
                with suppress(LeveretError):
                    await asyncio.gather(*(host.beat() for host in hosts))

        async with World(self.conductors[0], self.gateways[0], self.db, self.rabbit).hosts(*hosts):
            beating = asyncio.create_task(beat())
            yield
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def sound(self) -> None:
        """Every rule of the database holds, as soon as the events are numbered."""

        async def numbered() -> bool:
            return not await self.db.fetchval("SELECT count(*) FROM events WHERE seq IS NULL")

        await eventually(numbered, within_s=60)
        assert await violations(self.db) == {}
        [stand] = await self.db.fetch("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        assert stand["deadlocks"] == 0, "locks are taken in one order; a deadlock costs everybody in it a second"


@pytest.fixture
async def arena(broker: Rabbit, database: str) -> AsyncIterator[Arena]:
    db = await asyncpg.connect(database)
    await prepare(db)
    await db.executemany("INSERT INTO projects (id) VALUES ($1)", [(project,) for project in PROJECTS])
    gateways = (Gateway(broker), Gateway(broker))
    async with AsyncExitStack() as stack:
        conductors = [await stack.enter_async_context(conducting(broker, database)) for _ in range(CONDUCTORS)]
        await stack.enter_async_context(up(*gateways))
        consumers = [consumer for conductor in conductors for consumer in conductor.consumers]
        await eventually(lambda: all(consumer.is_consuming for consumer in consumers), within_s=30)
        yield Arena(conductors, gateways, db, broker)
    await db.close()


def told(verdicts: Sequence[Verdict]) -> Counter[str]:
    return Counter(str(verdict.problem.code) if verdict.problem else "accepted" for verdict in verdicts)


def sized(name: str, *, vcpus: int = 64, memory_mib: int = 64 * SLOT_MIB, disk_gib: int = 64) -> dict[str, Any]:
    return {"name": name, "size": Capacity(vcpus=vcpus, memory_mib=memory_mib, disk_gib=disk_gib)}


async def test_of_those_who_chose_the_last_slot_one_wins_and_the_others_take_the_next_host(arena: Arena) -> None:
    """All four conductors have chosen the best host before any of them can claim it: its row is held meanwhile."""
    best = Host(arena.rabbit, **sized("best", memory_mib=SLOT_MIB + 8))
    others = [Host(arena.rabbit, **sized(f"other{n}", memory_mib=SLOT_MIB)) for n in range(2)]
    async with arena.hosts(best, *others):
        async with arena.db.transaction():
            await arena.db.execute("SELECT FROM hosts WHERE id = $1 FOR NO KEY UPDATE", best.id)
            # Of as many projects, since those of one project take turns.
            asking = [asyncio.create_task(arena.create(project)) for project in PROJECTS]
            await eventually(lambda: four_wait(arena), within_s=30, what="every conductor waits for the best host")
        verdicts = await asyncio.gather(*asking)
        assert told(verdicts) == {"accepted": 3, Code.NO_CAPACITY: len(PROJECTS) - 3}
        for verdict in verdicts:
            if verdict.problem:
                assert verdict.problem.details["constraints"] == {"memory_mib": 3}
                assert verdict.problem.details["largest"]["memory_mib"] < SLOT_MIB
        placed = await arena.db.fetch("SELECT host_id, token FROM vms")
        assert {row["host_id"] for row in placed} == {best.id, *(host.id for host in others)}
        assert len({row["token"] for row in placed}) == 3
        await arena.sound()


async def four_wait(arena: Arena) -> bool:
    """Whether every conductor waits for somebody else's lock."""
    return bool(await arena.db.fetchval("SELECT count(DISTINCT pid) = $1 FROM pg_locks WHERE NOT granted", CONDUCTORS))


def scarce(number: int, slots: int) -> dict[str, Any]:
    """A host with so many slots, of which in turn another thing is scarce."""
    name = f"h{number:03}"
    match number % 3:
        case 0:
            return sized(name, vcpus=slots)
        case 1:
            return sized(name, memory_mib=slots * SLOT_MIB)
        case _:
            return sized(name, disk_gib=slots)


@pytest.mark.parametrize(
    ("host_count", "asked"),
    [(30, 400), pytest.param(60, 1500, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
async def test_hundreds_who_race_on_nearly_full_hosts_fill_them_exactly(
    arena: Arena, host_count: int, asked: int
) -> None:
    chance = random.Random(4)
    slots = [chance.randint(1, 3) for _ in range(host_count)]
    hosts = [Host(arena.rabbit, **scarce(n, count)) for n, count in enumerate(slots)]
    async with arena.hosts(*hosts):
        specs = [tiny(placement=Placement(strategy=chance.choice(("pack", "spread")))) for _ in range(asked)]
        verdicts = await asyncio.gather(
            *(arena.create(PROJECTS[n % len(PROJECTS)], spec) for n, spec in enumerate(specs))
        )
        assert told(verdicts) == {"accepted": sum(slots), Code.NO_CAPACITY: asked - sum(slots)}
        kinds = Counter(("vcpus", "memory_mib", "disk_gib")[n % 3] for n in range(host_count))
        for verdict in verdicts:
            if verdict.problem:
                # Whoever is told "no" is told so because every host is full, and not because a race was lost.
                assert verdict.problem.details["hosts"] == host_count
                assert verdict.problem.details["constraints"] == kinds
        placed = Counter(row["host_id"] for row in await arena.db.fetch("SELECT host_id FROM vms"))
        assert placed == {host.id: count for host, count in zip(hosts, slots, strict=True)}
        heard = [{command.vm_id for command in host.heard} for host in hosts]
        assert all(len(vms) <= count for vms, count in zip(heard, slots, strict=True)), (
            "no other host was told to build"
        )
        await arena.sound()


async def test_slots_that_come_free_while_many_race_are_given_once_and_none_is_lost(arena: Arena) -> None:
    """Every VM is deleted as soon as it runs, by its owner; in the end as many fit as in the beginning."""
    slots = [2, 1, 2, 1]
    hosts = [Host(arena.rabbit, **sized(f"h{n}", memory_mib=count * SLOT_MIB)) for n, count in enumerate(slots)]
    verdicts: Counter[str] = Counter()

    async def serve(host: Host) -> None:
        """Do as a host does: make what it is told to make, and remove what it is told to remove."""
        while True:
            await eventually(lambda: host.heard, within_s=WAIT_S)
            command = host.heard.pop(0)
            gone = command.wanted == "absent"
            await host.say(host.seen(command, Observed.ABSENT if gone else Observed.RUNNING))

    async def ask(project: str) -> None:
        for _ in range(6):
            vm_id = new_id()
            verdict = await arena.create(project, vm_id=vm_id)
            verdicts.update(told([verdict]))
            if verdict.accepted:
                assert (await arena.ask(project, vm_id, DeleteVm())).accepted
            await asyncio.sleep(0.02)

    async with arena.hosts(*hosts):
        serving = [asyncio.create_task(serve(host)) for host in hosts]
        try:
            await asyncio.gather(*(ask(project) for project in PROJECTS for _ in range(2)))

            async def all_gone() -> bool:
                return not await arena.db.fetchval("SELECT count(*) FROM vms WHERE state <> 'deleted'")

            await eventually(all_gone, within_s=60, what="everything deleted")
            assert verdicts.keys() <= {"accepted", Code.NO_CAPACITY}
            assert verdicts["accepted"] > sum(slots), "slots were used again"
            last = await asyncio.gather(*(arena.create(PROJECTS[n % len(PROJECTS)]) for n in range(3 * sum(slots))))
            assert told(last) == {"accepted": sum(slots), Code.NO_CAPACITY: 2 * sum(slots)}
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
        await arena.sound()


@pytest.mark.parametrize(
    ("host_count", "clients"),
    [(50, 5), pytest.param(200, 20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
async def test_single_vms_and_groups_that_race_for_a_nearly_full_fleet_fill_it_exactly(
    arena: Arena, host_count: int, clients: int
) -> None:
    """Each client asks fifty times, for one VM or for three that must be apart, of which all come about, or none."""
    chance = random.Random(5)
    slots = [chance.randint(0, 2) for _ in range(host_count)]
    await arena.db.executemany(
        """INSERT INTO hosts (id, name, zone, epoch, virt_type, version, vcpus, memory_mib, disk_gib, heartbeat_at)
        VALUES ($1, $2, $3, 1, 'simulated', '1', $4, 1000000, 1000, now() + interval '1 day')""",
        [(new_id(), f"h{n}", f"z{n % 3}", count) for n, count in enumerate(slots)],
    )

    async def ask(client: int) -> list[Verdict]:
        project, verdicts = PROJECTS[client % len(PROJECTS)], list[Verdict]()
        for n in range(50):
            if n % 3:
                verdicts.append(await arena.create(project))
                continue
            group = CreateGroup(name=f"g{client}-{n}")
            assert (await arena.gateways[0].order(group, project=project)).accepted
            verdicts.append(await arena.create(project, tiny(count=3, placement=Placement(group=group.name))))
        return verdicts

    verdicts = [one for heard in await asyncio.gather(*map(ask, range(clients))) for one in heard]
    made = sum(max(1, len(verdict.vms)) for verdict in verdicts if verdict.accepted)
    assert made == sum(slots), "whatever there was is given, and nothing else"
    assert any(verdict.vms for verdict in verdicts), "some groups came about"
    for verdict in verdicts:
        if verdict.problem:
            assert verdict.problem.code is Code.NO_CAPACITY
            assert verdict.problem.details["hosts"] == host_count
            assert verdict.problem.details["constraints"]["vcpus"] <= host_count
    apart = await arena.db.fetch(
        """SELECT count(*) AS vms, count(DISTINCT host_id) AS hosts FROM vms
        WHERE group_name IS NOT NULL GROUP BY project_id, group_name"""
    )
    assert {(row["vms"], row["hosts"]) for row in apart} == {(3, 3)}
    await arena.sound()


async def test_one_id_asked_for_at_once_through_every_door_is_one_vm(arena: Arena) -> None:
    """Two gateways and an AMQP client of the project, and another project that wants the same id."""
    ada, otto = Asker(arena.rabbit, "ada"), Asker(arena.rabbit, "otto")
    await arena.db.execute(
        "INSERT INTO amqp_users (name, project_id, role) VALUES ('ada', 'p0', 'member'), ('otto', 'p1', 'member')"
    )
    host = Host(arena.rabbit, **sized("h", vcpus=1000, memory_mib=1000 * SLOT_MIB, disk_gib=1000))
    same, other = tiny(), tiny(labels={"a": "b"})
    async with arena.hosts(host), up(ada, otto):
        ids = [new_id() for _ in range(40)]

        async def ask(vm_id: UUID) -> dict[str, list[Verdict]]:
            as_client = {"vm_id": str(vm_id), "request_id": "7"}
            asked = [
                ("mine", arena.ask("p0", vm_id, same)),
                ("mine", arena.ask("p0", vm_id, same)),
                ("mine", ada.ask_with(same, as_client, wait_s=WAIT_S)),
                ("rival", arena.ask("p0", vm_id, other)),
                ("stranger", otto.ask_with(same, as_client, wait_s=WAIT_S)),
            ]
            random.shuffle(asked)
            verdicts: dict[str, list[Verdict]] = {}
            for (who, _), verdict in zip(asked, await asyncio.gather(*(one for _, one in asked)), strict=True):
                verdicts.setdefault(who, []).append(verdict)
            return verdicts

        winners: Counter[str] = Counter()
        for verdicts in await asyncio.gather(*(ask(vm_id) for vm_id in ids)):
            won = {who: told(heard) for who, heard in verdicts.items()}
            [winner] = [name for name, codes in won.items() if "accepted" in codes]
            winners[winner] += 1
            assert set(won.pop(winner)) == {"accepted"}, "all who asked for the same got the same"
            assert set(sum(won.values(), Counter())) == {Code.ID_CONFLICT}
        assert len(winners) > 1, "there was a race"
        rows = await arena.db.fetch("SELECT id FROM vms")
        assert {row["id"] for row in rows} == set(ids)
        assert await arena.db.fetchval("SELECT count(*) FROM events WHERE type = 'accepted'") == len(ids)
        await arena.sound()


async def test_a_name_that_creates_and_renames_race_for_is_given_to_one(arena: Arena) -> None:
    host = Host(arena.rabbit, **sized("h", vcpus=1000, memory_mib=1000 * SLOT_MIB, disk_gib=1000))
    async with arena.hosts(host):
        names = [f"web{n}" for n in range(15)]
        old = [new_id() for _ in names for _ in range(3)]
        await asyncio.gather(*(arena.create("p0", tiny(f"old{n}"), vm_id) for n, vm_id in enumerate(old)))
        asked = []
        for n, name in enumerate(names):
            asked += [arena.create("p0", tiny(name)) for _ in range(3)]
            for vm_id in old[3 * n : 3 * n + 3]:
                rename = UpdateVm(name=name)
                asked.append(arena.ask("p0", vm_id, rename))
        random.Random(4).shuffle(asked)
        assert told(await asyncio.gather(*asked)) == {"accepted": len(names), Code.NAME_TAKEN: 5 * len(names)}
        held = await arena.db.fetch("SELECT name, count(*) AS n FROM vms WHERE name LIKE 'web%' GROUP BY name")
        assert {row["name"]: row["n"] for row in held} == dict.fromkeys(names, 1)
        await arena.sound()


async def test_the_last_of_a_quota_and_the_last_slot_are_each_given_once(arena: Arena) -> None:
    """One project may have less than there is room for, the other more."""
    await arena.db.execute("UPDATE quotas SET vms_max = 5 WHERE project_id = 'p0'")
    host = Host(arena.rabbit, **sized("h", memory_mib=12 * SLOT_MIB))
    async with arena.hosts(host):
        verdicts = await asyncio.gather(*(arena.create("p0") for _ in range(60)))
        assert told(verdicts) == {"accepted": 5, Code.QUOTA_EXCEEDED: 55}
        verdicts = await asyncio.gather(*(arena.create("p1") for _ in range(60)))
        assert told(verdicts) == {"accepted": 7, Code.NO_CAPACITY: 53}
        used = await arena.db.fetch("SELECT project_id, vms_used FROM quotas WHERE vms_used > 0")
        assert {row["project_id"]: row["vms_used"] for row in used} == {"p0": 5, "p1": 7}
        await arena.sound()


async def test_the_last_addresses_of_a_network_are_each_given_once(arena: Arena) -> None:
    await arena.db.execute("SELECT create_network('narrow', '10.81.0.0/28', '10.81.0.1', '{}')")
    free = await arena.db.fetchval("SELECT count(*) FROM addresses WHERE network = 'narrow'")
    host = Host(arena.rabbit, **sized("h", vcpus=1000, memory_mib=1000 * SLOT_MIB, disk_gib=1000))
    spec = CreateVm(vcpus=1, memory_mib=128, disk_gib=1, image=ImageByName(name="tiny"), network="narrow")
    async with arena.hosts(host):
        verdicts = await asyncio.gather(*(arena.create(PROJECTS[n % 8], spec) for n in range(8 * free)))
        assert told(verdicts) == {"accepted": free, Code.NO_ADDRESS: 7 * free}
        rows = await arena.db.fetch("SELECT DISTINCT address FROM vms")
        assert len(rows) == free
        [used] = await arena.db.fetch("SELECT vcpus_used FROM hosts")
        assert used["vcpus_used"] == free
        await arena.sound()
