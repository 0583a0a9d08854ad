"""Asking the conductor on behalf of whoever sent a request."""

import time

from fastapi import Request

from leveret.api.auth import Identity
from leveret.api.requests import Ask
from leveret.shared.documents import Document


def ask_for(request: Request, identity: Identity, document: Document, *, project: str | None = None) -> Ask:
    """What this request asks for: of the asker's own project, unless another one is named."""
    return Ask(
        project=project or identity.project,
        actor=identity.actor,
        request_id=request.state.request_id,
        document=document,
        at=time.time(),
        traceparent=request.headers.get("traceparent"),
    )
