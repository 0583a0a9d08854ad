"""The headers that change what a request means. What stands there twice means nothing, and is refused."""

import re

from fastapi import Request

from leveret.shared import headers
from leveret.shared.errors import Code, LeveretError, fail

KEY_MAX_CHARS = 255

#: One strong ETag as a VM has it, or only the generation in it; or anything that is there.
IF_MATCH_PATTERN = rf'^(\*|"{headers.IF_MATCH_PATTERN[1:-1]}({headers.SILENT_MARK})?")$'

#: No project comes to have so many events that their number needs more digits; a browser may send an empty one.
LAST_EVENT_ID_PATTERN = r"^[0-9]{0,18}$"


def check_request_id(request: Request) -> None:
    """What changes something must not be called otherwise than its sender thinks: asking again would do it again.

    Raises LeveretError `invalid_request`.
    """
    given = request.headers.getlist("x-request-id")
    if given and (len(given) > 1 or not headers.is_request_id(given[0])):
        raise invalid("X-Request-Id", headers.REQUEST_ID_WORDS)


def idempotency_key(request: Request) -> str | None:
    """Raises LeveretError `invalid_request`."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    key = given[0]
    if len(given) > 1 or not (0 < len(key) <= KEY_MAX_CHARS and key.isascii() and key.isprintable()):
        raise invalid("Idempotency-Key", f"give 1 to {KEY_MAX_CHARS} printable ASCII characters, once")
    return key


def if_match(request: Request) -> str | None:
    """The ETag that the VM must still have, without its quotes; None when any will do.

    A weak ETag cannot be compared strongly (RFC 9110), and a VM has only one: neither weak ones nor lists are read.
    Raises LeveretError `invalid_request`.
    """
    given = request.headers.getlist("if-match")
    tag = ", ".join(given).strip()
    if not given or tag == "*":
        return None
    revision = tag[1:-1].removesuffix(headers.SILENT_MARK)
    if not (tag.startswith('"') and tag.endswith('"') and headers.is_if_match(revision)):
        raise invalid("If-Match", "give one ETag as it was told, in its quotes and without W/, or *")
    return revision


def refuse_if_match(request: Request) -> None:
    """What has no ETag cannot be held against one. Raises LeveretError `invalid_request`."""
    if "if-match" in request.headers:
        raise invalid("If-Match", "there is nothing here that could match: leave it out")


def last_event_id(request: Request) -> int | None:
    """Where a stream that broke goes on. Raises LeveretError `invalid_request` for what no stream has given out."""
    given = request.headers.getlist("last-event-id") or [""]
    if len(given) > 1 or not re.fullmatch(LAST_EVENT_ID_PATTERN, given[0]):
        raise invalid("Last-Event-ID", "give the id of an event as it was told")
    return int(given[0]) if given[0] else None


def invalid(field: str, message: str) -> LeveretError:
    errors = [{"field": field, "message": message}]
    return fail(Code.INVALID_REQUEST, "The headers are not valid.", errors=errors)
