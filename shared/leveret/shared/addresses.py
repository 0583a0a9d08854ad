"""The addresses of one broker: a cluster has one for each of its nodes."""

import re
from urllib.parse import unquote, urlsplit

#: A comma may stand in a password; what begins another address may not.
_NEXT = re.compile(r"\s*,\s*(?=amqps?://)")


def addresses_in(urls: str) -> tuple[str, ...]:
    """The addresses in a list with commas between them. Raises ValueError when they are not those of one user."""
    addresses = tuple(address for address in _NEXT.split(urls.strip()) if address)
    if len({user_of(address) for address in addresses}) > 1:
        raise ValueError("every address of the broker must name the same user")
    return addresses


def user_of(address: str) -> str:
    """The broker user that an address names, as the broker knows it."""
    return unquote(urlsplit(address).username or "guest")
