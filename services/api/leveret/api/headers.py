"""The headers that change what a request means."""

import re

from fastapi import Request

from leveret.shared.errors import Code, LeveretError, fail

KEY_MAX_CHARS = 255

#: One strong ETag as a VM has it, or only the generation in it; or anything that is there.
IF_MATCH_PATTERN = r'^(\*|"[0-9]{1,19}(\.[0-9]{1,19})?")$'
_IF_MATCH = re.compile(r'\*|"([0-9]{1,19}(?:\.[0-9]{1,19})?)"')


def idempotency_key(request: Request) -> str | None:
    """Raises LeveretError `invalid_request`."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= KEY_MAX_CHARS and key.isascii() and key.isprintable()):
        raise _invalid("Idempotency-Key", f"give 1 to {KEY_MAX_CHARS} printable ASCII characters")
    return key


def if_match(request: Request) -> str | None:
    """The ETag that the VM must still have, without its quotes; None when any will do.

    A weak ETag cannot be compared strongly (RFC 9110), and a VM has only one: neither weak ones nor lists are read.
    Raises LeveretError `invalid_request`.
    """
    given = request.headers.getlist("if-match")
    if not given:
        return None
    match = _IF_MATCH.fullmatch(", ".join(given).strip())
    if match is None:
        raise _invalid("If-Match", "give one ETag as it was told, in its quotes and without W/, or *")
    return match[1]


def _invalid(field: str, message: str) -> LeveretError:
    errors = [{"field": field, "message": message}]
    return fail(Code.INVALID_REQUEST, "The headers are not valid.", errors=errors)
