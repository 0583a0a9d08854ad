"""The contract between a host's agent and its hypervisor.

Two drivers honour it, `LibvirtDriver` and `SimulatedDriver`, and one conformance suite holds both to it. Every verb is
idempotent: run twice, or killed half-way and run again, it ends in the same place. Every verb raises LeveretError with
a code from the closed list when it cannot be done, and nothing else.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from leveret.shared.documents import Endpoint
from leveret.shared.errors import Problem
from leveret.shared.lifecycle import BUILD_STEPS, Step, Wanted
from leveret.shared.messages import Capacity, DesiredVm


@dataclass(frozen=True, slots=True)
class Journal:
    """What a domain itself remembers (libvirt keeps it in `<metadata>`): the worker has no other memory.

    `generation` is the last one that was made true; 0 from `define` until the first `mark`. `boot_id` is the
    kernel's, at the time of the mark: another one now means that the host was rebooted since.
    """

    vm_id: UUID
    project: str
    name: str
    token: int
    generation: int
    wanted: Wanted
    restarts: int
    boot_id: str


class Power(StrEnum):
    RUNNING = "running"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Domain:
    """What the hypervisor has of one VM. `why_off` says why it is off when that was not asked for."""

    journal: Journal
    power: Power
    why_off: Problem | None = None
    ssh: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything the hypervisor has. `strangers` are the domains that are not Leveret's: they are never touched."""

    domains: tuple[Domain, ...]
    strangers: tuple[UUID, ...] = ()

    @property
    def foreign(self) -> int:
        return len(self.strangers)


LEFTOVERS_MAX = 100
CACHED_MAX = 64

#: Called from the event loop when a VM may have changed; with None when any may have (after a reconnection).
OnChange = Callable[[UUID | None], None]


class Driver(Protocol):
    """One host's hypervisor."""

    @property
    def virt_type(self) -> str:
        """`kvm`, `qemu` or `simulated`."""

    @property
    def boot_id(self) -> str: ...

    async def open(self, on_change: OnChange) -> None:
        """Connect, register for events, ensure the network and the pool. May be called while libvirtd is down: the
        driver then keeps trying, and its verbs raise `hypervisor_unavailable` meanwhile."""

    async def close(self) -> None:
        """Disconnect. Guests go on."""

    async def capacity(self) -> Capacity:
        """What the machine has in all: CPUs, memory, and the size of the pool's file system."""

    async def check_pool(self) -> None:
        """Files of new VMs can be made: the pool takes a file in good time, gives it back, and has room beside the
        reserve. Raises `disk_full` or `disk_failed` when that is not so."""

    async def cached_images(self) -> tuple[str, ...]:
        """The sha256 of the images in the host's cache, those used last first; at most CACHED_MAX of them."""

    async def inventory(self) -> Inventory: ...

    async def find(self, vm_id: UUID) -> Domain | None: ...

    # The steps of a build, in order. Each may be the first that runs after a crash.

    async def fetch_image(self, vm: DesiredVm) -> None:
        """The base image is in the host's cache, checked, or the reason why not is raised."""

    async def make_disk(self, vm: DesiredVm) -> None:
        """The overlay exists, whole, at `disk_gib`. An existing one is kept: it may hold a guest's data."""

    async def make_config_drive(self, vm: DesiredVm) -> None: ...

    async def define(self, vm: DesiredVm) -> None:
        """The domain exists, with a journal of generation 0."""

    async def start(self, vm: DesiredVm) -> None:
        """The domain runs."""

    # The rest of a life. Of a VM that is not there: `start` and `reset` raise `start_failed`, `stop` raises
    # `stop_failed`, `mark` raises `define_failed`.

    async def stop(self, vm_id: UUID, grace_s: float) -> None:
        """Ask the guest to shut down, wait up to `grace_s`, then switch it off; 0 switches it off at once."""

    async def reset(self, vm_id: UUID) -> None:
        """Hard reboot; starts a domain that is off."""

    async def mark(self, vm: DesiredVm) -> None:
        """Write the journal: `vm.generation` has been made true."""

    async def remove(self, vm_id: UUID) -> None:
        """Leave neither domain nor file, lease or port of this VM. Nothing there is success."""

    async def console_tail(self, vm_id: UUID, max_bytes: int) -> bytes:
        """The end of the guest's serial console; empty when there is none yet."""

    async def guest_ready(self, vm_id: UUID) -> bool:
        """Whether the guest has announced on its console, since it was started, that it is up."""

    async def files(self) -> frozenset[UUID]:
        """The VMs of which there are files in the pool, with or without a domain."""

    async def leftovers(self) -> tuple[str, ...]:
        """What else lies in the pool and belongs to nothing, by name; at most LEFTOVERS_MAX of it."""


#: The verb behind each step of a build.
StepVerb = Callable[[DesiredVm], Awaitable[None]]


def build_verbs(driver: Driver) -> dict[Step, StepVerb]:
    """The steps of a build, in order, with the verbs that make them."""
    verbs = (driver.fetch_image, driver.make_disk, driver.make_config_drive, driver.define, driver.start)
    return dict(zip(BUILD_STEPS, verbs, strict=True))
