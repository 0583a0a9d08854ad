"""Users for AMQP clients at a broker that somebody else runs, through its management HTTP API.

`leveret.stack.rabbitmq` does the same for a broker of our own.
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

import httpx2

from leveret.stack.client_permissions import (
    CLIENT_LIMITS,
    CLIENT_POLICY,
    CLIENT_POLICY_NAME,
    Permissions,
    Role,
    check_client,
    client_permissions,
)
from leveret.stack.errors import StackError

TIMEOUT_S = 30.0
_PAGE = 500


class BrokerAdmin:
    """An administrator at the management API of a RabbitMQ: `http(s)://admin:password@host:15672[/vhost]`.

    The virtual host may also be given apart, as it is; in the URL it is percent-encoded. Use this in a
    `with`. Everything may be done again: half of an operation that failed is completed by the next.
    """

    def __init__(self, url: str, vhost: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise StackError(f"the broker's management URL is not one: {error}") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname or not parts.username or not parts.password:
            raise StackError("the broker's management URL must look like https://ADMIN:PASSWORD@HOST:15671/VHOST")
        self.vhost = vhost or unquote(parts.path.strip("/")) or "/"
        self._host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        origin = f"{parts.scheme}://{self._host}" + (f":{port}" if port else "")
        self._told = origin  # for errors: without the password
        self._http = httpx2.Client(
            base_url=f"{origin}/api",
            auth=(unquote(parts.username), unquote(parts.password)),
            timeout=TIMEOUT_S,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def add_client(self, user: str, project: str, role: Role = "member", *, rotate: bool = False) -> str | None:
        """Make a broker user for an AMQP client of a project, and return its AMQP URL.

        One that is there already keeps its password, which nobody can read: then None is returned, unless `rotate`
        gives it a new one. One whose project or role changes starts anew: its connections are closed and its queues
        are gone. Raises StackError when the name may not be a client's or is another's, or the API refuses.
        """
        check_client(user, project)
        wanted = client_permissions(user, project, role)
        known = self._client(user)
        if known is not None and self._permissions(user) not in {None, wanted}:
            self.remove_client(user)
        self._put(f"policies/{self._v}/{CLIENT_POLICY_NAME}", CLIENT_POLICY)
        password = None if known is not None and not rotate else secrets.token_urlsafe(24)
        # The hash that it had, where the password is to stay: a user that was deleted above is made anew with it.
        secret = {"password": password} if password else {k: known[k] for k in _HASHES} if known else {}
        self._put(f"users/{_q(user)}", {"tags": "", **secret})
        for limit, value in CLIENT_LIMITS.items():
            self._put(f"user-limits/{_q(user)}/{limit}", {"value": value})
        configure, write, read = wanted.as_tuple()
        self._put(f"permissions/{self._v}/{_q(user)}", {"configure": configure, "write": write, "read": read})
        return self._address(user, password) if password else None

    def remove_client(self, user: str) -> None:
        """Delete a client's broker user, close its connections, delete its queues and exchanges. Unknown ones are fine.

        Raises StackError when the user is no client's, or the API refuses.
        """
        check_client(user)
        if self._client(user) is not None:
            self._delete(f"users/{_q(user)}")
        for kind in ("queues", "exchanges"):
            for name in self._owned(kind, user):
                self._delete(f"{kind}/{self._v}/{_q(name)}")

    @property
    def _v(self) -> str:
        return _q(self.vhost)

    def _client(self, user: str) -> dict[str, Any] | None:
        """The user as the broker has it; None when there is none. Raises StackError when it is not a client's."""
        known = self._get(f"users/{_q(user)}")
        if known is None:
            return None
        permissions = self._permissions(user)
        own = client_permissions(user, "any", "member").configure
        elsewhere = [p for p in self._get(f"users/{_q(user)}/permissions") or () if p["vhost"] != self.vhost]
        if known.get("tags") or elsewhere or (permissions is not None and permissions.configure != own):
            raise StackError(
                f"the broker user '{user}' is there already and is not a client of Leveret: choose another"
            )
        return dict(known)

    def _permissions(self, user: str) -> Permissions | None:
        found = self._get(f"permissions/{self._v}/{_q(user)}")
        return Permissions(found["configure"], found["write"], found["read"]) if found else None

    def _owned(self, kind: str, user: str) -> Iterator[str]:
        """The names of a client's queues or exchanges, page by page as they are deleted."""
        pattern = rf"^client\.{re.escape(user)}\."
        while True:
            page = self._get(
                f"{kind}/{self._v}?page=1&page_size={_PAGE}&name={_q(pattern)}&use_regex=true&disable_stats=true"
            )
            names = [item["name"] for item in (page or {}).get("items", ())]
            yield from names
            if len(names) < _PAGE:
                return

    def _address(self, user: str, password: str) -> str:
        """The AMQP URL, at the host of this API and the port on which the broker says it listens."""
        listeners = (self._get("overview") or {}).get("listeners", ())
        ports = {listener["protocol"]: listener["port"] for listener in listeners}
        scheme = "amqps" if "amqp/ssl" in ports and "amqp" not in ports else "amqp"
        port = ports.get("amqp/ssl" if scheme == "amqps" else "amqp", 5672)
        return f"{scheme}://{user}:{_q(password)}@{self._host}:{port}/{self._v}"

    def _get(self, path: str) -> Any:
        """What is there; None when there is nothing."""
        with self._explained(path):
            answer = self._http.get(path)
            return None if answer.status_code == 404 else _good(answer, path).json()

    def _put(self, path: str, content: Mapping[str, Any]) -> None:
        with self._explained(path):
            _good(self._http.put(path, json=dict(content)), path)

    def _delete(self, path: str) -> None:
        with self._explained(path):
            answer = self._http.delete(path)
            if answer.status_code != 404:
                _good(answer, path)

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise StackError(
                f"the broker's management API at {self._told} cannot be reached ({error}): is the plugin "
                "rabbitmq_management enabled there, and the port that of the API (15672)?"
            ) from error
        except ValueError as error:
            raise StackError(
                f"{self._told} does not answer as RabbitMQ's management API does ({path}): check the URL"
            ) from error


#: What the API shows of a password.
_HASHES = ("password_hash", "hashing_algorithm")


def _q(text: str) -> str:
    return quote(text, safe="")


def _good(answer: httpx2.Response, path: str) -> httpx2.Response:
    """The answer, when it is a good one. Raises StackError with what to do when not."""
    if answer.is_success:
        return answer
    hint = {
        401: "check the user and the password in the URL; the user needs the tag `administrator`",
        403: "the user needs the tag `administrator`",
        404: "check that the virtual host in the URL exists",
        400: "check that the virtual host in the URL exists",
    }.get(answer.status_code, "look at the broker's log")
    said = answer.text.strip()[:200]
    raise StackError(f"the broker's management API answered {answer.status_code} to {path}: {hint} ({said})")
