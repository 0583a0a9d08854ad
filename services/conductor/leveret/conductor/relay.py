"""The event relay: numbers committed events, wakes watchers, and publishes to the projects' exchanges."""

import asyncio
from typing import Any

import structlog

from leveret.conductor import metrics
from leveret.conductor.database import Pool, Row, transaction
from leveret.conductor.store import events
from leveret.shared import topology
from leveret.shared.bus import Envelope, Publisher
from leveret.shared.errors import LeveretError
from leveret.shared.messages import CloudEvent

log = structlog.get_logger()

BATCH = 500


class Relay:
    """Every conductor has one; an advisory lock lets one of them number at a time."""

    def __init__(self, pool: Pool, publisher: Publisher) -> None:
        self._pool = pool
        self._publisher = publisher

    async def relay_once(self) -> int:
        """Number and publish until nothing is left. Returns how many were published.

        Killed between publishing and noting it, the same events are published again: at least once, in order, each
        with its number. (A client drops what it has seen.)
        """
        while await self._number() == BATCH:
            continue
        published = batch = await self._publish_some()
        while batch >= BATCH:
            batch = await self._publish_some()
            published += batch
        return published

    async def _number(self) -> int:
        async with transaction(self._pool) as connection:
            return await events.number(connection, BATCH)

    async def _publish_some(self) -> int:
        async with transaction(self._pool) as connection:
            rows = await events.unpublished(connection, BATCH)
        if not rows:
            return 0
        try:
            for project in {row["project_id"] for row in rows}:
                await self._publisher.declare_exchange(topology.events_exchange(project))
            await asyncio.gather(*(self._publish(row) for row in rows))
        except LeveretError as error:
            log.warning("relay.paused", why=error.problem.message)
            return 0
        newest = {row["project_id"]: row["seq"] for row in rows}  # in order of seq: the last one stays
        async with transaction(self._pool) as connection:
            await events.mark_published(connection, newest)
        metrics.EVENTS_PUBLISHED.inc(len(rows))
        return len(rows)

    async def _publish(self, row: Row) -> None:
        exchange = topology.events_exchange(row["project_id"])
        # Nobody has to listen: an event without a queue is not an error.
        await self._publisher.publish(
            exchange.name, events.key_of(row), cloud_event(row), envelope=Envelope(), mandatory=False
        )


def cloud_event(row: dict[str, Any]) -> CloudEvent:
    """An event as the world sees it. Its id is the same however often it is sent."""
    return CloudEvent(
        id=f"{row['project_id']}-{row['seq']}",
        source=f"/v1/projects/{row['project_id']}",
        type=f"leveret.vm.{row['type']}.v1",
        subject=str(row["vm_id"]),
        time=row["at"].isoformat(),
        sequence=str(row["seq"]),
        data={"vm_id": str(row["vm_id"]), "name": row["vm_name"], "state": row["state"], **row["data"]},
    )
