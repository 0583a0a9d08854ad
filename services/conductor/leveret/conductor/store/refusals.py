"""Requests that made no VM: rejected creates, and ids that were deleted before they were created."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from leveret.conductor.database import Connection
from leveret.conductor.rows import told
from leveret.shared.errors import Problem


@dataclass(frozen=True, slots=True)
class Rejection:
    vm_id: UUID
    project_id: str
    request_id: str
    problem: Problem


async def reject(connection: Connection, rejections: Sequence[Rejection]) -> None:
    """Record refused creates. An id that is refused again keeps the newest reason; one that has a VM has none."""
    if rejections:
        await connection.executemany(
            """INSERT INTO rejections (vm_id, project_id, request_id, problem)
            SELECT $1, $2, $3, $4 WHERE NOT EXISTS (SELECT FROM vms WHERE id = $1 AND project_id = $2)
            ON CONFLICT (vm_id, project_id)
            DO UPDATE SET request_id = excluded.request_id, problem = excluded.problem, at = now()""",
            [(r.vm_id, r.project_id, r.request_id, told(r.problem)) for r in rejections],
        )


async def forgive(connection: Connection, ids: Sequence[tuple[UUID, str]]) -> None:
    """These ids have VMs in their projects now: what was refused there before is no longer news."""
    if ids:
        await connection.execute(
            "DELETE FROM rejections WHERE (vm_id, project_id) IN (SELECT * FROM unnest($1::uuid[], $2::text[]))",
            [vm_id for vm_id, _ in ids],
            [project for _, project in ids],
        )


async def bury(connection: Connection, ids: Sequence[tuple[UUID, str]]) -> None:
    """Remember ids that were deleted before they were created."""
    if ids:
        await connection.execute(
            """INSERT INTO tombstones (vm_id, project_id)
            SELECT * FROM unnest($1::uuid[], $2::text[]) ON CONFLICT DO NOTHING""",
            [vm_id for vm_id, _ in ids],
            [project for _, project in ids],
        )
