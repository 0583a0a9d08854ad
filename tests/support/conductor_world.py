"""A conductor on a real broker and a real database, in the test's own process."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
from peers import Gateway, Host, eventually, up

from leveret.conductor.app import Conductor
from leveret.conductor.database import open_pool, prepare
from leveret.conductor.settings import ConductorSettings
from leveret.shared.lifecycle import State
from leveret.stack.rabbitmq import Rabbit


@dataclass
class World:
    """A conductor, somebody who asks, and a look into the database."""

    conductor: Conductor
    gateway: Gateway
    db: "asyncpg.Connection[asyncpg.Record]"
    rabbit: Rabbit

    async def row(self, vm_id: uuid.UUID) -> Any:
        return await self.db.fetchrow("SELECT * FROM vms WHERE id = $1", vm_id)

    async def until(self, vm_id: uuid.UUID, state: State) -> Any:
        async def there() -> Any:
            row = await self.row(vm_id)
            return row if row is not None and row["state"] == state else None

        return await eventually(there, what=f"{vm_id} {state}")

    async def until_ready(self, vm_id: uuid.UUID) -> None:
        async def ready() -> bool:
            return bool((await self.row(vm_id))["guest_ready"])

        await eventually(ready, what=f"the guest of {vm_id} ready")

    async def used(self) -> list[tuple[int, int, int]]:
        rows = await self.db.fetch("SELECT vcpus_used, memory_mib_used, disk_gib_used FROM hosts ORDER BY name")
        return [tuple(row) for row in rows]

    @asynccontextmanager
    async def hosts(self, *hosts: Host) -> AsyncIterator[None]:
        async with up(*hosts):
            for host in hosts:
                await host.beat()

            async def registered() -> bool:
                ids = [host.id for host in hosts]
                return bool(await self.db.fetchval("SELECT count(*) = $2 FROM hosts WHERE id = ANY($1)", ids, len(ids)))

            await eventually(registered, what="hosts registered")
            yield

    async def events(self, project: str = "default") -> list[Any]:
        """The project's log in its order, whether numbered yet or not."""
        return await self.db.fetch("SELECT * FROM events WHERE project_id = $1 ORDER BY id", project)


@asynccontextmanager
async def conducting(broker: Rabbit, database: str) -> AsyncIterator[Conductor]:
    """One more conductor, quick to look again."""
    settings = ConductorSettings(
        amqp_url=broker.url_of("leveret-conductor"), database_url=database, sweep_s=0.1, resend_s=0.5, drain_s=2
    )
    conductor = Conductor(settings, await open_pool(database, max_size=4))
    await conductor.start()
    try:
        yield conductor
    finally:
        await conductor.stop()


@asynccontextmanager
async def world_of(broker: Rabbit, database: str) -> AsyncIterator[World]:
    """A conductor, and somebody who asks it."""
    async with conducting(broker, database) as conductor:
        db = await asyncpg.connect(database)
        await prepare(db)
        gateway = Gateway(broker)
        try:
            async with up(gateway):
                yield World(conductor, gateway, db, broker)
        finally:
            await db.close()
