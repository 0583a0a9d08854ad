"""Whether somebody has the present document already (RFC 9110, 13.1.2)."""

import re

from fastapi import Request

_ETAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')


def has_it(request: Request, etag: str) -> bool:
    """Whether If-None-Match names this ETag, or any with `*`. Weak ones are compared weakly, as they should be here."""
    given = ",".join(request.headers.getlist("if-none-match"))
    return given.strip() == "*" or etag in _ETAG.findall(given)
