"""Who speaks: the broker has checked the user of every message; here it becomes a project and a role."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from leveret.conductor.database import Pool, statement
from leveret.conductor.store import projects
from leveret.shared.bus import Delivery
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.messages import ADMINISTRATION

#: A broker user that was removed speaks for nobody after this time, in seconds.
KEEP_S = 2.0


@dataclass(frozen=True, slots=True)
class Sender:
    """Whose message it is. `by` is what the log says of it; a gateway speaks for whomever it names."""

    project: str
    by: str
    may_write: bool = True
    is_gateway: bool = False


class Identities:
    """Broker users and what they stand for, remembered for a moment. There are no more of them than the broker has."""

    def __init__(self, pool: Pool, gateways: Collection[str]) -> None:
        self._pool = pool
        self._gateways = frozenset(gateways)
        self._known: dict[str, tuple[float, projects.AmqpUser | None]] = {}

    async def of(self, batch: Sequence[Delivery]) -> list[Sender | LeveretError]:
        """The sender of each message, or why there is none to be told. Raises Paused when Postgres is away."""
        now = time.monotonic()
        asked = {d.user_id for d in batch if d.user_id} - self._gateways
        unknown = [user for user in asked if user not in self._known or self._known[user][0] < now]
        if unknown:
            async with statement(self._pool) as connection:
                found = await projects.amqp_users(connection, unknown)
            self._known.update((user, (now + KEEP_S, found.get(user))) for user in unknown)
        return [self._sender(delivery) for delivery in batch]

    def _sender(self, delivery: Delivery) -> Sender | LeveretError:
        user = delivery.user_id
        if delivery.strayed:
            return fail(Code.UNAUTHENTICATED, "This message did not come straight from its sender.")
        if not user:
            return fail(Code.UNAUTHENTICATED, "The property user_id is required; the broker checks it.")
        if user in self._gateways:
            project = delivery.header("project") or ""
            if not project and delivery.type not in ADMINISTRATION:
                return fail(Code.INVALID_REQUEST, "A gateway must name the project in the header project.")
            return Sender(project, delivery.header("actor") or user, is_gateway=True)
        known = self._known[user][1]
        if known is None:
            return fail(
                Code.FORBIDDEN,
                f"Broker user {user!r} speaks for no project.",
                hint="An administrator lets it: `leveret project add-amqp-user PROJECT USER`.",
            )
        return Sender(known.project_id, f"broker user {user}", may_write=known.role != "reader")
