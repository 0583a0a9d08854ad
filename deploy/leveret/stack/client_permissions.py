"""What the broker user of an AMQP client may touch: the one place that says so, for every kind of broker."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from leveret.stack.errors import StackError

Role = Literal["member", "reader"]

#: Limits of each client's broker user: a client that leaks connections must not take those of the services.
MAX_CONNECTIONS = 32
MAX_CHANNELS = 256  # on all of its connections together
CLIENT_LIMITS: Mapping[str, int] = {"max-connections": MAX_CONNECTIONS, "max-channels": MAX_CHANNELS}

#: What holds for every queue of a client, whatever it asks for: the broker's disk is everybody's. An unused queue is
#: deleted after a week, since a client may be gone for good.
CLIENT_POLICY_NAME = "leveret-clients"
CLIENT_POLICY: Mapping[str, object] = {
    "pattern": r"^client\.",
    "apply-to": "queues",
    "priority": 0,
    "definition": {"max-length": 100_000, "max-length-bytes": 64 * 1024 * 1024, "expires": 7 * 24 * 3600 * 1000},
}

#: What the configure pattern of every client begins with, and of nobody else.
CLIENT_PREFIX = r"^client\."

_USER = re.compile(r"[a-z][a-z0-9-]{0,61}")
_PROJECT = re.compile(r"[a-z][a-z0-9-]{0,61}")


@dataclass(frozen=True, slots=True)
class Permissions:
    """Regular expressions over the names of queues and exchanges, in RabbitMQ's own terms."""

    configure: str
    write: str
    read: str

    def as_tuple(self) -> tuple[str, str, str]:
        """Return (configure, write, read), the order of `rabbitmqctl set_permissions`."""
        return self.configure, self.write, self.read


def check_client(user: str, project: str | None = None) -> None:
    """Raise StackError when no client may have this name, or no project that one."""
    if not _USER.fullmatch(user) or user.startswith("leveret"):
        raise StackError(
            f"'{user}' cannot be the broker user of a client: use small letters, digits and '-', a letter first, at "
            "most 62 characters, and no name that begins with 'leveret'"
        )
    if project is not None and not _PROJECT.fullmatch(project):
        raise StackError(f"'{project}' cannot be a project: use small letters, digits and '-', a letter first")


def client_permissions(user: str, project: str, role: Role) -> Permissions:
    """Return what a client may touch: its own `client.<user>.*`, its project's events, and (members) the requests.

    RabbitMQ searches with these patterns, so each is anchored and every name in it is quoted. `write` to an own queue
    is what a binding needs; the default exchange is in none of them.
    """
    own = rf"client\.{re.escape(user)}\..*"
    written = rf"leveret\.requests|{own}" if role == "member" else own
    return Permissions(
        configure=rf"^{own}$",
        write=rf"^({written})$",
        read=rf"^(leveret\.events\.{re.escape(project)}|{own})$",
    )
