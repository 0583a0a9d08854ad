"""An agent over simulated hypervisors, without a broker; and a loop on which waiting takes no time."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from leveret.compute.agent import Agent, Limits
from leveret.compute.behaviour import Behaviour
from leveret.compute.driver import Domain
from leveret.compute.ledger import Ledger
from leveret.compute.metrics import Metrics
from leveret.compute.simulated import SimulatedDriver
from leveret.shared.errors import Code, fail
from leveret.shared.lifecycle import Wanted
from leveret.shared.messages import DesiredVm, HostReport, Image, VmReport

T = TypeVar("T")

HOST_ID = UUID(int=1)
VM_ID = UUID(int=7)


class LeapingLoop(asyncio.SelectorEventLoop):
    """Time passes at once: when nothing is left to do before a timer, it is that timer's time.

    Threads and sockets have no part in it: it is for what waits on nothing but clocks and other tasks.
    """

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self._leapt_s = 0.0

    def time(self) -> float:
        return super().time() + self._leapt_s

    @property
    def timers(self) -> int:
        """How many timers are waiting."""
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return sum(not timer.cancelled() for timer in scheduled)

    def _run_once(self) -> None:
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        if not self._ready:  # type: ignore[attr-defined]
            coming = min((timer.when() for timer in scheduled if not timer.cancelled()), default=0.0)
            self._leapt_s += max(0.0, coming - self.time())
        super()._run_once()  # type: ignore[misc]


def leaping(main: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that is run on a leaping loop."""
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        return runner.run(main)


def wish(
    wanted: Wanted = Wanted.RUNNING,
    *,
    vm_id: UUID = VM_ID,
    epoch: int = 1,
    token: int = 5,
    generation: int = 1,
    may_build: bool = True,
    restarts: int = 0,
    grace_s: int = 60,
    deadline_s: float = 60,
    sha256: str = "0" * 64,
) -> DesiredVm:
    return DesiredVm(
        vm_id=vm_id,
        host_epoch=epoch,
        project="default",
        name=f"vm-{vm_id.int}",
        generation=generation,
        token=token,
        wanted=wanted,
        may_build=may_build,
        restarts=restarts,
        grace_s=grace_s,
        vcpus=1,
        memory_mib=64,
        disk_gib=1,
        image=Image(url="file:///images/tiny.qcow2", sha256=sha256, format="qcow2"),
        nic=None,
        deadline_s=deadline_s,
    )


class AgentWorld:
    """One simulated host with its agent. What it reports is kept, unless the broker is `away`."""

    def __init__(
        self,
        *,
        behaviour: Behaviour | None = None,
        ledger: Path | None = None,
        epoch: int = 1,
        seed: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.heard: list[HostReport] = []
        self.away = False
        self.driver = SimulatedDriver(
            HOST_ID,
            behaviour,
            ledger=Ledger(ledger) if ledger else None,
            seed=seed,
            clock=asyncio.get_running_loop().time,
        )
        self.metrics = Metrics()
        self.epoch = epoch
        self._limits = limits
        self.agent = self._new_agent()

    def _new_agent(self) -> Agent:
        return Agent(
            self.driver,
            HOST_ID,
            self.epoch,
            name="h1",
            publish=self._publish,
            metrics=self.metrics,
            limits=self._limits,
        )

    async def _publish(self, report: HostReport) -> None:
        await asyncio.sleep(0)
        if self.away:
            raise fail(Code.UNAVAILABLE, "The broker is away.")
        self.heard.append(report)

    async def open(self) -> None:
        await self.driver.open(self.agent.on_change)

    def renew(self) -> None:
        """Another agent in the same epoch: it takes the driver as it is now."""
        self.agent = self._new_agent()

    async def restart(self) -> None:
        """The worker is killed where it stands; another finds the same hypervisor, in the next epoch."""
        await self.agent.kill()
        self.epoch += 1
        self.agent = self._new_agent()
        await self.open()

    def tell(self, *wishes: DesiredVm) -> None:
        for one in wishes:
            self.agent.on_command(one)

    async def idle(self, within_s: float = 600.0) -> None:
        """Wait until nothing is under way and everything has been told."""
        await self.until(
            lambda: not (self.agent.busy or self.agent.reporter.pending or self.agent.reporter.sending), within_s
        )

    async def until(self, check: Callable[[], object], within_s: float = 600.0) -> None:
        """Wait until this is true; fail when it is not in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while not check():
            assert loop.time() < deadline, "never became true"
            await asyncio.sleep(0.005)

    def last(self, vm_id: UUID = VM_ID) -> VmReport:
        """What was said last of a VM."""
        said = ((r.epoch, vm.seq, vm) for r in self.heard for vm in r.vms if vm.vm_id == vm_id)
        return max(said, key=lambda one: one[:2])[2]

    def said(self, vm_id: UUID = VM_ID) -> list[VmReport]:
        return [vm for report in self.heard for vm in report.vms if vm.vm_id == vm_id]

    async def domain(self, vm_id: UUID = VM_ID) -> Domain | None:
        return await self.driver.find(vm_id)
