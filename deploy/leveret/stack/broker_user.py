"""An account at a private broker, in the form in which a definitions file holds it."""

import base64
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

VHOST = "leveret"


@dataclass(frozen=True, slots=True)
class BrokerUser:
    """A broker account in the one virtual host, with the patterns of the names it may touch."""

    password: str
    password_hash: str
    configure: str
    write: str
    read: str
    tags: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)

    def definition(self, name: str) -> dict[str, object]:
        """Return the account as a definitions file holds it: with the hash only."""
        return {
            "name": name,
            "password_hash": self.password_hash,
            "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": list(self.tags),
            "limits": dict(self.limits),
        }

    def permission(self, name: str) -> dict[str, object]:
        """Return the permissions as a definitions file holds them."""
        return {
            "user": name,
            "vhost": VHOST,
            "configure": self.configure,
            "write": self.write,
            "read": self.read,
        }


def hash_password(password: str) -> str:
    """Return the salted SHA-256 form that RabbitMQ stores (its documentation, "Password hashing")."""
    salt = secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
