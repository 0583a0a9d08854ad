"""Who is asking: an opaque bearer token means a role in a project."""

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Request

from leveret.api import queries
from leveret.api.database import Database
from leveret.api.problems import Refusal
from leveret.shared.errors import Code, Problem, fail

#: A revoked token works no longer than this, in seconds.
KEEP_S = 5.0
KEPT_MAX = 10_000
TOKEN_MAX_CHARS = 512

Role = Literal["admin", "member", "reader"]


@dataclass(frozen=True, slots=True)
class Identity:
    project: str
    role: Role
    token_name: str


class Tokens:
    """Knows tokens by their SHA-256, and remembers good ones for a few seconds.

    No comparison in constant time is needed: what is looked up is a hash, and nobody can choose the first bytes of a
    hash of 256 random bits step by step. No slow hash is needed either, since there is nothing to guess.
    """

    def __init__(self, database: Database, *, keep_s: float = KEEP_S) -> None:
        self._database = database
        self._keep_s = keep_s
        self._known: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()

    async def identify(self, token: str) -> Identity:
        """Raises LeveretError with `unauthenticated`, or `unavailable` when nobody can tell."""
        digest = hashlib.sha256(token.encode()).digest()
        kept = self._known.get(digest)
        if kept is not None and time.monotonic() < kept[0]:
            return kept[1]
        row = await self._database.row(queries.GET_IDENTITY, digest)
        if row is None or row["revoked"] or row["expired"]:
            self._known.pop(digest, None)
            why = "is not known" if row is None else "was revoked" if row["revoked"] else "has expired"
            raise unauthenticated(f"This token {why}.", error="invalid_token")
        identity = Identity(project=row["project_id"], role=row["role"], token_name=row["name"])
        self._known[digest] = (time.monotonic() + self._keep_s, identity)
        self._known.move_to_end(digest)
        while len(self._known) > KEPT_MAX:
            self._known.popitem(last=False)
        return identity


def unauthenticated(message: str, *, error: str | None = None) -> Refusal:
    challenge = 'Bearer realm="leveret"' + (f', error="{error}"' if error else "")
    return Refusal(Problem.of(Code.UNAUTHENTICATED, message), headers={"WWW-Authenticate": challenge})


async def may_read(request: Request) -> Identity:
    """A dependency: anybody with a good token."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise unauthenticated("There is no bearer token in this request.")
    if len(token) > TOKEN_MAX_CHARS:
        raise unauthenticated("This token is not known.", error="invalid_token")
    identity: Identity = await request.app.state.service.tokens.identify(token)
    request.state.project = identity.project
    return identity


async def may_write(identity: "Reader") -> Identity:
    """A dependency: anybody but a reader."""
    if identity.role == "reader":
        raise fail(Code.FORBIDDEN, "This token may only read.")
    return identity


Reader = Annotated[Identity, Depends(may_read)]
Writer = Annotated[Identity, Depends(may_write)]
