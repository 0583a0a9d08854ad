"""Every message on the bus, and the one registry that names them.

Small facts (law 8). What a message is about stands in the AMQP properties (`type`, `message_id`, `user_id`,
`reply_to`, headers); its body is one of the models below, as JSON.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from leveret.shared import checks, documents, groups, placements
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.lifecycle import Observed, State, Step, Wanted

CONTENT_TYPE = "application/json"


class Message(BaseModel):
    """Internal messages ignore what they do not know, so that versions may differ side by side."""

    model_config = ConfigDict(frozen=True, extra="ignore")


# Conductor to host.


class Image(Message):
    url: str
    sha256: str
    format: Literal["qcow2", "raw"]


class Nic(Message):
    """One interface with everything the guest and the host need to know about it. `prefix` is in bits."""

    network: str
    mac: str
    address: str
    prefix: int
    gateway: str
    dns: tuple[str, ...] = ()


class DesiredVm(Message):
    """The whole of what one host should make true of one VM.

    `host_epoch` names the incarnation of the worker that is addressed: another one ignores it, so that no command
    from before a restart can come true after it. `token` fences a placement, `generation` orders the wishes within
    it. Only when `may_build` is set may a domain be made; a VM that has run once and has no domain is reported,
    never silently made anew. `restarts` is a count: a host whose domain has seen fewer resets it. `user_data_base64`
    is present until the guest is ready. `deadline_s` is the time left for a build when the message was sent.
    """

    vm_id: UUID
    host_epoch: int
    project: str
    name: str
    generation: int
    token: int
    wanted: Wanted
    may_build: bool
    restarts: int
    grace_s: int
    vcpus: int
    memory_mib: int
    disk_gib: int
    image: Image
    ssh_keys: tuple[str, ...] = ()
    user_data_base64: str | None = None
    nic: Nic | None
    deadline_s: float


class ListVms(Message):
    """Report everything you have, complete."""


class ReadConsole(Message):
    """Answer with the last bytes of a guest's console."""

    vm_id: UUID
    max_bytes: int = 65536


class ConsoleTail(Message):
    """The end of a guest's console; `text` is UTF-8 with replacements."""

    vm_id: UUID
    text: str = ""
    truncated: bool = False
    problem: Problem | None = None


class AskInventory(Message):
    """Answer with everything that the hypervisor and the pool have: to be compared, not to be acted on."""


class SeenDomain(Message):
    """One domain of Leveret's, as its own journal has it."""

    vm_id: UUID
    token: int
    generation: int
    running: bool


class HostInventory(Message):
    """All that a host has. `foreign` are domains that are not Leveret's, `files` the VMs with files in the pool, and
    `leftovers` what else lies there and belongs to nothing. `cut` means that there is more than was told.
    """

    host_id: UUID
    epoch: int
    domains: tuple[SeenDomain, ...] = ()
    foreign: tuple[UUID, ...] = ()
    files: tuple[UUID, ...] = ()
    leftovers: tuple[str, ...] = ()
    cut: bool = False
    problem: Problem | None = None


# Host to conductor.


class VmReport(Message):
    """What a host sees of one VM. The last report of a VM says all: nothing depends on an earlier one.

    `seq` counts the host's reports within its epoch. `settled` means: nothing more to do for `generation`.
    `token` and `generation` are those the host works for. `problem` says why the VM is not as wanted.
    """

    vm_id: UUID
    token: int
    generation: int
    seq: int
    observed: Observed
    settled: bool
    step: Step | None = None
    steps: tuple[documents.StepTime, ...] = ()
    guest_ready: bool = False
    ssh: documents.Endpoint | None = None
    problem: Problem | None = None


class HostReport(Message):
    """Reports of one host. A `complete` one lists every VM the host has, as of `seq`."""

    host_id: UUID
    epoch: int
    seq: int
    complete: bool = False
    vms: tuple[VmReport, ...] = ()


class Capacity(Message):
    """What a host has in all, before reserve and ratio."""

    vcpus: int
    memory_mib: int
    disk_gib: int


class Heartbeat(Message):
    """A host is alive. Also its registration: an unknown id makes a host.

    `epoch` grows with every incarnation of the worker. `placeable` is (total - reserve) x ratio. `digest` covers
    the settled VMs (see `digest_of`). `foreign` counts domains that are not Leveret's. `newest_token` is the newest
    that this worker has heard or seen: no placement may get an older one. `taints`, `vms_max` and `images` (the sha256
    of those in the host's cache) say what it takes, and what it takes soonest.
    """

    host_id: UUID
    epoch: int
    name: str
    zone: str
    labels: dict[str, str]
    virt_type: str
    total: Capacity
    placeable: Capacity
    foreign: int = 0
    digest: str
    newest_token: int = 0
    taints: dict[str, str] = {}
    vms_max: int | None = None
    images: tuple[str, ...] = ()
    version: str
    problem: Problem | None = None


# Conductor to whoever asked.


class MadeVm(Message):
    """One of the VMs that a request for several made."""

    id: UUID
    name: str
    state: State
    address: str | None = None


class Verdict(Message):
    """What became of a request: accepted means committed (law 2). A reply is a convenience; the row is the truth.

    `vms` are those of a request for several, in order; then `vm_id` is only what the request was called by.
    """

    request_id: str
    vm_id: UUID | None
    accepted: bool
    dry_run: bool = False
    generation: int | None = None
    revision: str | None = None
    state: State | None = None
    name: str | None = None
    address: str | None = None
    vms: tuple[MadeVm, ...] = ()
    problem: Problem | None = None


class CloudEvent(Message):
    """A CloudEvents 1.0 envelope in structured JSON. `sequence` counts a project's events without a gap."""

    specversion: Literal["1.0"]
    id: str
    source: str
    type: str
    subject: str
    time: str
    datacontenttype: Literal["application/json"]
    sequence: str
    data: dict[str, Any]
    traceparent: str | None = None


# The API to the conductor, about projects. Only a gateway is listened to; the header `project` names the project.


class NewToken(documents.CreateToken):
    """A token to be known by the SHA-256 of its secret, in hex."""

    token_id: UUID
    hash: documents.Sha256


class EndToken(documents.RevokeToken):
    token_id: UUID


class NewAmqpUser(documents.AddAmqpUser):
    user: documents.AmqpUserName


class EndAmqpUser(documents.RemoveAmqpUser):
    user: documents.AmqpUserName


class Cordon(documents.CordonHost):
    host_id: UUID


class Uncordon(documents.UncordonHost):
    host_id: UUID


class Fence(documents.FenceHost):
    host_id: UUID


class Retire(documents.RetireHost):
    host_id: UUID


class TokensUsed(Message):
    """When tokens were last used, in seconds since the epoch by the API's clock; only ever shown."""

    last_used: dict[UUID, float]


Registry = dict[str, type[BaseModel]]

#: What clients may ask for: the very documents of the REST API, under a type that names the version of the contract.
REQUESTS: Registry = {
    "vm.create.v1": documents.CreateVm,
    "vm.update.v1": documents.UpdateVm,
    "vm.delete.v1": documents.DeleteVm,
    "vm.start.v1": documents.StartVm,
    "vm.stop.v1": documents.StopVm,
    "vm.reboot.v1": documents.RebootVm,
    "vm.retry.v1": documents.RetryVm,
}
#: What clients may ask for beside that, about their project.
GROUPS: Registry = {
    "group.create.v1": groups.CreateGroup,
    "group.delete.v1": groups.DeleteGroup,
}
#: What only a gateway may ask for, on behalf of an administrator.
ADMINISTRATION: Registry = {
    "project.create.v1": documents.CreateProject,
    "project.quota.v1": documents.UpdateQuota,
    "project.delete.v1": documents.DeleteProject,
    "token.create.v1": NewToken,
    "token.revoke.v1": EndToken,
    "token.used.v1": TokensUsed,
    "amqp_user.add.v1": NewAmqpUser,
    "amqp_user.remove.v1": EndAmqpUser,
    "host.cordon.v1": Cordon,
    "host.uncordon.v1": Uncordon,
    "host.fence.v1": Fence,
    "host.retire.v1": Retire,
    "check.run.v1": checks.RunCheck,
    "capacity.ask.v1": placements.AskCapacity,
}
#: What clients hear.
ANSWERS: Registry = {
    "request.verdict.v1": Verdict,
    "vm.event.v1": CloudEvent,
}
#: The registry: the AMQP `type` of every message.
REGISTRY: Registry = (
    REQUESTS
    | GROUPS
    | ADMINISTRATION
    | ANSWERS
    | {
        "host.desired": DesiredVm,
        "host.list": ListVms,
        "host.console": ReadConsole,
        "console.tail": ConsoleTail,
        "host.inventory": AskInventory,
        "inventory.list": HostInventory,
        "check.report.v1": checks.CheckReport,
        "capacity.report.v1": placements.CapacityReport,
        "host.report": HostReport,
        "host.heartbeat": Heartbeat,
    }
)
TYPE_OF: dict[type[BaseModel], str] = {model: name for name, model in REGISTRY.items()}


def encode(message: BaseModel) -> bytes:
    """The body of a message. What a patch does not give stays out of it: a null that is given means something."""
    if isinstance(message, documents.Patch):
        return message.model_dump_json(exclude_unset=True).encode()
    return message.model_dump_json(exclude_defaults=True).encode()


def decode(message_type: str | None, body: bytes, *, among: Registry | None = None) -> BaseModel:
    """The message in a body.

    Raises LeveretError with `unknown_type`, `body_too_large` or `invalid_request`; the text of a bad value is
    never repeated, since it may be a secret.
    """
    known = among or REGISTRY
    model = known.get(message_type or "")
    if model is None:
        raise _unknown(message_type or "", known)
    if len(body) > documents.MAX_REQUEST_BYTES:
        raise fail(Code.BODY_TOO_LARGE, f"The body has {len(body)} bytes; {documents.MAX_REQUEST_BYTES} may be sent.")
    return parse(model, body) if issubclass(model, documents.Document) else _parse(model, body)


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], body: bytes) -> Model:
    """The document in these bytes, which must be one strict JSON document in UTF-8.

    Its shape is looked at first, since a validator goes through all of a document before it says that there is too
    much: that takes seconds for two megabytes of rubbish. A repeated field is refused, too; of two values one would
    be dropped silently. Then pydantic refuses unknown fields, NaN and wrong types.

    Raises LeveretError `invalid_request`.
    """
    try:
        values = _count(json.loads(body, object_pairs_hook=_refuse_duplicates))
    except _Duplicate:
        raise invalid("a field stands there twice") from None
    except (ValueError, RecursionError):
        _parse(model, body)  # says where it goes wrong
        raise invalid("this is not one JSON document in UTF-8") from None
    if values > MAX_VALUES:
        raise invalid(f"it has more than {MAX_VALUES} values")
    return _parse(model, body)


#: Fields and items in a document, at most. The largest that makes sense has some two hundred.
MAX_VALUES = 2000


def _count(value: object) -> int:
    """The fields and items in it, counted no further than the limit."""
    count, waiting = 0, [value]
    while waiting and count <= MAX_VALUES:
        match waiting.pop():
            case dict() as fields:
                count += len(fields)
                waiting.extend(fields.values())
            case list() as items:
                count += len(items)
                waiting.extend(items[:MAX_VALUES])
    return count


def _parse(model: type[Model], body: bytes) -> Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        errors = explain(error, _read(body))
        raise fail(Code.INVALID_REQUEST, "The document is not valid.", errors=errors) from None
    except (ValueError, RecursionError):
        raise invalid("this is not one JSON document in UTF-8") from None


def _read(body: bytes) -> object:
    """The document that a model refused; None when it is none at all."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


class _Duplicate(Exception):
    """The same field twice in one object."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Duplicate
    return fields


def invalid(message: str, *, field: str = "(document)") -> LeveretError:
    """The refusal of a document or one of its fields."""
    errors = [{"field": field, "message": message}]
    return fail(Code.INVALID_REQUEST, "The document is not valid.", errors=errors)


def _unknown(message_type: str, known: Registry) -> LeveretError:
    shown = message_type[:64]
    name, _, version = message_type.rpartition(".v")
    if name and version.isdecimal() and (spoken := [own for own in known if own.startswith(f"{name}.v")]):
        return fail(Code.UNKNOWN_TYPE, f"This Leveret does not speak {shown!r} but {spoken[0]!r}.")
    return fail(Code.UNKNOWN_TYPE, f"No message of type {shown!r} is known here.")


def explain(error: ValidationError, document: object = None) -> list[dict[str, str]]:
    """Each fault of a document as `{field, message}`, without the values; of many the first few.

    Given the document as it was read, faults stand by the fields that are in it. Where several forms would have done,
    only what is wrong by the form that fits best is told.
    """
    faults = [_placed(fault, document) for fault in error.errors(include_url=False, include_input=False)]
    fitting = _best_forms(faults)
    told = [fault for fault in faults if fault.form is None or fault.form in fitting]
    return [{"field": fault.field, "message": fault.message} for fault in told[:FAULTS_TOLD]]


FAULTS_TOLD = 20
_PARTS_TOLD = 8


@dataclass(frozen=True, slots=True)
class _Fault:
    """A fault and its field. `form` is where one of several forms could stand, and which of them this is about."""

    field: str
    message: str
    form: tuple[tuple[int | str, ...], int | str] | None
    is_misfit: bool


def _placed(fault: ErrorDetails, document: object) -> _Fault:
    """Where a fault is by the document: pydantic's place has names of our own in it, of a form or a part of it."""
    at, path = document, list[int | str]()
    form: tuple[tuple[int | str, ...], int | str] | None = None
    *inner, last = fault["loc"] or ("",)
    for part in (*inner, last):
        match at:
            case dict() if part in at:
                at = at[part]
            case list() if isinstance(part, int) and part < len(at):
                at = at[part]
            case None if document is None:
                pass
            case dict() if part is last and fault["type"] == "missing":
                pass
            case _:
                if form is None and part != "[key]":
                    form = (tuple(path), part)
                continue
        path.append(part)
    field = ".".join(shown(part) for part in path[:_PARTS_TOLD]) or "(document)"
    return _Fault(field, words_of(fault), form, fault["type"] == "extra_forbidden")


def _best_forms(faults: list[_Fault]) -> set[tuple[tuple[int | str, ...], int | str]]:
    """Of the forms that could stand in one place, the one with the fewest fields that it does not know, then faults."""
    misfits = Counter(fault.form for fault in faults if fault.is_misfit)
    all_faults = Counter(fault.form for fault in faults)
    best: dict[tuple[int | str, ...], tuple[tuple[int | str, ...], int | str]] = {}
    for form in filter(None, all_faults):
        other = best.setdefault(form[0], form)
        if (misfits[form], all_faults[form]) < (misfits[other], all_faults[other]):
            best[form[0]] = form
    return set(best.values())


def words_of(fault: ErrorDetails) -> str:
    """What is wrong, without a word on who found it."""
    return fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")


def shown(part: int | str) -> str:
    """The name of a field as it can be stored and shown: it may be one that its sender made up."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(part)[:64])


def digest_of(vms: list[tuple[UUID, int, int, str]]) -> str:
    """One short fact about many VMs: equal on host and conductor when both know the same.

    Each VM is (id, token, generation, observed state); only settled ones take part.
    """
    lines = sorted(f"{vm_id}:{token}:{generation}:{observed}" for vm_id, token, generation, observed in vms)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
