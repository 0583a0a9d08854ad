"""What is checked before anything is sent. No message repeats a value: it may be a secret in the wrong place.

Light: the command line loads it to answer `--help`.
"""

import re
from urllib.parse import SplitResult, urlsplit

from leveret.client.errors import ConfigError

_TOKEN = re.compile(r"[!-~]+")
#: What urlsplit would leave out without a word, or a header could not hold.
_NOT_IN_A_URL = re.compile(r"[\s\x00-\x20\x7f]")


def check_token(token: str, where: str = "the token") -> str:
    """The token. Raises ConfigError for what cannot be one."""
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{where} cannot be a token: {_why_not(token)}; one word of ASCII is expected.")
    return token


def _why_not(token: str) -> str:
    if not token:
        return "it is empty"
    if not token.isascii():
        return "there is something in it that is not ASCII"
    if token.strip() and len(token.split()) == 1 and token != token.strip():
        return "there is white space around it, such as the line break at the end of a file"
    return "there is white space in it" if len(token.split()) > 1 else "there are control characters in it"


def check_url(url: str) -> str:
    """The url without a slash at its end. Raises ConfigError for what cannot be the address of an API."""
    parts = _split(url, {"http", "https"})
    if parts is None or parts.query or parts.fragment:
        raise ConfigError("the url is not the address of an API: write for example https://leveret.example.org.")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("the address of the API must not hold a password: it is proven by the token.")
    return url.rstrip("/")


def check_amqp_url(url: str) -> str:
    """The url. Raises ConfigError for what cannot be the address of a broker, with the user who asks."""
    parts = _split(url, {"amqp", "amqps"})
    if parts is None or not parts.username or not parts.password:
        raise ConfigError("the url is not the address of a broker: write amqp://USER:PASSWORD@HOST:5672/VHOST.")
    return url


def _split(url: str, schemes: set[str]) -> SplitResult | None:
    """Its parts, or None when it has not even a host."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in schemes and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return None
    return parts if usable and not _NOT_IN_A_URL.search(url) else None


def check_request_id(request_id: str) -> str:
    """Raises ValueError for what a request cannot be called."""
    from leveret.shared.headers import REQUEST_ID_WORDS, is_request_id

    if not is_request_id(request_id):
        raise ValueError(f"this is no request id: {REQUEST_ID_WORDS}")
    return request_id


def check_traceparent(traceparent: str) -> str:
    """Raises ValueError for what is no W3C trace context: Leveret would leave it out without a word."""
    from leveret.shared.headers import TRACEPARENT_PATTERN, traceparent_in

    if traceparent_in(traceparent) is None:
        raise ValueError(f"this is no traceparent: it must match {TRACEPARENT_PATTERN}")
    return traceparent
