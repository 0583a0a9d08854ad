"""A small installation whose processes go wrong where they are told to, and are started again when they end."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import aio_pika
from installation import Installation, installed
from invariants import broken_in, checked
from nursery import Nursery
from peers import eventually

from leveret.client import Leveret
from leveret.shared import topology
from leveret.shared.fault_points import Deed
from leveret.stack.layout import Options

WATCH_S = 0.02

#: What makes faults short: nothing waits for long before it looks again.
QUICK = {
    "LEVERET_STEP_TIMEOUT_S": "1",
    "LEVERET_IMAGE_TIMEOUT_S": "0.5",
    "LEVERET_HEARTBEAT_S": "0.5",
    "LEVERET_SWEEP_S": "0.2",
    "LEVERET_RESEND_S": "0.5",
    "LEVERET_LEASE_S": "2",
    "LEVERET_DELETE_TIMEOUT_S": "3",
    "LEVERET_CHECK_CONFIRM_S": "1",
    "LEVERET_DRAIN_S": "2",
    "LEVERET_CORDON_AFTER_FAILURES": "1000",
}
#: So small that one VM more is felt.
SMALL = {"LEVERET_SIMULATE_VCPUS": "2"}
#: A host that everybody would like to be on, if it could define domains.
BAD = {
    "LEVERET_ZONE": "bad",
    "LEVERET_SIMULATE_VCPUS": "6400",
    "LEVERET_SIMULATE_MEMORY_MIB": "26214400",
    "LEVERET_SIMULATE_DISK_GIB": "409600",
    "LEVERET_SIMULATE_FAILURES": '{"define": 1.0}',
}

#: Which processes take the steps whose names begin so.
PROCESSES_OF = {
    "asking": "api",
    "api": "api",
    "requests": "conductor-1",
    "reports": "conductor-1",
    "heartbeats": "conductor-1",
    "sweeper": "conductor-1",
    "relay": "conductor-1",
    "vm": "hosts",
    "host": "hosts",
    "commands": "hosts",
}


class FaultyHouse:
    """One API, one conductor, and three hosts in processes of their own; `bad-host`, in zone `bad`, builds nothing."""

    def __init__(self, house: Installation, nursery: Nursery) -> None:
        self.house = house
        self.unattended: set[str] = set()
        self._nursery = nursery
        self._plans = house.layout.root / "plans"
        for name in house.services:
            plans = self._plans / ("hosts" if "host" in name else name)
            plans.mkdir(parents=True, exist_ok=True)
            service = house.services[name]
            house.services[name] = replace(
                service,
                env={
                    **service.env,
                    **QUICK,
                    "LEVERET_FAULTS": str(plans),
                    "LEVERET_HOST_NAME": name,  # so that it is known which process is which host
                },
            )

    # Faults.

    def plan(self, point: str, deed: Deed) -> None:
        """Have this go wrong, once, the next time that its process comes to the point."""
        file = self._plans / PROCESSES_OF[point.partition(".")[0]] / point
        pending = file.with_suffix(".new")
        pending.write_text(deed)
        pending.replace(file)

    def happened(self, point: str) -> bool:
        return not (self._plans / PROCESSES_OF[point.partition(".")[0]] / point).exists()

    def forget_plans(self) -> None:
        for file in self._plans.glob("*/*"):
            file.unlink(missing_ok=True)

    # Processes.

    def start(self, name: str) -> None:
        service = self.house.services[name]
        self._nursery.start(self.house.runner.daemon(name), service.argv, service.env)

    def restart(self, name: str) -> None:
        self.house.runner.daemon(name).kill()
        self.start(name)

    @asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        """Whatever ends meanwhile is started again at once."""
        task = asyncio.create_task(self._attend())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _attend(self) -> None:
        while True:
            for name in self.house.services.keys() - self.unattended:
                if not self.house.runner.daemon(name).is_running():
                    self.start(name)
            await asyncio.sleep(WATCH_S)

    async def until_ready(self) -> None:
        services = self.house.services.values()
        await eventually(
            lambda: all(service.check.passes() for service in services), within_s=30, what="every process of use"
        )

    # What came of it.

    async def settle(self, client: Leveret) -> None:
        """Wait until nothing is left to do; then every rule holds: of the rows, the log, the broker and the hosts."""
        await self.house.settle(within_s=40)
        assert broken_in(await checked(client)) == {}

    async def bury(self, letters: int) -> None:
        """Wait until so many messages lie in leveret.dead; there are none afterwards."""
        connection = await aio_pika.connect(self.house.rabbit.url)
        async with connection:
            channel = await connection.channel()

            async def there() -> bool:
                queue = await channel.declare_queue(topology.DEAD_QUEUE.name, passive=True)
                return queue.declaration_result.message_count == letters

            await eventually(there, within_s=20, what=f"{letters} dead letters")
            await (await channel.get_queue(topology.DEAD_QUEUE.name)).purge()


@contextmanager
def faulty_house() -> Iterator[FaultyHouse]:
    """The installation, up and armed with nothing yet."""
    nursery = Nursery()
    try:
        with installed(Options(conductors=1, fake_hosts=1, libvirt=False)) as house:
            like = house.services["fake-hosts"]
            house.services["fake-hosts"] = replace(like, env={**like.env, **SMALL})
            for name, more in (("other-host", SMALL), ("bad-host", BAD)):
                env = {**like.env, **more, "LEVERET_HOST_STATE_DIR": str(house.layout.root / name)}
                house.services[name] = replace(like, name=name, env=env)
            faulty = FaultyHouse(house, nursery)
            for name in house.services:
                faulty.restart(name)
            asyncio.run(faulty.until_ready())
            try:
                yield faulty
            finally:
                for name in ("other-host", "bad-host"):
                    house.runner.daemon(name).kill()
    finally:
        nursery.close()
