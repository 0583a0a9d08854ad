"""What this worker knows of one VM: everything a report says, and nothing else."""

from dataclasses import dataclass, field
from uuid import UUID

from leveret.compute.convergence import observe, why_off
from leveret.compute.driver import Domain, Power
from leveret.shared.documents import Endpoint, StepTime
from leveret.shared.errors import Problem
from leveret.shared.lifecycle import Observed, Step
from leveret.shared.messages import VmReport


@dataclass(slots=True)
class Status:
    """`changed` is the agent's count of changes when this one was last told: it orders knowledge within a worker."""

    vm_id: UUID
    token: int = 0
    generation: int = 0
    observed: Observed = Observed.BUILDING
    settled: bool = False
    step: Step | None = None
    guest_ready: bool = False
    ssh: Endpoint | None = None
    problem: Problem | None = None
    changed: int = 0
    took_s: dict[Step, float] = field(default_factory=dict)

    @property
    def present(self) -> bool:
        return self.observed is not Observed.ABSENT

    def see(self, domain: Domain, boot_id: str) -> bool:
        """Take a domain for what it is. Returns whether that is news."""
        journal = domain.journal
        known = (self.token, self.generation, self.observed, self.settled, self.step, self.ssh, self.problem)
        news = (
            journal.token,
            journal.generation,
            observe(domain),
            journal.generation > 0,
            None,
            domain.ssh,
            why_off(domain, boot_id),
        )
        self.token, self.generation, self.observed, self.settled, self.step, self.ssh, self.problem = news
        if domain.power is Power.OFF:
            self.guest_ready = False
        return news != known

    def lose(self, problem: Problem | None) -> None:
        """There is nothing of the VM; the problem says why, when that was not asked for."""
        self.observed, self.settled, self.step = Observed.ABSENT, True, None
        self.guest_ready, self.ssh, self.problem = False, None, problem

    def spent(self, step: Step, seconds: float) -> None:
        """A step was taken. Its time counts from the first try."""
        self.took_s[step] = self.took_s.get(step, 0.0) + seconds

    def report(self, seq: int) -> VmReport:
        return VmReport(
            vm_id=self.vm_id,
            token=self.token,
            generation=self.generation,
            seq=seq,
            observed=self.observed,
            settled=self.settled,
            step=self.step,
            steps=tuple(StepTime(step=step, seconds=round(seconds, 4)) for step, seconds in self.took_s.items()),
            guest_ready=self.guest_ready,
            ssh=self.ssh,
            problem=self.problem,
        )
