"""What becomes of a VM whose host is proven to be off.

Law 3: only now may it get a second host. What its owner did not ask to be made anew waits for its host, with its disk.
"""

from dataclasses import replace
from datetime import datetime

from leveret.conductor.decisions.parts import Limits, deleted, error, failed, moved, released
from leveret.conductor.rows import Change, Vm, told
from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import State, Step


def on_fence(vm: Vm, host: str, now: datetime, limits: Limits) -> Change | None:
    """What becomes of a VM on a fenced host; None when that was decided before."""
    if is_waiting_for_its_host(vm):
        return None
    if vm.state is State.DELETING:
        return deleted(vm)
    if vm.is_given_up:
        return Change(vm, replace(released(vm), step=None, deadline=None))
    problem = Problem.of(Code.HOST_FENCED, f"Host {host} is off, and VM {vm.name} with it.", host=host)
    if vm.state is State.BUILDING or (vm.state in {State.RUNNING, State.STOPPED} and vm.is_made_anew):
        return _elsewhere(vm, problem, now, limits)
    return error(vm, replace(vm, step=None, deadline=None, guest_ready=False), problem)


def on_retire(vm: Vm, host: str) -> Change:
    """Its host will never come back: the VM has no place any more, and is explained."""
    if vm.state is State.DELETING:
        return deleted(vm)
    message = f"Host {host} was retired, and the disk of VM {vm.name} with it."
    change = failed(released(vm), Problem.of(Code.HOST_RETIRED, message, host=host))
    return Change(vm, change.after, change.events)


def is_waiting_for_its_host(vm: Vm) -> bool:
    """Whether it is in error because its host is fenced, and still belongs there."""
    return vm.state is State.ERROR and vm.host_id is not None and (vm.problem or {}).get("code") == Code.HOST_FENCED


def _elsewhere(vm: Vm, problem: Problem, now: datetime, limits: Limits) -> Change:
    after = replace(
        released(vm),
        state=State.PENDING,
        step=Step.SCHEDULING,
        generation=vm.generation + 1,
        attempts=0,
        failed_hosts=(),
        problem=told(problem),
        deadline=now + limits.build,
    )
    return moved(vm, after, "pending", attempt=vm.attempts, problem=told(problem))
