"""Heartbeats: registration, leases, and the cheap question whether a host and the rows agree."""

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
        self._asked: dict[UUID, tuple[str, str, float]] = {}

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
        """Whether host and rows differ, and not just as they did when the host was last asked.

        A host in the middle of work differs for a moment: asking for its list once too often is cheap.
        """
        if digest == expected:
            self._asked.pop(host_id, None)
            return False
        before = self._asked.get(host_id)
        now = time.monotonic()
        if before and before[:2] == (digest, expected) and now - before[2] < ASK_AGAIN_S:
            return False
        self._asked[host_id] = (digest, expected, now)
        return True
