"""What all keepers of one host share."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from leveret.compute.driver import Driver, StepVerb, build_verbs
from leveret.compute.gates import FetchGate
from leveret.compute.metrics import Metrics
from leveret.compute.readiness import Readiness
from leveret.compute.status import Status
from leveret.shared.lifecycle import Step


@dataclass(slots=True)
class Host:
    """`changed(status, urgent)` is called with every change worth a report, `gone` when nothing is left of a VM.

    `builds` bounds the builds that make disks and domains at once. A step that takes longer than `step_limit_s`
    is taken to hang, the fetching of an image after `image_limit_s`. When `closing` is set, keepers finish the step
    they are in and take no other.
    """

    name: str
    driver: Driver
    builds: asyncio.Semaphore
    fetches: FetchGate
    readiness: Readiness
    metrics: Metrics
    changed: Callable[[Status, bool], None]
    gone: Callable[[UUID], None]
    step_limit_s: float = 60.0
    image_limit_s: float = 900.0
    closing: bool = False
    verbs: dict[Step, StepVerb] = field(init=False)
    limits_s: dict[Step, float] = field(init=False)

    def __post_init__(self) -> None:
        driver = self.driver
        self.verbs = {
            **build_verbs(driver),
            Step.STOP: lambda vm: driver.stop(vm.vm_id, vm.grace_s),
            Step.REBOOT: lambda vm: driver.reset(vm.vm_id),
            Step.REMOVE: lambda vm: driver.remove(vm.vm_id),
            Step.CLEANUP: lambda vm: driver.remove(vm.vm_id),
        }
        self.limits_s = dict.fromkeys(self.verbs, self.step_limit_s) | {Step.IMAGE: self.image_limit_s}
