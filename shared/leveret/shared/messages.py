"""Every message on the bus, and the one registry that names them.

Small facts (law 8). What a message is about stands in the AMQP properties (`type`, `message_id`, `user_id`,
`reply_to`, headers); its body is one of the models below, as JSON.
"""

import hashlib
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError

from leveret.shared import documents
from leveret.shared.errors import Code, Problem, fail
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
    the settled VMs (see `digest_of`). `foreign` counts domains that are not Leveret's.
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
    version: str
    problem: Problem | None = None


# Conductor to whoever asked.


class Verdict(Message):
    """What became of a request: accepted means committed (law 2). A reply is a convenience; the row is the truth."""

    request_id: str
    vm_id: UUID | None
    accepted: bool
    generation: int | None = None
    state: State | None = None
    name: str | None = None
    address: str | None = None
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


Registry = dict[str, type[BaseModel]]

#: The registry: the AMQP `type` of every message. Requests carry the very documents of the REST API.
REQUESTS: Registry = {
    "vm.create": documents.CreateVm,
    "vm.delete": documents.DeleteVm,
    "vm.start": documents.StartVm,
    "vm.stop": documents.StopVm,
    "vm.reboot": documents.RebootVm,
    "vm.retry": documents.RetryVm,
}
REGISTRY: Registry = REQUESTS | {
    "host.desired": DesiredVm,
    "host.list": ListVms,
    "host.console": ReadConsole,
    "console.tail": ConsoleTail,
    "host.report": HostReport,
    "host.heartbeat": Heartbeat,
    "request.verdict": Verdict,
    "vm.event": CloudEvent,
}
TYPE_OF: dict[type[BaseModel], str] = {model: name for name, model in REGISTRY.items()}


def encode(message: BaseModel) -> bytes:
    """The body of a message."""
    return message.model_dump_json(exclude_defaults=True).encode()


def decode(message_type: str | None, body: bytes, *, among: Registry | None = None) -> BaseModel:
    """The message in a body.

    Raises LeveretError with `unknown_type`, `body_too_large` or `invalid_request`; the text of a bad value is
    never repeated, since it may be a secret.
    """
    model = (among or REGISTRY).get(message_type or "")
    if model is None:
        raise fail(Code.UNKNOWN_TYPE, f"No message of type {(message_type or '')[:64]!r} is known here.")
    if len(body) > documents.MAX_REQUEST_BYTES:
        raise fail(Code.BODY_TOO_LARGE, f"The body has {len(body)} bytes; {documents.MAX_REQUEST_BYTES} may be sent.")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise fail(
            Code.INVALID_REQUEST, f"This is not a valid {message_type} document.", errors=explain(error)
        ) from None


def explain(error: ValidationError) -> list[dict[str, str]]:
    """Each fault of a document as `{field, message}`, without the values."""
    return [
        {"field": ".".join(str(part) for part in fault["loc"]) or "(document)", "message": fault["msg"]}
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    ][:50]


def digest_of(vms: list[tuple[UUID, int, int, str]]) -> str:
    """One short fact about many VMs: equal on host and conductor when both know the same.

    Each VM is (id, token, generation, observed state); only settled ones take part.
    """
    lines = sorted(f"{vm_id}:{token}:{generation}:{observed}" for vm_id, token, generation, observed in vms)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
