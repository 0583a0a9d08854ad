"""An order of an administrator, as a gateway passes it on."""

import hashlib
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from leveret.conductor.rows import Fact


@dataclass(frozen=True, slots=True)
class Order:
    """One thing to do in a project. `by` is who wants it, `request_id` names the request in the log."""

    project: str
    by: str
    request_id: str
    body: BaseModel

    @property
    def digest(self) -> bytes:
        """What is asked for, whoever asks."""
        return hashlib.sha256(f"{type(self.body).__name__} {self.body.model_dump_json()}".encode()).digest()

    def fact(self, kind: str, **data: Any) -> Fact:
        return Fact(self.project, kind, {**data, "by": self.by, "request_id": self.request_id})
