"""Dropping what nobody asks for any more, a bounded number of rows at a time."""

from leveret.conductor.database import Connection, count_of

BATCH = 1000

_OLD = "at < now() - make_interval(days => $1)"


def _delete(table: str, key: str) -> str:
    return f"DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM {table} WHERE {_OLD} LIMIT $2)"


_SIMPLE = (
    _delete("rejections", "vm_id, project_id"),
    _delete("tombstones", "vm_id, project_id"),
    _delete("orders", "project_id, request_id, digest"),
)
# Events go with their VM. What happened lately to the id of a VM that is long gone is no part of that VM's life.
_VMS = f"""
WITH gone AS (
    DELETE FROM vms WHERE id IN (
        SELECT id FROM vms WHERE state = 'deleted' AND updated_at < now() - make_interval(days => $1) LIMIT $2
    ) RETURNING id
), old AS (
    DELETE FROM events WHERE {_OLD} AND vm_id IN (SELECT id FROM gone) AND seq <= (
        SELECT published_seq FROM projects WHERE projects.id = events.project_id
    ) RETURNING project_id, seq
), marked AS (
    UPDATE projects SET forgotten_seq = greatest(forgotten_seq, o.seq)
    FROM (SELECT project_id, max(seq) AS seq FROM old GROUP BY project_id ORDER BY project_id) AS o
    WHERE projects.id = o.project_id
)
SELECT count(*) FROM gone
"""
_REFUSALS = f"""
WITH old AS (
    DELETE FROM events WHERE id IN (
        SELECT e.id FROM events e JOIN projects p ON p.id = e.project_id
        WHERE e.type = 'rejected' AND e.state IS NULL AND e.{_OLD} AND e.seq <= p.published_seq LIMIT $2
    ) RETURNING project_id, seq
), marked AS (
    UPDATE projects SET forgotten_seq = greatest(forgotten_seq, o.seq)
    FROM (SELECT project_id, max(seq) AS seq FROM old GROUP BY project_id ORDER BY project_id) AS o
    WHERE projects.id = o.project_id
)
SELECT count(*) FROM old
"""


async def forget(connection: Connection, days: int) -> int:
    """Drop a batch of what is older than this: refusals, tombstones, orders, deleted VMs with their events.

    Returns how many of the kind of which there were most: as many as BATCH, and there may be more.
    """
    counts = [count_of(await connection.execute(statement, days, BATCH)) for statement in _SIMPLE]
    counts += [await connection.fetchval(statement, days, BATCH) for statement in (_VMS, _REFUSALS)]
    return max(counts)
