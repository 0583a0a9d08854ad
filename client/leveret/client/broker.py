"""The broker as a client meets it: its address, and a link to it that says when knocking again is of no use."""

import time
from urllib.parse import unquote, urlsplit

from aiormq.exceptions import AuthenticationError, InvalidFrameError, ProbableAuthenticationError

from leveret.client.errors import ApiError, refusal
from leveret.shared.bus import Link

#: What another attempt would end with too. RabbitMQ tells of a wrong password as little as of an unknown user.
_REFUSALS = (AuthenticationError, ProbableAuthenticationError)
_LOOK_S = 0.1


def user_of(url: str) -> str:
    return unquote(urlsplit(url).username or "")


def shown(url: str) -> str:
    """A broker's address without the password in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


async def is_up(link: Link, timeout_s: float) -> bool:
    """Whether the link came up within this time. Raises Denied as soon as the broker refuses who asks."""
    ends_at = time.monotonic() + timeout_s
    while not await link.wait_up(max(0.0, min(_LOOK_S, ends_at - time.monotonic()))):
        if denied := denial(link):
            raise denied
        if time.monotonic() >= ends_at:
            return False
    return True


def denial(link: Link) -> ApiError | None:
    """Why the broker lets nobody in with this password; None while it may be that it is away."""
    if not isinstance(link.last_error, _REFUSALS):
        return None
    return refusal(
        "unauthenticated",
        "The broker does not know this user, or not with this password.",
        hint="Check the url; `leveret project add-amqp-user --rotate` gives the user another password.",
    )


def why_down(link: Link) -> str:
    """What is known of a broker that cannot be used: it is never the last word."""
    # A virtual host that is not there, not allowed, or not up again yet: all of them are a Close in place of an OpenOk.
    if isinstance(link.last_error, InvalidFrameError):
        return "the broker is there, but not this virtual host, or not for this user"
    return "there is no connection to the broker"
