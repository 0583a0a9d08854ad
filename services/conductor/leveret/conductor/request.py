"""One request, as it was read from a message, and what has become of it so far."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from leveret.conductor.dispatch import is_answerable
from leveret.conductor.identities import Sender
from leveret.conductor.order import Order
from leveret.conductor.rows import Change, Fact, Vm, told
from leveret.shared.bus import Delivery
from leveret.shared.bus.publishing import DIRECT_REPLY
from leveret.shared.bus.reading import UNREADABLE
from leveret.shared.documents import CreateVm, revision_of
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.headers import REQUEST_ID_WORDS, is_if_match, is_request_id, traceparent_in, uuid_in
from leveret.shared.ids import ids_of
from leveret.shared.messages import ADMINISTRATION, GROUPS, REQUESTS, MadeVm, Verdict


@dataclass(slots=True)
class Request:
    """A request that could be read, and what has become of it so far.

    `if_match` is the revision that the VM must have, or only its generation; `dry_run` asks what would become of it.
    """

    delivery: Delivery
    sender: Sender
    vm_id: UUID
    request_id: str
    requested_at: float
    body: BaseModel
    spec_hash: bytes
    if_match: str | None = None
    dry_run: bool = False
    traceparent: str | None = None
    verdict: Verdict | None = None

    @property
    def project(self) -> str:
        return self.sender.project

    @property
    def vm_ids(self) -> tuple[UUID, ...]:
        """The VMs that it is about, in order."""
        return ids_of(self.vm_id, self.body.count) if isinstance(self.body, CreateVm) else (self.vm_id,)

    @property
    def claimed_ids(self) -> set[UUID]:
        """All that must be nobody else's for it to be carried out: one name means one VM, or several, and not both."""
        if isinstance(self.body, CreateVm):
            return {self.vm_id, *ids_of(self.vm_id, max(2, self.body.count))}
        return {self.vm_id}

    @property
    def mark(self) -> str:
        """What a VM remembers this request by: its id with what it asks for, so that a counter may serve as an id."""
        return f"{self.request_id} {(self.delivery.type or '').removeprefix('vm.')}-{self.spec_hash[:4].hex()}"

    def accept(self, vm: Vm) -> None:
        self.verdict = Verdict(
            request_id=self.request_id,
            vm_id=self.vm_id,
            accepted=True,
            dry_run=self.dry_run,
            generation=vm.generation,
            revision=revision_of(vm.generation, vm.updated_at) if vm.updated_at else None,
            state=vm.state,
            name=vm.name,
            address=self._told(vm),
        )

    def accept_all(self, vms: Sequence[Vm]) -> None:
        """A create is accepted with all of its VMs, in order."""
        if len(vms) == 1:
            self.accept(vms[0])
            return
        made = tuple(MadeVm(id=vm.id, name=vm.name, state=vm.state, address=self._told(vm)) for vm in vms)
        self.verdict = Verdict(
            request_id=self.request_id, vm_id=self.vm_id, accepted=True, dry_run=self.dry_run, vms=made
        )

    def _told(self, vm: Vm) -> str | None:
        """Its address; a dry run's is given to nobody."""
        return str(vm.address) if vm.address and not self.dry_run else None

    def refuse(self, problem: Problem) -> None:
        self.verdict = Verdict(
            request_id=self.request_id, vm_id=self.vm_id, accepted=False, dry_run=self.dry_run, problem=problem
        )

    @property
    def problem(self) -> Problem | None:
        """Why it was refused, if it was."""
        return self.verdict.problem if self.verdict is not None else None

    def is_refused(self, code: Code) -> bool:
        return self.problem is not None and self.problem.code is code

    def refusal(self) -> Fact:
        """The fact that it was refused, for the project's log."""
        assert self.problem is not None
        return Fact(self.project, "rejected", {"problem": told(self.problem), **self.stamp()}, self.vm_id)

    def check_revision(self, vm: Vm) -> None:
        """Raises LeveretError `precondition_failed` when the VM is not what the asker saw last."""
        revision = revision_of(vm.generation, vm.updated_at) if vm.updated_at else ""
        if self.if_match is not None and self.if_match not in {revision, str(vm.generation)}:
            raise fail(Code.PRECONDITION_FAILED, f"VM {vm.name} is not what it was.", revision=revision)

    def signed(self, change: Change) -> Change:
        """The change, with every fact saying which request it comes from."""
        stamp = self.stamp()
        events = tuple(_with(event, stamp) for event in change.events)
        return Change(change.before, change.after, events)

    def stamp(self) -> dict[str, Any]:
        stamp = {"request_id": self.request_id, "by": self.sender.by}
        return stamp | {"traceparent": self.traceparent} if self.traceparent else stamp


def _with(event: Any, stamp: dict[str, Any]) -> Any:
    return type(event)(event.vm, event.type, {**event.data, **stamp}, event.moved_from)


def read(delivery: Delivery, sender: Sender) -> Request | Order:
    """What is asked for. Raises LeveretError when that cannot be told, or this sender may not ask for it."""
    _check_envelope(delivery, sender)
    orders = ADMINISTRATION | GROUPS if sender.is_gateway else GROUPS
    if delivery.type in orders:
        body = delivery.decoded(among=orders)
        return Order(sender.project, sender.by, _request_id(delivery), body)
    body = delivery.decoded(among=REQUESTS)
    if isinstance(body, CreateVm) and body.placement.hosts and not sender.is_gateway:
        raise fail(Code.FORBIDDEN, "Only an administrator may choose the host, over REST.")
    return Request(
        delivery=delivery,
        sender=sender,
        vm_id=_vm_id(delivery),
        request_id=_request_id(delivery),
        requested_at=_seconds(delivery.header("requested_at")),
        body=body,
        spec_hash=_hash(body),
        if_match=_if_match(delivery, body),
        dry_run=_dry_run(delivery, body),
        traceparent=traceparent_in(delivery.header("traceparent")),
    )


def _check_envelope(delivery: Delivery, sender: Sender) -> None:
    """What no honest client sends."""
    if any(name in delivery.headers for name in ("CC", "BCC")):
        raise _bad_header("CC", "a request goes to one place: leave CC and BCC out")
    if delivery.reply_to and not is_answerable(delivery):
        raise _bad_header("reply_to", f"only direct replies are given: set it to {DIRECT_REPLY}")
    if not sender.may_write:
        raise fail(Code.FORBIDDEN, "This broker user may only follow events.")
    named = delivery.header("project")
    if named is not None and named != sender.project:
        raise fail(Code.FORBIDDEN, "This broker user does not speak for the project in the header project.")


def _bad_header(name: str, message: str) -> LeveretError:
    errors = [{"field": name, "message": message}]
    return fail(Code.INVALID_REQUEST, "The properties of the message are not valid.", errors=errors)


def _request_id(delivery: Delivery) -> str:
    request_id = delivery.header("request_id") or delivery.message_id or ""
    if not is_request_id(request_id) or request_id == UNREADABLE:
        raise _bad_header("request_id", f"{REQUEST_ID_WORDS}, here or as message_id")
    return request_id


def _vm_id(delivery: Delivery) -> UUID:
    vm_id = uuid_in(delivery.header("vm_id"))
    if vm_id is None:
        raise _bad_header("vm_id", "give a UUID")
    return vm_id


def _if_match(delivery: Delivery, body: BaseModel) -> str | None:
    value = delivery.header("if_match")
    if value is None:
        return None
    if isinstance(body, CreateVm):
        raise _bad_header("if_match", "there is nothing yet that could match: leave it out of a create")
    if not is_if_match(value):
        raise _bad_header("if_match", "give a generation, or generation and revision as in an ETag, as text")
    return value


def _dry_run(delivery: Delivery, body: BaseModel) -> bool:
    value = delivery.header("dry_run")
    if value in {None, "false"}:
        return False
    if value != "true" or not isinstance(body, CreateVm):
        raise _bad_header("dry_run", "only a create can be tried, with the text true")
    return True


def _hash(body: BaseModel) -> bytes:
    """The same for the same wish, however it is written, and in every version that knows its fields."""
    document = body.model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()


def _seconds(text: str | None) -> float:
    """When a request was made, by its sender's clock: only ever shown, never decided by."""
    try:
        value = float(text or "")
    except ValueError:
        return time.time()
    return value if 0 < value < 1e11 else time.time()
