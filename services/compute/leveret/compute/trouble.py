"""What is said when something is not as wished."""

from uuid import UUID

from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import Step

#: The hypervisor is away, not the VM at fault: worth waiting for.
TRANSIENT = frozenset({Code.HYPERVISOR_UNAVAILABLE, Code.HYPERVISOR_TIMEOUT})


def placed(problem: Problem, host: str, step: Step | None) -> Problem:
    """The problem with where it happened, unless it says so itself."""
    return problem.model_copy(update={"host": problem.host or host, "step": problem.step or (step and step.value)})


def missing(vm_id: UUID) -> Problem:
    """A VM that had run here is not there."""
    return Problem.of(Code.DOMAIN_MISSING, f"The hypervisor has no domain {vm_id}; it was not Leveret that removed it.")


def out_of_time(step: Step | None, last: Problem | None) -> Problem:
    """A build's deadline has passed; `last` is what it was waiting for, when that is known."""
    step = step or Step.DISPATCHED
    details = {"last": last.message} if last else {}
    return Problem.of(Code.BUILD_TIMEOUT, f"Its time was up while the build stood at {step}.", step=step, **details)


def not_cleaned_up(failure: Problem, why: Problem) -> Problem:
    """A build has failed, and what is left of it cannot be removed at the moment."""
    return failure.model_copy(update={"details": {**failure.details, "cleanup": why.message}})


def crashed(error: Exception) -> Problem:
    """A defect of ours."""
    return Problem.of(Code.INTERNAL, f"The worker failed: {type(error).__name__}.")
