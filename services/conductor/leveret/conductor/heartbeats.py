"""Heartbeats: registration, leases, and the cheap question whether a host and the rows agree."""

import math
import time
from collections.abc import Sequence
from uuid import UUID

import structlog

from leveret.conductor import dispatch
from leveret.conductor.database import Pool, transaction
from leveret.conductor.dispatch import Command
from leveret.conductor.store import hosts
from leveret.shared.bus import DONE, Delivery, Outcome, Publisher, Reject
from leveret.shared.errors import LeveretError
from leveret.shared.messages import Heartbeat, ListVms

log = structlog.get_logger()


#: A difference that lasts, such as a domain that nobody knows, is asked about no oftener than this.
ASK_AGAIN_S = 60.0


class HeartbeatHandler:
    """Handles `leveret.conductor.heartbeats`."""

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
        async with transaction(self._pool) as connection:
            await hosts.register(connection, list(newest.values()))
            expected = await hosts.digests(connection, list(newest))
        asked = [host_id for host_id, beat in newest.items() if self._is_news(host_id, beat.digest, expected[host_id])]
        await dispatch.send(self._publisher, [Command(host_id, ListVms()) for host_id in asked])

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
        if now - asked_at < ASK_AGAIN_S:
            return False
        self._differing[host_id] = (difference, now)
        return True
