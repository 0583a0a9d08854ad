"""Guests that `leveret down` had to shut down, and that the next `leveret up` starts again."""

import asyncio
import json
from uuid import UUID

import asyncpg

from leveret.client import ClientError, Leveret
from leveret.shared.documents import VmView
from leveret.stack.bootstrap import DATABASE, OWNER
from leveret.stack.errors import StackError
from leveret.stack.layout import Layout, write_private
from leveret.stack.postgres import Postgres

#: By then a host has reported what it has.
_REPORTED_S = 30.0

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


async def resume(layout: Layout, url: str, token: str) -> list[VmView]:
    """Start those that were noted and are stopped. Killed half-way, the next time does the rest."""
    noted = _noted(layout)
    async with Leveret(url, token) as leveret:
        started = await asyncio.gather(*(_start(leveret, UUID(vm_id)) for vm_id in noted))
    layout.resume.unlink(missing_ok=True)
    return [vm for vm in started if vm is not None]


async def _start(leveret: Leveret, vm_id: UUID) -> VmView | None:
    """None when there is nothing to start any more: it was deleted, or runs, or its host does not say."""
    try:
        vm = await leveret.wait(vm_id, "stopped", timeout_s=_REPORTED_S)
        await leveret.start(vm_id)
    except ClientError:
        return None
    return vm


def _noted(layout: Layout) -> list[str]:
    try:
        noted: list[str] = json.loads(layout.resume.read_text())
    except FileNotFoundError:
        return []
    return noted
