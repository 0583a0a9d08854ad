"""One request, as it was read from a message, and what has become of it so far."""

import hashlib
import json
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from pydantic import BaseModel

from leveret.conductor.rows import Vm
from leveret.shared.bus import Delivery
from leveret.shared.errors import Code, Problem, fail
from leveret.shared.messages import REQUESTS, Verdict

_REQUEST_ID = re.compile(r"^[\x21-\x7e]{1,128}$")


@dataclass(slots=True)
class Request:
    """A request that could be read, and what has become of it so far."""

    delivery: Delivery
    vm_id: UUID
    project: str
    request_id: str
    requested_at: float
    body: BaseModel
    spec_hash: bytes
    verdict: Verdict | None = None

    def accept(self, vm: Vm) -> None:
        self.verdict = Verdict(
            request_id=self.request_id,
            vm_id=self.vm_id,
            accepted=True,
            generation=vm.generation,
            state=vm.state,
            name=vm.name,
            address=str(vm.address) if vm.address else None,
        )

    def refuse(self, problem: Problem) -> None:
        self.verdict = Verdict(request_id=self.request_id, vm_id=self.vm_id, accepted=False, problem=problem)


def read(delivery: Delivery, gateways: Collection[str]) -> Request:
    """Who asks for what. Raises LeveretError when that cannot be told."""
    project = _project_of(delivery, gateways)
    body = delivery.decoded(among=REQUESTS)
    request_id = delivery.header("request_id") or delivery.message_id or ""
    if not _REQUEST_ID.match(request_id):
        raise fail(Code.INVALID_REQUEST, "The header request_id must be 1 to 128 printable characters, no spaces.")
    try:
        vm_id = UUID(delivery.header("vm_id") or "")
    except ValueError:
        raise fail(Code.INVALID_REQUEST, "The header vm_id must be a UUID.") from None
    return Request(
        delivery=delivery,
        vm_id=vm_id,
        project=project,
        request_id=request_id,
        requested_at=_seconds(delivery.header("requested_at")),
        body=body,
        spec_hash=_hash(body),
    )


def _hash(body: BaseModel) -> bytes:
    """The same for the same wish, however it is written, and in every version that knows its fields."""
    document = body.model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()


def _project_of(delivery: Delivery, gateways: Collection[str]) -> str:
    """The broker has checked the user; only a gateway may speak for projects."""
    if not delivery.user_id:
        raise fail(Code.UNAUTHENTICATED, "The property user_id is required; the broker checks it.")
    if delivery.user_id not in gateways:
        raise fail(Code.FORBIDDEN, f"Broker user {delivery.user_id!r} has no project.")
    project = delivery.header("project")
    if not project:
        raise fail(Code.INVALID_REQUEST, "A gateway must name the project in the header project.")
    return project


def _seconds(text: str | None) -> float:
    """When a request was made, by its sender's clock: only ever shown, never decided by."""
    try:
        value = float(text or "")
    except ValueError:
        return time.time()
    return value if 0 < value < 1e11 else time.time()
