"""Reading a request's body: bounded while it streams, one strict JSON document, and never repeated in an error."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from leveret.shared.documents import MAX_REQUEST_BYTES, Document
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.messages import CONTENT_TYPE, explain

BODY_TIMEOUT_S = 30.0

Model = TypeVar("Model", bound=Document)


class _Duplicate(Exception):
    """The same field twice in one object."""


def body_of(model: type[Model], *, optional: bool = False) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads this document. An `optional` one may be left out altogether.

    Raises LeveretError with `body_too_large`, `unsupported_content_type` or `invalid_request`.
    """

    async def read(request: Request) -> Model:
        body = await _bytes_of(request)
        if not body and optional:
            return model()
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != CONTENT_TYPE:
            raise fail(Code.UNSUPPORTED_CONTENT_TYPE, "The content type is not application/json.")
        return parse(model, body)

    return read


def parse(model: type[Model], body: bytes) -> Model:
    """The document in these bytes.

    Pydantic's parser goes first: it bounds the depth, and refuses unknown fields, NaN and wrong types. It lets a
    repeated field pass, and of two values one would be dropped silently: that is refused afterwards.
    """
    try:
        document = model.model_validate_json(body)
        json.loads(body, object_pairs_hook=_refuse_duplicates)
    except ValidationError as error:
        raise fail(Code.INVALID_REQUEST, "The document is not valid.", errors=explain(error)) from None
    except _Duplicate:
        raise _invalid("a field stands there twice") from None
    except (ValueError, RecursionError):
        raise _invalid("this is not one JSON document in UTF-8") from None
    return document


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
        raise _invalid(f"it did not arrive within {BODY_TIMEOUT_S:.0f} seconds") from None
    except ClientDisconnect:
        raise _invalid("the connection ended before it was complete") from None
    return bytes(body)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Duplicate
    return fields


def _invalid(message: str) -> LeveretError:
    errors = [{"field": "(document)", "message": message}]
    return LeveretError(Problem.of(Code.INVALID_REQUEST, "The document is not valid.", errors=errors))


def _too_large() -> LeveretError:
    return fail(Code.BODY_TOO_LARGE, f"The body is larger than {MAX_REQUEST_BYTES} bytes.")
