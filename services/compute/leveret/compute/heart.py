"""The heartbeat: that the host is alive, what may be placed on it, and one short fact about all its VMs."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from uuid import UUID

import structlog

from leveret.compute.agent import Agent
from leveret.compute.driver import Driver
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.fault_points import fault_point
from leveret.shared.loop import Loop
from leveret.shared.messages import Capacity, Heartbeat

log = structlog.get_logger()

#: A hypervisor that takes longer than this to say what it has is said to be away; the heart goes on.
ASK_TIMEOUT_S = 2.0
NOTHING = Capacity(vcpus=0, memory_mib=0, disk_gib=0)


@dataclass(frozen=True, slots=True)
class Share:
    """What of a host may be placed: (total - reserve) x ratio, for each resource."""

    reserve: Capacity = NOTHING
    vcpu_ratio: float = 4.0
    memory_ratio: float = 1.0
    disk_ratio: float = 1.0

    def of(self, total: Capacity) -> Capacity:
        def placeable(total: int, reserve: int, ratio: float) -> int:
            return max(0, math.floor((total - reserve) * ratio))

        return Capacity(
            vcpus=placeable(total.vcpus, self.reserve.vcpus, self.vcpu_ratio),
            memory_mib=placeable(total.memory_mib, self.reserve.memory_mib, self.memory_ratio),
            disk_gib=placeable(total.disk_gib, self.reserve.disk_gib, self.disk_ratio),
        )


@dataclass(frozen=True, slots=True)
class Registration:
    """What an operator says of a host."""

    host_id: UUID
    epoch: int
    name: str
    zone: str
    version: str
    labels: dict[str, str] = field(default_factory=dict)
    share: Share = Share()


class Heart:
    """Beats at once when woken (the bus is back), and every few seconds, whatever the hypervisor does."""

    def __init__(
        self,
        registration: Registration,
        driver: Driver,
        agent: Agent,
        post: Callable[[Heartbeat], Awaitable[None]],
        *,
        every_s: float,
        limit_s: float = 60.0,
    ) -> None:
        self._registration = registration
        self._driver = driver
        self._agent = agent
        self._post = post
        self._total = NOTHING
        self._asking: asyncio.Future[Capacity] | None = None
        self.loop = Loop(f"heart:{registration.name}", self.beat, every_s=every_s, limit_s=limit_s)

    async def stop(self) -> None:
        await self.loop.stop()
        if self._asking is not None:
            self._asking.cancel()

    @fault_point("host.beat")
    async def beat(self) -> None:
        """Send one heartbeat."""
        problem = await self._ask_capacity() or self._agent.problem
        who = self._registration
        await self._post(
            Heartbeat(
                host_id=who.host_id,
                epoch=who.epoch,
                name=who.name,
                zone=who.zone,
                labels=who.labels,
                virt_type=self._driver.virt_type,
                total=self._total,
                placeable=who.share.of(self._total),
                foreign=self._agent.foreign,
                digest=self._agent.digest(),
                newest_token=self._agent.newest_token,
                version=who.version,
                problem=problem,
            )
        )

    async def _ask_capacity(self) -> Problem | None:
        """Learn the capacity, or why it is not known at the moment; then the last known one stands.

        A question that hangs is left hanging, and not asked a second time: cancelling it might hang as well.
        """
        self._asking = self._asking or asyncio.ensure_future(self._driver.capacity())
        await asyncio.wait({self._asking}, timeout=ASK_TIMEOUT_S)
        if not self._asking.done():
            return self._placed(Problem.of(Code.HYPERVISOR_TIMEOUT, "The hypervisor does not say what it has."))
        asked, self._asking = self._asking, None
        try:
            self._total = asked.result()
        except LeveretError as error:
            return self._placed(error.problem)
        return None

    def _placed(self, problem: Problem) -> Problem:
        return problem.model_copy(update={"host": problem.host or self._registration.name})
