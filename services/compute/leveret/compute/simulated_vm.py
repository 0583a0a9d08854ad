"""What a simulated host has of one VM, and how it is written down."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from leveret.compute.driver import Journal, Power
from leveret.shared.errors import Problem
from leveret.shared.lifecycle import Wanted
from leveret.shared.messages import DesiredVm


@dataclass(slots=True)
class SimulatedVm:
    """All of one VM. `ready_at` is on the machine's monotonic clock, which outlives the process."""

    files: set[str] = field(default_factory=set)
    journal: Journal | None = None
    power: Power = Power.OFF
    why_off: Problem | None = None
    ready_at: float = 0.0

    def record(self) -> dict[str, Any]:
        journal = self.journal
        return {
            "files": sorted(self.files),
            "journal": journal
            and [
                str(journal.vm_id),
                journal.project,
                journal.name,
                journal.token,
                journal.generation,
                journal.wanted.value,
                journal.restarts,
                journal.boot_id,
            ],
            "power": self.power.value,
            "why_off": self.why_off and self.why_off.model_dump(mode="json"),
            "ready_at": self.ready_at,
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> "SimulatedVm":
        journal, why_off = record["journal"], record["why_off"]
        if journal:
            vm_id, project, name, token, generation, wanted, restarts, boot_id = journal
            journal = Journal(UUID(vm_id), project, name, token, generation, Wanted(wanted), restarts, boot_id)
        return cls(
            files=set(record["files"]),
            journal=journal or None,
            power=Power(record["power"]),
            why_off=Problem.model_validate(why_off) if why_off else None,
            ready_at=record["ready_at"],
        )


def journal_of(vm: DesiredVm, boot_id: str) -> Journal:
    return Journal(vm.vm_id, vm.project, vm.name, vm.token, vm.generation, vm.wanted, vm.restarts, boot_id)
