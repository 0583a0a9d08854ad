"""Heartbeats: registration, leases, and the cheap question whether a host and the rows agree."""

import math
import time
from collections.abc import Sequence
from uuid import UUID

import structlog

from leveret.conductor import dispatch
from leveret.conductor.database import Pool, transaction
from leveret.conductor.dispatch import Command
from leveret.conductor.store import hosts, vms
from leveret.shared.bus import DONE, Delivery, Outcome, Publisher, Reject
from leveret.shared.errors import LeveretError
from leveret.shared.fault_points import fault_point, take
from leveret.shared.messages import Heartbeat, ListVms

log = structlog.get_logger()


#: A difference that lasts, such as a domain that nobody knows, is asked about no oftener than this.
ASK_AGAIN_S = 60.0


class HeartbeatHandler:
    """Handles `leveret.conductor.beats`."""

    def __init__(self, pool: Pool, publisher: Publisher) -> None:
        self._pool = pool
        self._publisher = publisher
        self._differing: dict[UUID, tuple[tuple[str, str], float]] = {}

    async def handle(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        newest: dict[UUID, Heartbeat] = {}
        for delivery in batch:
            try:
                beat = delivery.decoded(among={"host.heartbeat": Heartbeat})
                assert isinstance(beat, Heartbeat)
                if beat.host_id not in newest or newest[beat.host_id].epoch <= beat.epoch:
                    newest[beat.host_id] = beat
                outcomes.append(DONE)
            except LeveretError as error:
                outcomes.append(Reject(error.problem))
        if newest:
            await self._take(newest)
        return outcomes

    async def _take(self, newest: dict[UUID, Heartbeat]) -> None:
        expected, unclean = await self._register(newest)
        asked = [
            host_id
            for host_id, beat in newest.items()
            if self._is_news(host_id, beat.digest, expected[host_id]) or host_id in unclean
        ]
        if asked:
            commands = [Command(host_id, ListVms()) for host_id in asked]
            await take("heartbeats.send", dispatch.send, self._publisher, commands)
            self._note_asked(asked)

    @fault_point("heartbeats.take")
    async def _register(self, newest: dict[UUID, Heartbeat]) -> tuple[dict[UUID, str], set[UUID]]:
        """Renew the leases. Returns which digests are expected, and which hosts are fenced and not yet clean."""
        async with transaction(self._pool) as connection:
            await hosts.register(connection, list(newest.values()))
            if passed := await vms.outrun_tokens(connection, max(beat.newest_token for beat in newest.values())):
                log.warning("tokens.passed_over", count=passed, note="hosts have them: the database is an older copy")
            fenced = await hosts.fenced(connection, list(newest))
            return await hosts.digests(connection, list(newest)), {
                host_id for host_id, host in fenced.items() if not host.is_clean
            }

    def _is_news(self, host_id: UUID, digest: str, expected: str) -> bool:
        """Whether host and rows have differed in the same way twice running, and that was not asked about lately.

        A host in the middle of work differs for a moment, each time in another way.
        """
        if digest == expected:
            self._differing.pop(host_id, None)
            return False
        difference, now = (digest, expected), time.monotonic()
        before, asked_at = self._differing.get(host_id, (None, -math.inf))
        if before != difference:
            self._differing[host_id] = (difference, -math.inf)
            return False
        return now - asked_at >= ASK_AGAIN_S

    def _note_asked(self, asked: Sequence[UUID]) -> None:
        """Only what was said counts: had that failed, the same heartbeats would come again, and ask anew."""
        for host_id in asked:
            if host_id in self._differing:
                self._differing[host_id] = (self._differing[host_id][0], time.monotonic())
