"""Guests that `leveret down` had to shut down, and that the next `leveret up` starts again."""

import asyncio
import json
import time
from dataclasses import dataclass
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg

from leveret.shared import topology
from leveret.shared.bus import Caller, Link
from leveret.shared.documents import StartVm
from leveret.shared.errors import LeveretError
from leveret.shared.ids import new_id
from leveret.shared.messages import TYPE_OF, Verdict
from leveret.stack.bootstrap import DATABASE, OWNER
from leveret.stack.errors import StackError
from leveret.stack.layout import Layout, write_private
from leveret.stack.postgres import Postgres

#: By then a host has reported what it has.
_REPORTED_S = 30.0

_VERDICT_S = 10.0
_LOOK_S = 0.2

_NOTED = """
SELECT id, name, project_id, state FROM vms
WHERE id = ANY($1) AND desired = 'running' AND state IN ('running', 'stopped') ORDER BY id
"""
_RUNNING = """
SELECT v.id FROM vms v JOIN hosts h ON h.id = v.host_id
WHERE v.state = 'running' AND v.desired = 'running' AND h.virt_type <> 'simulated'
"""


async def note(layout: Layout) -> None:
    """Remember which VMs run. Those that were noted and not yet resumed stay noted."""
    noted = await _running(layout) | set(_noted(layout))
    if noted:
        write_private(layout.resume, json.dumps(sorted(noted)))


async def _running(layout: Layout) -> set[str]:
    """None when nobody can tell: then Postgres is stopped, or was never furnished, and no service runs either."""
    try:
        connection = await asyncpg.connect(Postgres(layout.postgres).dsn(OWNER, DATABASE))
        try:
            return {str(row["id"]) for row in await connection.fetch(_RUNNING)}
        finally:
            await connection.close()
    except (StackError, OSError, asyncpg.PostgresError):
        return set()


@dataclass(frozen=True, slots=True)
class Resumed:
    """The names of the guests that were asked to start again, and of those of which nobody could be asked."""

    started: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


async def resume(layout: Layout, amqp_url: str) -> Resumed:
    """Start those that were noted, of whatever project. Those of which nothing was heard in time stay noted.

    `amqp_url` is a gateway's: there is no token that may ask for VMs of every project.
    """
    noted = [UUID(vm_id) for vm_id in _noted(layout)]
    caller = Caller(urlsplit(amqp_url).username or "")
    link = Link(amqp_url, "leveret-up")
    link.add(caller)
    link.start()
    connection = await asyncpg.connect(Postgres(layout.postgres).dsn(OWNER, DATABASE))
    try:
        await link.wait_up(_REPORTED_S)
        rows = await _when_stopped(connection, noted)
        started = [row["name"] for row in rows if row["state"] == "stopped" and await _start(caller, row)]
    finally:
        await connection.close()
        await link.stop()
    left = {row["id"]: row["name"] for row in rows if row["state"] == "running" or row["name"] not in started}
    if left:
        write_private(layout.resume, json.dumps(sorted(map(str, left))))
    else:
        layout.resume.unlink(missing_ok=True)
    return Resumed(tuple(started), tuple(left.values()))


async def _when_stopped(connection: "asyncpg.Connection[asyncpg.Record]", ids: list[UUID]) -> list[asyncpg.Record]:
    """The noted VMs that should run, once their hosts have said that they do not, or after a while."""
    deadline = time.monotonic() + _REPORTED_S
    while True:
        rows = await connection.fetch(_NOTED, ids)
        if all(row["state"] == "stopped" for row in rows) or time.monotonic() > deadline:
            return rows
        await asyncio.sleep(_LOOK_S)


async def _start(caller: Caller, row: asyncpg.Record) -> bool:
    """Whether it was accepted, or there was nothing to do any more."""
    headers = {
        "vm_id": str(row["id"]),
        "request_id": str(new_id()),
        "project": row["project_id"],
        "actor": "leveret up",
    }
    try:
        verdict = await caller.ask(
            topology.REQUESTS.name, TYPE_OF[StartVm], StartVm(), headers=headers, wait_s=_VERDICT_S
        )
    except LeveretError:
        return False
    return isinstance(verdict, Verdict) and verdict.accepted


def _noted(layout: Layout) -> list[str]:
    try:
        noted: list[str] = json.loads(layout.resume.read_text())
    except FileNotFoundError:
        return []
    return noted
