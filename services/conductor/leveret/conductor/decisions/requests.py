"""What an accepted request makes of a VM."""

from dataclasses import replace
from datetime import datetime, timedelta

from leveret.conductor.decisions.fencing import is_waiting_for_its_host
from leveret.conductor.decisions.parts import Limits, deleted, moved, released, wish
from leveret.conductor.rows import Change, Event, Vm
from leveret.shared.documents import MAX_LABELS, DeleteVm, RebootVm, RetryVm, StartVm, StopVm, UpdateVm
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.lifecycle import Desired, State, Step

#: As many as one redelivery may bring: what a conductor holds when it is killed.
REMEMBERED_REQUESTS = 128

Verb = UpdateVm | DeleteVm | StartVm | StopVm | RebootVm | RetryVm


def on_request(
    vm: Vm, verb: Verb, mark: str, now: datetime, limits: Limits, *, host_is_fenced: bool = False
) -> Change | None:
    """What an accepted request makes of a VM; None when there is nothing to change.

    Raises LeveretError with `vm_deleted`, `state_conflict` or `invalid_request` when it cannot be accepted, and with
    the same code again when it was refused before.
    """
    if refused := _refused_before(vm, mark):
        raise refused
    if mark in vm.recent_requests and not isinstance(verb, DeleteVm):
        return None
    if isinstance(verb, DeleteVm):
        change = _delete(vm, now, limits)
    elif vm.desired is Desired.DELETED:
        raise fail(Code.VM_DELETED, f"VM {vm.name} is {vm.state}.")
    else:
        match verb:
            case UpdateVm():
                change = _update(vm, verb)
            case StartVm():
                change = _start(vm, now, limits)
            case StopVm(grace_s=grace_s):
                change = _stop(vm, grace_s, now, limits)
            case RebootVm():
                change = _reboot(vm, now, limits)
            case RetryVm():
                change = _retry(vm, now, limits, host_is_fenced=host_is_fenced)
    if change is None:
        # To be remembered all the same: repeated after a later wish, it would undo that one.
        return None if vm.state is State.DELETED else remember(vm, mark)
    return replace(change, after=remember(change.after, mark).after)


def remember(vm: Vm, mark: str, refused: Code | str | None = None) -> Change:
    """Carried out or refused: this request is not to be looked at again. A refusal is kept with its code."""
    entry = f"{mark} {refused}" if refused else mark
    kept = [known for known in vm.recent_requests if known != entry]
    return Change(vm, replace(vm, recent_requests=(*kept, entry)[-REMEMBERED_REQUESTS:]))


def is_known(vm: Vm, mark: str) -> bool:
    """Whether this request was judged before, one way or the other."""
    return any(known == mark or known.startswith(f"{mark} ") for known in vm.recent_requests)


def _refused_before(vm: Vm, mark: str) -> LeveretError | None:
    for known in vm.recent_requests:
        if known.startswith(f"{mark} "):
            return fail(
                Code(known.removeprefix(f"{mark} ")),
                f"This request was refused before, when VM {vm.name} was not as it had to be.",
                hint="Ask anew, under another request id, if you still want it.",
            )
    return None


def _delete(vm: Vm, now: datetime, limits: Limits) -> Change | None:
    if vm.state is State.DELETED:
        return None
    if vm.host_id is None:
        return deleted(vm)
    if vm.state is State.DELETING:
        return Change(vm, replace(vm, sent_at=None))  # asked again: drive it again (law 7)
    after = replace(
        vm,
        desired=Desired.DELETED,
        generation=vm.generation + 1,
        state=State.DELETING,
        step=Step.REMOVE,
        problem=None,
        deadline=now + limits.delete,
        sent_at=None,
    )
    return moved(vm, after, "deleting")


def _update(vm: Vm, verb: UpdateVm) -> Change | None:
    """No new generation: hosts have nothing to do with names and labels."""
    labels = {key: value for key, value in {**vm.labels, **verb.labels}.items() if value is not None}
    if len(labels) > MAX_LABELS:
        errors = [
            {"field": "labels", "message": f"a VM has at most {MAX_LABELS} labels; this one would have {len(labels)}"}
        ]
        raise fail(Code.INVALID_REQUEST, "The document is not valid.", errors=errors)
    after = replace(vm, name=verb.name or vm.name, labels=labels)
    if after == vm:
        return None
    return Change(vm, after, (Event(after, "changed", {"verb": "update", "name": after.name, "labels": labels}),))


def _start(vm: Vm, now: datetime, limits: Limits) -> Change | None:
    if vm.state is State.ERROR:
        raise fail(
            Code.STATE_CONFLICT,
            f"VM {vm.name} is in error.",
            hint="Retry it (`leveret retry`) or delete it; `leveret explain` says why it failed.",
        )
    if vm.desired is Desired.RUNNING and (vm.state is not State.STOPPED or vm.is_lagging):
        return None
    problem = vm.problem if vm.state is State.PENDING else None  # why it still waits
    return wish(vm, "start", now + limits.change, desired=Desired.RUNNING, problem=problem)


def _stop(vm: Vm, grace_s: int, now: datetime, limits: Limits) -> Change | None:
    if vm.state is State.ERROR:
        raise fail(Code.STATE_CONFLICT, f"VM {vm.name} is in error: it cannot be stopped.")
    if vm.desired is Desired.STOPPED and (not vm.is_lagging or grace_s >= vm.grace_s):
        return None
    deadline = now + limits.change + timedelta(seconds=grace_s)
    return wish(vm, "stop", deadline, desired=Desired.STOPPED, grace_s=grace_s)


def _reboot(vm: Vm, now: datetime, limits: Limits) -> Change:
    if vm.state is not State.RUNNING or vm.desired is not Desired.RUNNING:
        raise fail(Code.STATE_CONFLICT, f"VM {vm.name} is {vm.state}: only a running VM can be rebooted.")
    return wish(vm, "reboot", now + limits.change, restarts=vm.restarts + 1)


def _retry(vm: Vm, now: datetime, limits: Limits, *, host_is_fenced: bool) -> Change:
    is_held = vm.host_id is not None and not (host_is_fenced and is_waiting_for_its_host(vm))
    if vm.state is not State.ERROR or is_held:
        raise fail(
            Code.STATE_CONFLICT,
            f"VM {vm.name} is {vm.state}{' and still being cleaned up' if vm.is_given_up else ''}.",
            hint="Only a VM in error that no host holds any more can be tried again.",
        )
    if vm.user_data_wiped:
        raise fail(
            Code.STATE_CONFLICT,
            f"VM {vm.name} cannot be made anew: its user-data was wiped when its guest had read it.",
            hint="Delete it, and create it with its user-data.",
        )
    after = replace(
        released(vm),
        state=State.PENDING,
        step=Step.SCHEDULING,
        generation=vm.generation + 1,
        attempts=0,
        failed_hosts=(),
        problem=None,
        steps=(),
        deadline=now + limits.build,
    )
    return moved(vm, after, "accepted", verb="retry")
