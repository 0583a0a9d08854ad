"""The event log: appended to by every transaction, numbered by the relay."""

from collections.abc import Sequence
from typing import Any

from leveret.conductor.database import Connection, Row
from leveret.conductor.rows import Event, Fact

#: One relay at a time numbers events, or notes what is published: each writes the rows of many projects.
RELAY_LOCK = 0x6C6576656E7473

_NUMBER = """
WITH fresh AS (
    SELECT id, project_id, row_number() OVER (PARTITION BY project_id ORDER BY id) AS n
    FROM (SELECT id, project_id FROM events WHERE seq IS NULL ORDER BY id LIMIT $1) AS oldest
), counted AS (
    UPDATE projects SET last_seq = last_seq + f.n
    FROM (SELECT project_id, max(n) AS n FROM fresh GROUP BY project_id) AS f
    WHERE projects.id = f.project_id
    RETURNING projects.id, projects.last_seq - f.n AS base
)
UPDATE events SET seq = counted.base + fresh.n
FROM fresh JOIN counted ON counted.id = fresh.project_id
WHERE events.id = fresh.id
RETURNING events.project_id
"""

_UNPUBLISHED = """
SELECT e.id, e.project_id, e.vm_id, e.vm_name, e.seq, e.type, e.state, e.at, e.data
FROM projects p CROSS JOIN LATERAL (
    SELECT * FROM events WHERE project_id = p.id AND seq > p.published_seq ORDER BY seq LIMIT $1
) AS e
WHERE p.published_seq < p.last_seq
ORDER BY e.project_id, e.seq
"""


async def append(connection: Connection, entries: Sequence[Event | Fact]) -> None:
    if not entries:
        return
    await connection.execute(
        """INSERT INTO events (project_id, vm_id, vm_name, type, state, moved_from, data)
        SELECT * FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::jsonb[])""",
        *(list(column) for column in zip(*map(_columns, entries), strict=True)),
    )


async def append_refusals(connection: Connection, facts: Sequence[Fact]) -> None:
    """Facts of the type `rejected`; one that is in the log already, for the same request, is not said again."""
    if not facts:
        return
    rows = await connection.fetch(
        """SELECT w.n FROM unnest($1::text[], $2::text[], $3::uuid[]) WITH ORDINALITY AS w (project, request, vm, n)
        WHERE EXISTS (
            SELECT FROM events e
            WHERE e.project_id = w.project AND e.data->>'request_id' = w.request AND e.vm_id IS NOT DISTINCT FROM w.vm
              AND e.type = 'rejected' AND e.state IS NULL
        )""",
        [fact.project_id for fact in facts],
        [fact.data.get("request_id") for fact in facts],
        [fact.vm_id for fact in facts],
    )
    said = {row["n"] for row in rows}
    await append(connection, [fact for n, fact in enumerate(facts, start=1) if n not in said])


def _columns(entry: Event | Fact) -> tuple[Any, ...]:
    if isinstance(entry, Fact):
        return entry.project_id, entry.vm_id, None, entry.type, None, None, entry.data
    vm = entry.vm
    return vm.project_id, vm.id, vm.name, entry.type, vm.state, entry.moved_from, entry.data


async def number(connection: Connection, limit: int) -> int:
    """Give the oldest unnumbered events their numbers, and wake those who watch. Returns how many there were.

    Only what is committed is seen here, so a number that a watcher has read is never followed by a smaller one; the
    events of one VM keep their order, because the VM's row was locked while they were written.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1)", RELAY_LOCK)
    rows = await connection.fetch(_NUMBER, limit)
    for project in {row["project_id"] for row in rows}:
        await connection.execute("SELECT pg_notify('leveret_events', $1)", project)
    return len(rows)


async def unpublished(connection: Connection, limit: int) -> list[Row]:
    """Numbered events that are not known to be with the broker, at most `limit` a project."""
    return [dict(row) for row in await connection.fetch(_UNPUBLISHED, limit)]


async def mark_published(connection: Connection, newest: dict[str, int]) -> None:
    """Up to here the broker has them. Another relay may have come further: it never goes back."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", RELAY_LOCK)
    await connection.execute(
        """UPDATE projects SET published_seq = greatest(published_seq, n.seq)
        FROM unnest($1::text[], $2::bigint[]) AS n (id, seq) WHERE projects.id = n.id""",
        list(newest),
        list(newest.values()),
    )


def key_of(event: dict[str, Any]) -> str:
    """The routing key of an event: `vm.<id>.<state>`, `vm.<id>.rejected`, or its type when it is about no VM."""
    if event["vm_id"] is None:
        return str(event["type"])
    return f"vm.{event['vm_id']}.{event['state'] or event['type']}"
