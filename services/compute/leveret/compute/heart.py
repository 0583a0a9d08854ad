"""The heartbeat: that the host is alive, what may be placed on it, and one short fact about all its VMs."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import structlog

from leveret.compute.agent import Agent
from leveret.compute.driver import Driver
from leveret.compute.question import Question
from leveret.shared.errors import Code, Problem
from leveret.shared.fault_points import fault_point
from leveret.shared.loop import Loop
from leveret.shared.messages import Capacity, Heartbeat

log = structlog.get_logger()

#: A hypervisor that takes longer than this to say what it has is said to be away; the heart goes on.
ASK_TIMEOUT_S = 2.0
#: To try the pool costs it a write, to list its images a look at each. So neither is done at every beat.
POOL_EVERY_S = 15.0
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
    """What an operator says of a host. `vms_max` is how many VMs it takes, whatever their size; None is any number."""

    host_id: UUID
    epoch: int
    name: str
    zone: str
    version: str
    labels: dict[str, str] = field(default_factory=dict)
    share: Share = Share()
    taints: dict[str, str] = field(default_factory=dict)
    vms_max: int | None = None


class Heart:
    """Beats at once when woken (the bus is back), and every few seconds, whatever the hypervisor and the pool do.

    What either does not say in time is said as it was last known, with the reason.
    """

    def __init__(
        self,
        registration: Registration,
        driver: Driver,
        agent: Agent,
        post: Callable[[Heartbeat], Awaitable[None]],
        *,
        every_s: float,
        pool_every_s: float = POOL_EVERY_S,
        limit_s: float = 60.0,
    ) -> None:
        self._registration = registration
        self._driver = driver
        self._agent = agent
        self._post = post
        self._capacity = Question[Capacity](driver.capacity, NOTHING)
        self._pool = Question[None](driver.check_pool, None, every_s=pool_every_s)
        self._images = Question[tuple[str, ...]](driver.cached_images, (), every_s=pool_every_s)
        self._questions: tuple[Question[Any], ...] = (self._capacity, self._pool, self._images)
        self.loop = Loop(f"heart:{registration.name}", self.beat, every_s=every_s, limit_s=limit_s)

    async def stop(self) -> None:
        await self.loop.stop()
        for question in self._questions:
            question.drop()

    @fault_point("host.beat")
    async def beat(self) -> None:
        """Send one heartbeat."""
        await self._ask()
        who, total = self._registration, self._capacity.known
        await self._post(
            Heartbeat(
                host_id=who.host_id,
                epoch=who.epoch,
                name=who.name,
                zone=who.zone,
                labels=who.labels,
                virt_type=self._driver.virt_type,
                total=total,
                placeable=who.share.of(total),
                taints=who.taints,
                vms_max=who.vms_max,
                images=self._images.known,
                foreign=self._agent.foreign,
                digest=self._agent.digest(),
                newest_token=self._agent.newest_token,
                version=who.version,
                problem=self._problem(),
            )
        )

    async def _ask(self) -> None:
        """Ask what it is time to ask, and wait a moment for the answers. Those that come late are for a later beat."""
        begun = {answer for question in self._questions if (answer := question.begin()) is not None}
        if begun:
            await asyncio.wait(begun, timeout=ASK_TIMEOUT_S)
        for question in self._questions:
            question.hear()

    def _problem(self) -> Problem | None:
        """Why the host should get no new VM; None when it may."""
        if self._capacity.hangs:
            problem: Problem | None = Problem.of(Code.HYPERVISOR_TIMEOUT, "The hypervisor does not say what it has.")
        else:
            problem = self._capacity.problem or self._pool.problem or self._agent.problem
        if problem is None or problem.host:
            return problem
        return problem.model_copy(update={"host": self._registration.name})
