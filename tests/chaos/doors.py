"""One attempt at one request, over REST or AMQP: what was told."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from chaos.history import Told
from leveret.client.amqp import LeveretAmqp
from leveret.client.errors import ApiError, Unreachable
from leveret.client.http import Http
from leveret.shared import topology
from leveret.shared.bus import Envelope, Link, Publisher
from leveret.shared.documents import (
    CreateVm,
    DeleteVm,
    Document,
    RebootVm,
    RequestView,
    RetryVm,
    StartVm,
    StopVm,
    UpdateVm,
)
from leveret.shared.errors import LeveretError
from leveret.shared.messages import TYPE_OF

DOCUMENTS: Mapping[str, type[Document]] = {
    "create": CreateVm,
    "delete": DeleteVm,
    "start": StartVm,
    "stop": StopVm,
    "reboot": RebootVm,
    "retry": RetryVm,
    "update": UpdateVm,
}
#: Answers after which nobody knows: they say "later", or that something broke on the way.
LATER = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Answer:
    """What an attempt was told; see history.Entry for the fields."""

    told: Told
    vm_id: str = ""
    verdict: str = ""
    code: str = ""
    note: str = ""

    @classmethod
    def of_error(cls, error: ApiError) -> "Answer":
        is_unknown = error.status in LATER or error.status >= 500
        return cls(Told.UNKNOWN if is_unknown else Told.FAIL, code=error.code, note=error.message[:200])


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, as often as it has to be sent."""

    op: str
    vm_id: str
    request_id: str
    document: Document
    key: str | None = None


class RestDoor:
    """One API process, asked with one project's token."""

    def __init__(self, name: str, url: str, token: str) -> None:
        self.name = name
        self._http = Http(url, token, retry_for_s=0)

    async def close(self) -> None:
        await self._http.close()

    async def attempt(self, ask: Ask) -> Answer:
        method, path, headers = self._target(ask)
        body = None if ask.op == "delete" else ask.document.model_dump_json(exclude_unset=True)
        try:
            response = await self._http.send(method, path, body=body, headers=headers, request_id=ask.request_id)
        except ApiError as error:
            return Answer.of_error(error)
        except Unreachable as error:
            return Answer(Told.UNKNOWN, code="unreachable", note=error.reason[:200])
        view = RequestView.model_validate_json(response.content)
        return Answer(Told.OK, str(view.vm_id), view.verdict)

    @staticmethod
    def _target(ask: Ask) -> tuple[str, str, dict[str, str]]:
        path = f"/v1/vms/{ask.vm_id}"
        match ask.op:
            case "create" if ask.key is not None:
                return "POST", "/v1/vms", {"Idempotency-Key": ask.key}
            case "create":
                return "PUT", path, {}
            case "delete":
                return "DELETE", path, {}
            case "update":
                return "PATCH", path, {}
            case verb:
                return "POST", f"{path}/actions/{verb}", {}


class AmqpDoor:
    """The broker, as one project's broker user: asking for verdicts, or only for the broker's confirm."""

    def __init__(self, url: str, user: str, project: str) -> None:
        self.name = "amqp"
        self._client = LeveretAmqp(url, project, waits=False, retry_for_s=0)
        self._publisher = Publisher(user)
        self._link = Link(url, f"storm:{project}")
        self._link.add(self._publisher)

    async def open(self) -> None:
        await self._client.__aenter__()
        self._link.start()

    async def close(self) -> None:
        await self._client.close()
        await self._link.stop()

    async def attempt(self, ask: Ask) -> Answer:
        """Publish and wait for the verdict."""
        document, vm_id, request_id = ask.document, UUID(ask.vm_id), ask.request_id
        try:
            match document:
                case CreateVm():
                    receipt = await self._client.create(document, vm_id=vm_id, request_id=request_id)
                case UpdateVm():
                    receipt = await self._client.update(vm_id, document, request_id=request_id)
                case StopVm():
                    receipt = await self._client.stop(vm_id, grace_s=document.grace_s, request_id=request_id)
                case _:
                    receipt = await getattr(self._client, ask.op)(vm_id, request_id=request_id)
        except ApiError as error:
            return Answer.of_error(error)
        except Unreachable as error:
            return Answer(Told.UNKNOWN, code="unreachable", note=error.reason[:200])
        return Answer(Told.OK, str(receipt.vm_id), receipt.verdict)

    async def tell(self, ask: Ask) -> Answer:
        """Publish, and be content with the confirm."""
        kind = TYPE_OF[type(ask.document)]
        headers: dict[str, Any] = {
            "vm_id": ask.vm_id,
            "request_id": ask.request_id,
            "requested_at": str(time.time()),
        }
        try:
            await self._publisher.publish(
                topology.REQUESTS.name, kind, ask.document, envelope=Envelope(headers=headers)
            )
        except LeveretError as error:
            return Answer(Told.UNKNOWN, code=error.problem.code, note=error.problem.message[:200])
        return Answer(Told.OK, ask.vm_id, "confirmed")
