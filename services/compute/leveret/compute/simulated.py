"""The simulated hypervisor: the driver's whole contract without a guest, thousands of hosts to a process.

It keeps what a real one keeps (files, domains, journals, why one is off), takes the time it is told to take, fails as
often as it is told to, before or after the deed, and can lose a guest or a whole host. An idle VM costs no task.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from uuid import UUID

from leveret.compute.behaviour import FAILURES, READING, Behaviour, Seconds
from leveret.compute.driver import CACHED_MAX, LEFTOVERS_MAX, Domain, Inventory, OnChange, Power
from leveret.compute.ledger import Ledger
from leveret.compute.simulated_vm import SimulatedVm, journal_of
from leveret.shared.errors import Code, Problem, fail
from leveret.shared.lifecycle import Wanted
from leveret.shared.messages import Capacity, DesiredVm

#: The ledger's key for how often the host was booted.
BOOTS = "boots"


class SimulatedDriver:
    """One simulated host. With a ledger it finds its domains again after its worker was killed."""

    virt_type = "simulated"

    def __init__(
        self,
        host_id: UUID,
        behaviour: Behaviour | None = None,
        *,
        ledger: Ledger | None = None,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.behaviour = behaviour or Behaviour()
        self.available = True
        self.hanging_images: set[str] = set()
        self._host = str(host_id)
        self._ledger = ledger
        self._random = random.Random(seed)
        self._clock = clock
        self._foreign: set[UUID] = set()
        self._leftovers: set[str] = set()
        self._boots = 1
        #: Used longest ago first. Who restarts the worker finds it empty, as if images had been collected.
        self._images: dict[str, None] = {}
        self._machines: dict[UUID, SimulatedVm] = {}
        self._on_change: OnChange = lambda _vm_id: None
        for key, record in ledger.of(self._host).items() if ledger else ():
            if key == BOOTS:
                self._boots = record["boots"]
            else:
                self._machines[UUID(key)] = SimulatedVm.of(record)

    @property
    def boot_id(self) -> str:
        return f"{self._host}/{self._boots}"

    async def open(self, on_change: OnChange) -> None:
        self._on_change = on_change

    async def close(self) -> None:
        self._on_change = lambda _vm_id: None

    async def capacity(self) -> Capacity:
        await self._act("capacity")
        return self.behaviour.total

    async def check_pool(self) -> None:
        await self._act("check_pool")

    async def cached_images(self) -> tuple[str, ...]:
        await self._act("cached_images")
        return tuple(islice(reversed(self._images), CACHED_MAX))

    async def inventory(self) -> Inventory:
        await self._act("inventory")
        domains = (self._domain(machine) for machine in self._machines.values())
        return Inventory(tuple(domain for domain in domains if domain is not None), tuple(self._foreign))

    async def find(self, vm_id: UUID) -> Domain | None:
        await self._act("find")
        machine = self._machines.get(vm_id)
        return None if machine is None else self._domain(machine)

    # The steps of a build.

    async def fetch_image(self, vm: DesiredVm) -> None:
        failing = await self._act("fetch_image")
        if vm.image.sha256 in self.hanging_images:
            await asyncio.Event().wait()
        self._images.pop(vm.image.sha256, None)
        self._images[vm.image.sha256] = None
        self._fail(failing)

    async def make_disk(self, vm: DesiredVm) -> None:
        failing = await self._act("make_disk")
        if vm.image.sha256 not in self._images:
            raise fail(Code.DISK_FAILED, "The base image is not in the cache.")
        self._add_file(vm.vm_id, "disk")
        self._fail(failing)

    async def make_config_drive(self, vm: DesiredVm) -> None:
        failing = await self._act("make_config_drive")
        self._add_file(vm.vm_id, "config_drive")
        self._fail(failing)

    async def define(self, vm: DesiredVm) -> None:
        failing = await self._act("define")
        if vm.vm_id in self._foreign:
            raise fail(Code.DEFINE_FAILED, f"There is a domain {vm.vm_id} that is not Leveret's.")
        machine = self._machines.get(vm.vm_id)
        if machine is None or machine.files != {"disk", "config_drive"}:
            raise fail(Code.DEFINE_FAILED, "The domain's files are not there.")
        if machine.journal is None:
            machine.journal = replace(journal_of(vm, self.boot_id), generation=0)
            self._write(vm.vm_id, machine)
        self._fail(failing)

    async def start(self, vm: DesiredVm) -> None:
        failing = await self._act("start")
        self._run(vm.vm_id, self._defined(vm.vm_id, Code.START_FAILED))
        self._fail(failing)

    # The rest of a life.

    async def stop(self, vm_id: UUID, grace_s: float) -> None:
        failing = await self._act("stop")
        machine = self._defined(vm_id, Code.STOP_FAILED)
        if machine.power is Power.RUNNING:
            await _pause(min(grace_s, self._draw(self.behaviour.shutdown_s)))
            self._switch_off(vm_id, machine, None)
        self._fail(failing)

    async def reset(self, vm_id: UUID) -> None:
        failing = await self._act("reset")
        machine = self._defined(vm_id, Code.START_FAILED)
        machine.power = Power.OFF
        self._run(vm_id, machine)
        self._fail(failing)

    async def mark(self, vm: DesiredVm) -> None:
        failing = await self._act("mark")
        machine = self._defined(vm.vm_id, Code.DEFINE_FAILED)
        machine.journal = journal_of(vm, self.boot_id)
        self._write(vm.vm_id, machine)
        self._fail(failing)

    async def remove(self, vm_id: UUID) -> None:
        failing = await self._act("remove")
        if vm_id in self._foreign:
            raise fail(Code.DELETE_FAILED, f"The domain {vm_id} is not Leveret's; it is left alone.")
        if self._machines.pop(vm_id, None) is not None and self._ledger is not None:
            self._ledger.put(self._host, str(vm_id), None)
        self._fail(failing)

    async def console_tail(self, vm_id: UUID, max_bytes: int) -> bytes:
        await self._act("console_tail")
        machine = self._machines.get(vm_id)
        if machine is None or machine.journal is None or not machine.ready_at:
            return b""
        return f"simulated guest {machine.journal.name} is up\r\n".encode()[-max_bytes:]

    async def guest_ready(self, vm_id: UUID) -> bool:
        await self._act("guest_ready")
        machine = self._machines.get(vm_id)
        return machine is not None and machine.power is Power.RUNNING and self._clock() >= machine.ready_at

    async def files(self) -> frozenset[UUID]:
        await self._act("files")
        return frozenset(vm_id for vm_id, machine in self._machines.items() if machine.files)

    async def leftovers(self) -> tuple[str, ...]:
        await self._act("files")
        return tuple(sorted(self._leftovers)[:LEFTOVERS_MAX])

    # What only a simulation can do on demand.

    def crash(self, vm_id: UUID) -> None:
        """The guest's QEMU dies."""
        self._lose(vm_id, Problem.of(Code.GUEST_CRASHED, "The guest crashed."))

    def shut_down(self, vm_id: UUID) -> None:
        """The guest switches itself off."""
        self._lose(vm_id, Problem.of(Code.GUEST_SHUTDOWN, "The guest switched itself off."))

    def undefine(self, vm_id: UUID) -> None:
        """Somebody removes the domain behind Leveret's back; the files stay."""
        machine = self._machines[vm_id]
        machine.journal, machine.power = None, Power.OFF
        self._write(vm_id, machine)
        self._on_change(vm_id)

    def reboot(self) -> None:
        """The whole host goes down and comes back: nothing runs any more."""
        self._boots += 1
        if self._ledger is not None:
            self._ledger.put(self._host, BOOTS, {"boots": self._boots})
        for vm_id, machine in self._machines.items():
            machine.power, machine.why_off = Power.OFF, None
            self._write(vm_id, machine)
        self._on_change(None)

    def go_away(self) -> None:
        """The hypervisor stops answering; guests go on."""
        self.available = False
        self._on_change(None)

    def come_back(self) -> None:
        self.available = True
        self._on_change(None)

    def add_foreign(self, vm_id: UUID) -> None:
        """A domain that is not Leveret's."""
        self._foreign.add(vm_id)

    def litter(self, name: str) -> None:
        """Somebody puts a file into the pool."""
        self._leftovers.add(name)

    # How it is done.

    async def _act(self, verb: str) -> str | None:
        """Take the verb's time, and its chance to fail: before the deed, or (the verb is returned) after it."""
        latency = self.behaviour.latency_s.get(verb)
        if latency:
            await _pause(self._draw(latency))
        if not self.available:
            raise fail(Code.HYPERVISOR_UNAVAILABLE, "The simulated hypervisor is away.")
        chance = self.behaviour.failures.get(verb)
        if not chance or self._random.random() >= chance:
            return None
        if verb in READING or self._random.random() >= self.behaviour.failures_after:
            self._fail(verb)
        return verb

    def _fail(self, verb: str | None) -> None:
        if verb is not None:
            raise fail(FAILURES.get(verb, Code.HYPERVISOR_TIMEOUT), f"Simulated failure of {verb}.")

    def _draw(self, seconds: Seconds) -> float:
        return self._random.uniform(*seconds) if isinstance(seconds, tuple) else seconds

    def _domain(self, machine: SimulatedVm) -> Domain | None:
        journal = machine.journal
        if journal is None:
            return None
        why_off = machine.why_off
        if machine.power is Power.OFF and journal.wanted is Wanted.RUNNING and journal.boot_id != self.boot_id:
            why_off = Problem.of(Code.HOST_REBOOTED, "The host was rebooted.") if journal.generation else None
        return Domain(journal, machine.power, why_off, ssh=None)

    def _defined(self, vm_id: UUID, code: Code) -> SimulatedVm:
        machine = self._machines.get(vm_id)
        if machine is None or machine.journal is None:
            raise fail(code, f"There is no domain {vm_id}.")
        return machine

    def _run(self, vm_id: UUID, machine: SimulatedVm) -> None:
        if machine.power is Power.RUNNING:
            return
        machine.power, machine.why_off = Power.RUNNING, None
        machine.ready_at = self._clock() + self._draw(self.behaviour.ready_s)
        self._write(vm_id, machine)

    def _switch_off(self, vm_id: UUID, machine: SimulatedVm, why: Problem | None) -> None:
        machine.power, machine.why_off = Power.OFF, why
        self._write(vm_id, machine)

    def _lose(self, vm_id: UUID, why: Problem) -> None:
        self._switch_off(vm_id, self._machines[vm_id], why)
        self._on_change(vm_id)

    def _add_file(self, vm_id: UUID, name: str) -> None:
        machine = self._machines.setdefault(vm_id, SimulatedVm())
        if name not in machine.files:
            machine.files.add(name)
            self._write(vm_id, machine)

    def _write(self, vm_id: UUID, machine: SimulatedVm) -> None:
        if self._ledger is not None:
            self._ledger.put(self._host, str(vm_id), machine.record())


async def _pause(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)
