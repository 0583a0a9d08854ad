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
    """Record refused creates. An id that is refused again keeps the newest reason; a living VM's is not touched."""
    if rejections:
        await connection.executemany(
            """INSERT INTO rejections (vm_id, project_id, request_id, problem)
            SELECT $1, $2, $3, $4 WHERE NOT EXISTS (SELECT FROM vms WHERE id = $1)
            ON CONFLICT (vm_id) DO UPDATE SET request_id = excluded.request_id, problem = excluded.problem, at = now()
            WHERE rejections.project_id = excluded.project_id""",
            [(r.vm_id, r.project_id, r.request_id, told(r.problem)) for r in rejections],
        )


async def forgive(connection: Connection, vm_ids: Sequence[UUID]) -> None:
    """These ids have VMs now: what was refused before is no longer news."""
    if vm_ids:
        await connection.execute("DELETE FROM rejections WHERE vm_id = ANY($1)", list(vm_ids))


async def bury(connection: Connection, ids: Sequence[tuple[UUID, str]]) -> None:
    """Remember ids that were deleted before they were created."""
    if ids:
        await connection.execute(
            """INSERT INTO tombstones (vm_id, project_id)
            SELECT * FROM unnest($1::uuid[], $2::text[]) ON CONFLICT DO NOTHING""",
            [vm_id for vm_id, _ in ids],
            [project for _, project in ids],
        )


async def forget(connection: Connection, days: int) -> None:
    """Drop what is older than this, and deleted VMs with their events."""
    await connection.execute("DELETE FROM rejections WHERE at < now() - make_interval(days => $1)", days)
    await connection.execute("DELETE FROM tombstones WHERE at < now() - make_interval(days => $1)", days)
    await connection.execute(
        """WITH gone AS (
            DELETE FROM vms WHERE id IN (
                SELECT id FROM vms WHERE state = 'deleted' AND updated_at < now() - make_interval(days => $1) LIMIT 1000
            ) RETURNING id
        ), old AS (
            DELETE FROM events WHERE seq IS NOT NULL AND (
                vm_id IN (SELECT id FROM gone)
                OR (type = 'rejected' AND state IS NULL AND at < now() - make_interval(days => $1))
            ) RETURNING project_id, seq
        )
        UPDATE projects SET forgotten_seq = greatest(forgotten_seq, o.seq)
        FROM (SELECT project_id, max(seq) AS seq FROM old GROUP BY project_id) AS o WHERE projects.id = o.project_id""",
        days,
    )
