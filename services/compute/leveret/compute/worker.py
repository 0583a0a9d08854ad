"""One host of a compute process: its driver, agent, heart and queue, put together."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from aio_pika.abc import AbstractConnection

from leveret.compute.agent import Agent, Limits
from leveret.compute.commands import Commands, Reply
from leveret.compute.driver import Driver
from leveret.compute.heart import Heart, Registration
from leveret.compute.metrics import Metrics
from leveret.shared import topology
from leveret.shared.bus import Consumer, Link, Publisher
from leveret.shared.errors import LeveretError
from leveret.shared.messages import Heartbeat, HostReport

log = structlog.get_logger()


class Outbound:
    """The three ways to say something."""

    def __init__(
        self,
        publish: Callable[[HostReport], Awaitable[None]],
        post: Callable[[Heartbeat], Awaitable[None]],
        reply: Reply,
    ) -> None:
        self.publish = publish
        self.post = post
        self.reply = reply


class Worker:
    """The life of one host's worker: open, connect (again and again), close."""

    def __init__(
        self,
        registration: Registration,
        driver: Driver,
        outbound: Outbound,
        *,
        metrics: Metrics,
        limits: Limits,
        heartbeat_s: float,
        pool_check_s: float,
        report_slots: asyncio.Semaphore,
    ) -> None:
        self.queue = topology.host_queue(registration.host_id)
        self.driver = driver
        self.agent = Agent(
            driver,
            registration.host_id,
            registration.epoch,
            name=registration.name,
            publish=outbound.publish,
            metrics=metrics,
            limits=limits,
            report_slots=report_slots,
        )
        self._heart = Heart(
            registration,
            driver,
            self.agent,
            outbound.post,
            every_s=heartbeat_s,
            pool_every_s=pool_check_s,
            limit_s=limits.step_s,
        )
        self._limit_s = limits.step_s
        self._commands = Commands(self.agent, outbound.reply)
        self._consumer: Consumer | None = None

    def consume(self, link: Link, morgue: Publisher) -> None:
        """Take commands from this link, whenever it is up."""
        self._consumer = Consumer(link, self.queue, self._commands.handle, morgue, limit_s=self._limit_s)

    @property
    def is_ready(self) -> bool:
        return self._consumer is not None and self._consumer.is_consuming

    async def open(self) -> None:
        """Reach the hypervisor, or begin trying to; then take commands and beat."""
        await self.driver.open(self.agent.on_change)
        try:
            async with asyncio.timeout(self._limit_s):
                await self.agent.learn()  # so that the first heartbeat has the right digest
        except (LeveretError, TimeoutError) as error:
            log.warning("host.not_listed", host=self.agent.name, why=str(error) or "it hangs")
        if self._consumer is not None:
            self._consumer.start()
        self._heart.loop.start()

    def on_connected(self) -> None:
        """The bus is there, again: register, and say everything."""
        self._heart.loop.wake()
        self.agent.on_connected()

    async def close(self, drain_s: float) -> None:
        """Take no more commands, finish what is under way, report it, let go of the hypervisor."""
        if self._consumer is not None:
            await self._consumer.stop(drain_s)
        await self._heart.stop()
        await self.agent.close(drain_s)
        await self.driver.close()


class Announcement:
    """The last part on a link: says that everything before it is attached."""

    def __init__(self, workers: list[Worker]) -> None:
        self._workers = workers

    async def attach(self, _connection: AbstractConnection) -> None:
        for worker in self._workers:
            worker.on_connected()
        await asyncio.sleep(0)

    def detach(self) -> None:
        """Nothing to forget."""
