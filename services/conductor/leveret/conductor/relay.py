"""The event relay: numbers committed events, wakes watchers, and publishes to the projects' exchanges."""

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog
from aio_pika.abc import AbstractConnection

from leveret.conductor import metrics
from leveret.conductor.database import Pool, Row, statement, transaction
from leveret.conductor.store import events, projects
from leveret.shared import topology
from leveret.shared.bus import Publisher, Refused
from leveret.shared.errors import LeveretError
from leveret.shared.fault_points import fault_point
from leveret.shared.loop import Loop
from leveret.shared.messages import CloudEvent

log = structlog.get_logger()

BATCH = 500


class Relay:
    """Every conductor has one; an advisory lock lets one of them number at a time."""

    def __init__(self, pool: Pool, publisher: Publisher) -> None:
        self._pool = pool
        self._publisher = publisher

    @fault_point("relay.furnish")
    async def furnish_once(self) -> None:
        """Have an exchange for every project before its first event, so that its clients can bind to it."""
        async with statement(self._pool) as connection:
            ids = await projects.open_ids(connection)
        for project in ids:
            try:
                await self._publisher.declare_exchange(topology.events_exchange(project))
            except LeveretError:
                return  # the broker is away, and its link says so; we come again

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

    @fault_point("relay.number")
    async def _number(self) -> int:
        async with transaction(self._pool) as connection:
            return await events.number(connection, BATCH)

    async def _publish_some(self) -> int:
        async with transaction(self._pool) as connection:
            rows = await events.unpublished(connection, BATCH)
        if not rows:
            return 0
        by_project: dict[str, list[Row]] = {}
        for row in rows:
            by_project.setdefault(row["project_id"], []).append(row)
        ends = await asyncio.gather(*(self._publish_project(project, own) for project, own in by_project.items()))
        newest = {project: seq for project, seq in zip(by_project, ends, strict=True) if seq is not None}
        await self._mark(newest)
        done: int = sum(row["seq"] <= newest.get(row["project_id"], 0) for row in rows)
        metrics.EVENTS_PUBLISHED.inc(done)
        return done

    @fault_point("relay.mark")
    async def _mark(self, newest: dict[str, int]) -> None:
        async with transaction(self._pool) as connection:
            await events.mark_published(connection, newest)

    @fault_point("relay.publish")
    async def _publish_project(self, project: str, rows: Sequence[Row]) -> int | None:
        """The number up to which the broker has this project's events, if it has any of these.

        A queue that is full refuses them by its owner's choice, which must not hold up anybody: it reads the log again.
        """
        exchange = topology.events_exchange(project)
        try:
            await self._publisher.declare_exchange(exchange)
        except LeveretError as error:
            log.warning("relay.paused", project=project, why=error.problem.message)
            return None
        publishing = (
            self._publisher.publish(exchange.name, events.key_of(row), cloud_event(row), mandatory=False)
            for row in rows
        )
        reached: int | None = None
        for row, result in zip(rows, await asyncio.gather(*publishing, return_exceptions=True), strict=True):
            if isinstance(result, Refused):
                metrics.EVENTS_REFUSED.inc()
            elif isinstance(result, LeveretError):
                log.warning("relay.paused", project=project, why=result.problem.message)
                break
            elif result is not None:
                raise result
            reached = row["seq"]
        return reached


class Waking:
    """A part of a link that wakes a loop whenever the link comes up: there may be something to make anew."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    async def attach(self, _connection: AbstractConnection) -> None:
        self._loop.wake()

    def detach(self) -> None:
        """Nothing to forget."""


def cloud_event(row: dict[str, Any]) -> CloudEvent:
    """An event as the world sees it. Its id is the same however often it is sent."""
    data, vm_id = dict(row["data"]), row["vm_id"]
    if vm_id is not None:
        data = {"vm_id": str(vm_id), "name": row["vm_name"], "state": row["state"], **data}
    return CloudEvent(
        specversion="1.0",
        datacontenttype="application/json",
        id=f"{row['project_id']}-{row['seq']}",
        source=f"/v1/projects/{row['project_id']}",
        type=f"leveret.{'' if vm_id is None else 'vm.'}{row['type']}.v1",
        subject=str(vm_id or row["project_id"]),
        time=row["at"].isoformat(),
        sequence=str(row["seq"]),
        data=data,
        traceparent=data.get("traceparent"),
    )
