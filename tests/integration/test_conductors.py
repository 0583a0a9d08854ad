"""Several conductors at once, and a Postgres that goes away under them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import asyncpg
import pytest
from invariants import violations
from peers import Gateway, Host, eventually, tiny, up

from leveret.conductor.app import Conductor
from leveret.conductor.database import open_pool
from leveret.conductor.settings import ConductorSettings
from leveret.shared.documents import DeleteVm
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Observed
from leveret.shared.messages import Capacity
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration


@pytest.fixture
async def three(broker: Rabbit, database: str) -> AsyncIterator[list[Conductor]]:
    settings = ConductorSettings(
        amqp_url=broker.url_of("leveret-conductor"),
        database_url=database,
        sweep_s=0.2,
        resend_s=1,
        drain_s=2,
        batch_max=10,  # small batches, so that all three have work at the same time
    )
    conductors = [Conductor(settings, await open_pool(database, max_size=4)) for _ in range(3)]
    for conductor in conductors:
        await conductor.start()
    yield conductors
    for conductor in conductors:
        await conductor.stop()


async def register(database: str, *hosts: Host) -> None:
    connection = await asyncpg.connect(database)
    for host in hosts:
        await host.beat()

    async def registered() -> bool:
        return bool(await connection.fetchval("SELECT count(*) = $1 FROM hosts", len(hosts)))

    await eventually(registered)
    await connection.close()


async def test_many_conductors_race_for_the_last_slots_and_nobody_overbooks(
    three: list[Conductor], broker: Rabbit, database: str
) -> None:
    size = Capacity(vcpus=8, memory_mib=8 * 128, disk_gib=100)
    gateway, hosts = Gateway(broker), [Host(broker, name=f"h{n}", size=size) for n in range(4)]
    async with up(gateway, *hosts):
        await register(database, *hosts)
        verdicts = await asyncio.gather(*(gateway.ask(new_id(), tiny(), wait_s=60) for _ in range(100)))
        assert sum(verdict.accepted for verdict in verdicts) == 32
        assert {v.problem.code for v in verdicts if v.problem} == {Code.NO_CAPACITY}
        for verdict in verdicts:
            if verdict.problem:
                # Whoever is told "no" is told so for want of capacity, not because a race was lost.
                assert verdict.problem.details["largest"]["memory_mib"] == 0
        connection = await asyncpg.connect(database)
        used = await connection.fetch("SELECT vcpus_used FROM hosts")
        assert [row["vcpus_used"] for row in used] == [8] * 4
        addresses = await connection.fetch("SELECT address FROM vms")
        assert len({row["address"] for row in addresses}) == 32

        async def quiet() -> bool:
            return not await violations(connection)

        await eventually(quiet, what="no violations")
        await connection.close()


async def test_a_name_asked_for_by_many_at_once_is_given_to_one(
    three: list[Conductor], broker: Rabbit, database: str
) -> None:
    gateway, host = Gateway(broker), Host(broker)
    async with up(gateway, host):
        await register(database, host)
        verdicts = await asyncio.gather(*(gateway.ask(new_id(), tiny("web"), wait_s=60) for _ in range(40)))
        assert Counter(v.problem.code if v.problem else "accepted" for v in verdicts) == {
            "accepted": 1,
            Code.NAME_TAKEN: 39,
        }


async def test_when_postgres_crashes_under_load_everything_waits_and_goes_on(
    three: list[Conductor], broker: Rabbit, database: str, postgres: Postgres
) -> None:
    gateway = Gateway(broker)
    host = Host(broker, size=Capacity(vcpus=500, memory_mib=500_000, disk_gib=500))
    async with up(gateway, host):
        await register(database, host)
        ids = [new_id() for _ in range(60)]
        asking = [asyncio.ensure_future(gateway.ask(vm_id, tiny(), wait_s=60)) for vm_id in ids]
        for _ in range(2):
            await asyncio.to_thread(postgres.restart, "immediate")
        verdicts = await asyncio.gather(*asking)
        assert all(verdict.accepted for verdict in verdicts)
        for vm_id in ids:
            await host.say(host.seen(await host.command(vm_id), Observed.RUNNING))
        connection = await asyncpg.connect(database)

        async def running() -> bool:
            return bool(await connection.fetchval("SELECT count(*) = 60 FROM vms WHERE state = 'running'"))

        await eventually(running, within_s=20)

        async def quiet() -> bool:
            return not await violations(connection)

        await eventually(quiet, what="no violations")
        await connection.close()
        for conductor in three:
            assert all(consumer.is_consuming for consumer in conductor.consumers)


async def test_a_delete_that_meets_its_create_at_another_conductor_wins_or_comes_after(
    three: list[Conductor], broker: Rabbit, database: str
) -> None:
    """There is no row yet that either could lock: never is both true, that it was deleted before and lives."""
    size = Capacity(vcpus=500, memory_mib=500_000, disk_gib=500)
    gateway, host = Gateway(broker), Host(broker, size=size)
    async with up(gateway, host):
        await register(database, host)
        ids = [new_id() for _ in range(150)]
        asked = [gateway.ask(vm_id, verb, wait_s=60) for vm_id in ids for verb in (DeleteVm(), tiny())]
        verdicts = await asyncio.gather(*asked)
        connection = await asyncpg.connect(database)
        rows = await connection.fetch(
            "SELECT v.id FROM vms v JOIN tombstones t ON t.vm_id = v.id AND t.project_id = v.project_id"
        )
        assert rows == []
        made = {row["id"] for row in await connection.fetch("SELECT id FROM vms")}
        told = {vm_id for vm_id, verdict in zip(ids, verdicts[1::2], strict=True) if verdict.accepted}
        assert made == told
        await connection.close()
