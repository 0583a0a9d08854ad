"""The agent of one host: hears what is wanted, has it done, says what is.

It knows no broker and no database: commands come in as calls, reports go out through a function.
"""

import asyncio
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

import structlog

from leveret.compute.driver import Driver, Inventory, Power
from leveret.compute.gates import FetchGate
from leveret.compute.host import Host
from leveret.compute.keeper import Answer, Keeper
from leveret.compute.metrics import Metrics
from leveret.compute.readiness import Readiness
from leveret.compute.reporter import Publish, Reporter
from leveret.compute.status import Status
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.fault_points import fault_point
from leveret.shared.lifecycle import Observed, Wanted
from leveret.shared.messages import ConsoleTail, DesiredVm, HostInventory, ReadConsole, SeenDomain, digest_of

log = structlog.get_logger()

RELIST_PAUSE_MIN_S = 0.5
RELIST_PAUSE_MAX_S = 8.0
CONSOLE_MAX_BYTES = 256 * 1024
#: Domains, and VMs with files, in one inventory: about a megabyte.
INVENTORY_MAX = 8000


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once. `graves` is how many removed VMs are remembered, so that a late command cannot revive them.

    `step_s` is the time after which a step is taken to hang, `image_s` that of fetching an image.
    """

    builds: int = 8
    fetches: int = 32
    consoles: int = 4
    graves: int = 1000
    step_s: float = 60.0
    image_s: float = 900.0


class Agent:
    """Everything that one host's worker does, apart from the bus and the heartbeat."""

    def __init__(
        self,
        driver: Driver,
        host_id: UUID,
        epoch: int,
        *,
        name: str,
        publish: Publish,
        metrics: Metrics,
        limits: Limits | None = None,
        report_slots: asyncio.Semaphore | None = None,
    ) -> None:
        limits = limits or Limits()
        self.name = name
        self.host_id = host_id
        self.epoch = epoch
        self.foreign = 0
        #: Of all placements that were heard of or seen here.
        self.newest_token = 0
        #: Why the hypervisor's inventory could not be had; None when it could.
        self.problem: Problem | None = None
        self._driver = driver
        self._metrics = metrics
        self._keepers: dict[UUID, Keeper] = {}
        self._graves: OrderedDict[UUID, Status] = OrderedDict()
        self._graves_max = limits.graves
        self._forgotten_token = 0
        self._consoles = asyncio.Semaphore(limits.consoles)
        self._inventories = asyncio.Semaphore(1)
        self._changes = 0
        self._digest: str | None = None
        self._relist_due = False
        self._relisting: asyncio.Task[None] | None = None
        self._relist_hurry = asyncio.Event()
        self._readiness = Readiness(driver.guest_ready, self._on_ready)
        self.reporter = Reporter(
            host_id,
            epoch,
            publish,
            status_of=self._status_of,
            present=self._present,
            slots=report_slots,
            limit_s=limits.step_s,
        )
        self._host = Host(
            name=name,
            driver=driver,
            builds=asyncio.Semaphore(limits.builds),
            fetches=FetchGate(limits.fetches),
            readiness=self._readiness,
            metrics=metrics,
            changed=self._on_status,
            gone=self._on_gone,
            step_limit_s=limits.step_s,
            image_limit_s=limits.image_s,
        )

    # What comes in. None of these wait for the hypervisor, but for the console.

    def on_command(self, vm: DesiredVm) -> None:
        """Make this true, unless it is older than what is known. Killed at any point, it may be told again."""
        if vm.host_epoch != self.epoch:
            self._metrics.commands.labels("other_epoch").inc()
            return
        self.newest_token = max(self.newest_token, vm.token)
        if vm.vm_id not in self._keepers and self._is_late(vm):
            self.reporter.add(vm.vm_id, urgent=True)
            self._metrics.commands.labels("late").inc()
            return
        answer = self._keeper(vm.vm_id).accept(vm)
        self._metrics.commands.labels(answer.value).inc()
        if answer is Answer.STALE:
            log.info("command.stale", vm_id=str(vm.vm_id), token=vm.token, generation=vm.generation)

    def _is_late(self, vm: DesiredVm) -> bool:
        """Whether the VM was removed from here under this token or a newer one, so that it must not come back.

        Of graves that were forgotten the highest token is remembered: a build that may be older is refused, and gets
        a new token from the conductor.
        """
        if vm.wanted is Wanted.ABSENT:
            return False
        grave = self._graves.get(vm.vm_id)
        if grave is not None and vm.token <= grave.token:
            grave.generation = max(grave.generation, vm.generation)
            return True
        if not vm.may_build or vm.token > self._forgotten_token:
            return False
        refusal = Problem.of(Code.BUILD_FAILED, "The command came too late to be sure of it.", host=self.name)
        self._dig(Status(vm.vm_id, vm.token, vm.generation, Observed.ABSENT, settled=True, problem=refusal))
        return True

    def on_list(self) -> None:
        """Report everything the host has, complete, as soon as the hypervisor has been asked."""
        self._relist_due = True
        self._relist_hurry.set()
        if self._relisting is None and not self._host.closing:
            self._relisting = asyncio.create_task(self._relist(), name=f"relist:{self.name}")

    def on_connected(self) -> None:
        """The bus is back: whatever was said meanwhile may be lost."""
        self.reporter.poke()
        self.on_list()

    def on_change(self, vm_id: UUID | None) -> None:
        """The hypervisor may have changed this VM, or (None) any."""
        if vm_id is None:
            for keeper in self._keepers.values():
                keeper.hurry()
            self.on_list()
            return
        if vm_id in self._graves and vm_id not in self._keepers:
            return  # the echo of its removal
        self._keeper(vm_id).look()

    async def on_console(self, ask: ReadConsole) -> ConsoleTail:
        """The end of a guest's console, or why it cannot be read."""
        max_bytes = max(1, min(ask.max_bytes, CONSOLE_MAX_BYTES))
        try:
            async with self._consoles:
                tail = await self._driver.console_tail(ask.vm_id, max_bytes + 1)
        except LeveretError as error:
            return ConsoleTail(vm_id=ask.vm_id, problem=error.problem)
        text = tail[-max_bytes:].decode(errors="replace")
        return ConsoleTail(vm_id=ask.vm_id, text=text, truncated=len(tail) > max_bytes)

    async def on_inventory(self) -> HostInventory:
        """Everything the hypervisor and the pool have, or why that cannot be had; for comparing only."""
        try:
            async with self._inventories:
                inventory = await self._driver.inventory()
                files, leftovers = await self._driver.files(), await self._driver.leftovers()
        except LeveretError as error:
            return HostInventory(host_id=self.host_id, epoch=self.epoch, problem=error.problem)
        domains = tuple(
            SeenDomain(
                vm_id=domain.journal.vm_id,
                token=domain.journal.token,
                generation=domain.journal.generation,
                running=domain.power is Power.RUNNING,
            )
            for domain in inventory.domains
        )
        return HostInventory(
            host_id=self.host_id,
            epoch=self.epoch,
            domains=domains[:INVENTORY_MAX],
            foreign=inventory.strangers[:INVENTORY_MAX],
            files=tuple(files)[:INVENTORY_MAX],
            leftovers=leftovers,
            cut=max(len(domains), len(inventory.strangers), len(files)) > INVENTORY_MAX,
        )

    # What is known.

    @property
    def busy(self) -> bool:
        """Whether anything is under way, beside what there is to report."""
        return self._relisting is not None or any(keeper.busy for keeper in self._keepers.values())

    def digest(self) -> str:
        """One short fact about all settled VMs; made anew only when one of them has changed."""
        if self._digest is None:
            self._digest = digest_of(
                [(s.vm_id, s.token, s.generation, s.observed.value) for s in self._present() if s.settled]
            )
        return self._digest

    def census(self) -> Counter[str]:
        """How many VMs there are, by what was last seen of them. May be called from another thread."""
        return Counter(keeper.status.observed.value for keeper in list(self._keepers.values()))

    @fault_point("host.list")
    async def learn(self) -> None:
        """Ask the hypervisor for everything, and take in what was not known.

        Whatever changed while the hypervisor was being asked is known better than from its answer.
        """
        asked_at = self._changes
        try:
            inventory = await self._driver.inventory()
        except LeveretError as error:
            self.problem = error.problem.model_copy(update={"host": self.name})
            raise
        self.problem, self.foreign = None, inventory.foreign
        self._take_in(inventory, asked_at)

    def _take_in(self, inventory: Inventory, asked_at: int) -> None:
        listed = set()
        for domain in inventory.domains:
            vm_id = domain.journal.vm_id
            listed.add(vm_id)
            self.newest_token = max(self.newest_token, domain.journal.token)
            grave = self._graves.get(vm_id)
            if vm_id not in self._keepers and grave is not None and grave.changed > asked_at:
                continue
            keeper = self._keeper(vm_id)
            if not keeper.busy and keeper.status.changed <= asked_at:
                keeper.adopt(domain)
        for vm_id, keeper in self._keepers.items():
            if vm_id not in listed and not keeper.busy and keeper.status.present and keeper.status.changed <= asked_at:
                keeper.look()
        self._digest = None

    async def close(self, drain_s: float) -> None:
        """Finish the steps under way and tell what is left to tell, within `drain_s`. Guests go on."""
        self._host.closing = True
        until = asyncio.get_running_loop().time() + drain_s
        self._readiness.stop()
        if self._relisting is not None:
            self._relisting.cancel()
        for keeper in self._keepers.values():
            keeper.hurry()
        tasks = [keeper.task for keeper in self._keepers.values() if keeper.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=drain_s)
        await self.reporter.drain(max(0.0, until - asyncio.get_running_loop().time()))
        await self.kill()

    async def kill(self) -> None:
        """Stop everything where it stands: every step is safe to kill."""
        self._host.closing = True
        self._readiness.stop()
        tasks = [keeper.task for keeper in self._keepers.values() if keeper.task is not None]
        tasks += [self._relisting] if self._relisting is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.reporter.stop()

    def _keeper(self, vm_id: UUID) -> Keeper:
        keeper = self._keepers.get(vm_id)
        if keeper is None:
            keeper = self._keepers[vm_id] = Keeper(self._host, vm_id)
        return keeper

    # What keepers say.

    def _on_status(self, status: Status, urgent: bool) -> None:
        self._changes += 1
        status.changed = self._changes
        self._digest = None
        self.reporter.add(status.vm_id, urgent=urgent)

    def _on_gone(self, vm_id: UUID) -> None:
        status = self._keepers.pop(vm_id).status
        self._readiness.forget(vm_id)
        if not status.token:
            return  # there never was anything
        earlier = self._graves.get(vm_id)
        if earlier is not None and earlier.token == status.token:
            status.generation = max(status.generation, earlier.generation)
        self._dig(status)

    def _dig(self, status: Status) -> None:
        self._graves.pop(status.vm_id, None)
        self._graves[status.vm_id] = status
        if len(self._graves) > self._graves_max:
            forgotten = self._graves.popitem(last=False)[1]
            self._forgotten_token = max(self._forgotten_token, forgotten.token)

    def _on_ready(self, vm_id: UUID) -> None:
        keeper = self._keepers.get(vm_id)
        if keeper is not None:
            keeper.ready()

    def _status_of(self, vm_id: UUID) -> Status | None:
        keeper = self._keepers.get(vm_id)
        return keeper.status if keeper is not None else self._graves.get(vm_id)

    def _present(self) -> list[Status]:
        return [keeper.status for keeper in self._keepers.values() if keeper.status.present and keeper.status.token]

    async def _relist(self) -> None:
        pause_s = RELIST_PAUSE_MIN_S
        try:
            while self._relist_due and not self._host.closing:
                self._relist_due = False
                self._relist_hurry.clear()
                try:
                    async with asyncio.timeout(self._host.step_limit_s):
                        await self.learn()
                    self.reporter.add_complete()
                except Exception as error:  # the rim: whatever went wrong, what is due stays due
                    known = isinstance(error, LeveretError | TimeoutError)
                    log.warning("host.not_listed", host=self.name, why=str(error) or "it hangs", exc_info=not known)
                    self._relist_due = True
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._relist_hurry.wait(), pause_s)
                    pause_s = min(pause_s * 2, RELIST_PAUSE_MAX_S)
        finally:
            self._relisting = None
