"""Reading a request's body: bounded while it streams, one strict JSON document, and never repeated in an error."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from leveret.shared.documents import MAX_REQUEST_BYTES, Document, Patch
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.messages import CONTENT_TYPE, invalid, parse

BODY_TIMEOUT_S = 30.0

#: RFC 7396: what is not named stays, and null means something.
PATCH_TYPE = "application/merge-patch+json"

Model = TypeVar("Model", bound=Document)


def body_of(model: type[Model], *, optional: bool = False) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads this document. An `optional` one may be left out altogether.

    Raises LeveretError with `body_too_large`, `unsupported_content_type` or `invalid_request`.
    """

    taken = media_types(model)

    async def read(request: Request) -> Model:
        body = await _bytes_of(request)
        if not body and optional:
            return model()
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in taken:
            raise fail(Code.UNSUPPORTED_CONTENT_TYPE, f"The content type is not {' or '.join(taken)}.")
        return parse(model, body)

    return read


def media_types(model: type[Document]) -> tuple[str, ...]:
    """The content types in which this document may come."""
    return (PATCH_TYPE, CONTENT_TYPE) if issubclass(model, Patch) else (CONTENT_TYPE,)


async def _bytes_of(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > MAX_REQUEST_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_REQUEST_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise invalid(f"it did not arrive within {BODY_TIMEOUT_S:.0f} seconds") from None
    except ClientDisconnect:
        raise invalid("the connection ended before it was complete") from None
    return bytes(body)


def _too_large() -> LeveretError:
    return fail(Code.BODY_TOO_LARGE, f"The body is larger than {MAX_REQUEST_BYTES} bytes.")
