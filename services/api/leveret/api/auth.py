"""Who is asking: an opaque bearer token means a role in a project."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import Depends, Request

from leveret.api import queries
from leveret.api.database import READ_TIMEOUT_S, Database, away
from leveret.api.problems import Refusal
from leveret.shared.documents import Role
from leveret.shared.errors import Code, Problem, fail

#: A token is believed so long without asking, in seconds: it works nowhere 5 s after it was revoked.
KEEP_S = 4.0
KEPT_MAX = 10_000
#: Tokens that are good for nothing are remembered too, but few and not for long: one may be made any moment.
REFUSED_KEEP_S = 2.0
REFUSED_KEPT_MAX = 1000
#: Questions about tokens at a time: who guesses tokens cannot take all connections to Postgres.
_LOOKUPS_MAX = 2
TOKEN_MAX_CHARS = 512

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who holds a token. `until` is when to ask for it again, in seconds of the monotonic clock."""

    project: str
    role: Role
    token_id: UUID
    token_name: str
    digest: bytes = field(repr=False)
    until: float

    @property
    def actor(self) -> str:
        """Who this is, for the record."""
        return f"token {self.token_name} of {self.project}"


class Tokens:
    """Knows tokens by their SHA-256, and remembers for a few seconds what it was told of them.

    No comparison in constant time is needed: what is looked up is a hash, and nobody can choose the first bytes of a
    hash of 256 random bits step by step. No slow hash is needed either, since there is nothing to guess.
    """

    def __init__(
        self, database: Database, *, keep_s: float = KEEP_S, on_use: Callable[[UUID], None] | None = None
    ) -> None:
        self._database = database
        self._keep_s = keep_s
        self._on_use = on_use
        self._known: OrderedDict[bytes, Identity] = OrderedDict()
        self._refused: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Identity]] = {}
        self._lookups = asyncio.Semaphore(_LOOKUPS_MAX)

    async def identify(self, token: str) -> Identity:
        """Raises LeveretError with `unauthenticated`, or `unavailable` when nobody can tell."""
        return await self._believe(hashlib.sha256(token.encode()).digest())

    async def confirm(self, identity: Identity) -> Identity:
        """The same, as far as it is known now: who waits for long is asked about again. Raises as `identify` does."""
        return await self._believe(identity.digest)

    async def _believe(self, digest: bytes) -> Identity:
        now = time.monotonic()
        identity = self._known.get(digest)
        if identity is None or identity.until <= now:
            refused = self._refused.get(digest)
            if refused is not None and now < refused[0]:
                raise _invalid(refused[1])
            identity = await self._ask(digest)
        if self._on_use is not None:
            self._on_use(identity.token_id)
        return identity

    async def _ask(self, digest: bytes) -> Identity:
        """One question at a time about one token, however many present it; who goes away does not end it."""
        asking = self._asking.get(digest)
        if asking is None:
            asking = self._asking[digest] = asyncio.create_task(self._look_up(digest), name="tokens.look_up")
            asking.add_done_callback(lambda done: self._asked(digest, done))
        return await asyncio.shield(asking)

    def _asked(self, digest: bytes, done: "asyncio.Task[Identity]") -> None:
        del self._asking[digest]
        if not done.cancelled():
            done.exception()  # those who wait for it have it too, if there still is one

    async def _look_up(self, digest: bytes) -> Identity:
        began = time.monotonic()
        try:
            async with asyncio.timeout(READ_TIMEOUT_S), self._lookups:
                row = await self._database.row(None, queries.IDENTIFY, digest)
        except TimeoutError as error:
            raise away(error) from error
        if row is None or row["revoked"] or row["expired"]:
            why = "is not known" if row is None else "was revoked" if row["revoked"] else "has expired"
            self._known.pop(digest, None)
            _keep(self._refused, digest, (began + REFUSED_KEEP_S, why), REFUSED_KEPT_MAX)
            raise _invalid(why)
        identity = Identity(
            project=row["project_id"],
            role=row["role"],
            token_id=row["id"],
            token_name=row["name"],
            digest=digest,
            until=began + self._keep_s,
        )
        _keep(self._known, digest, identity, KEPT_MAX)
        return identity


def _keep(kept: OrderedDict[bytes, Value], digest: bytes, value: Value, most: int) -> None:
    kept[digest] = value
    kept.move_to_end(digest)
    while len(kept) > most:
        kept.popitem(last=False)


def unauthenticated(message: str, *, error: str | None = None) -> Refusal:
    challenge = 'Bearer realm="leveret"' + (f', error="{error}"' if error else "")
    return Refusal(Problem.of(Code.UNAUTHENTICATED, message), headers={"WWW-Authenticate": challenge})


def _invalid(why: str) -> Refusal:
    return unauthenticated(f"This token {why}.", error="invalid_token")


class Asker:
    """Whoever waits for an answer: still there, and still allowed to have it."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tokens: Tokens = request.app.state.service.tokens
        self.identity: Identity = request.state.identity

    @property
    def good_for_s(self) -> float:
        """How long there is no need to confirm this."""
        return max(0.0, self.identity.until - time.monotonic())

    async def confirm(self) -> None:
        """Raises LeveretError `unauthenticated` when the token has ended meanwhile, or `unavailable`."""
        if not self.good_for_s:
            self.identity = await self._tokens.confirm(self.identity)

    async def is_gone(self) -> bool:
        return await self._request.is_disconnected()


async def may_read(request: Request) -> Identity:
    """A dependency: anybody with a good token."""
    given = request.headers.getlist("authorization") or [""]
    if len(given) > 1:
        raise unauthenticated("There is more than one token in this request.", error="invalid_request")
    scheme, _, token = given[0].partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise unauthenticated("There is no bearer token in this request.")
    if len(token) > TOKEN_MAX_CHARS:
        raise _invalid("is not known")
    identity: Identity = await request.app.state.service.tokens.identify(token)
    request.state.project = identity.project
    request.state.identity = identity
    return identity


async def may_write(identity: "Reader") -> Identity:
    """A dependency: anybody but a reader."""
    if identity.role == "reader":
        raise fail(Code.FORBIDDEN, "This token may only read.")
    return identity


async def may_administer(identity: "Reader") -> Identity:
    """A dependency: who looks after the whole installation."""
    if identity.role != "admin":
        raise fail(Code.FORBIDDEN, "Only an administrator's token may do this.")
    return identity


Reader = Annotated[Identity, Depends(may_read)]
Writer = Annotated[Identity, Depends(may_write)]
Administrator = Annotated[Identity, Depends(may_administer)]
