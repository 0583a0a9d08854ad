"""What must hold at rest, each as one query that returns the rows that break it."""

import asyncpg

QUERIES = {
    "host counters equal the sum of what is placed": """
        SELECT h.name, h.vcpus_used, h.memory_mib_used, h.disk_gib_used,
               coalesce(sum(v.vcpus), 0), coalesce(sum(v.memory_mib), 0), coalesce(sum(v.disk_gib), 0)
        FROM hosts h LEFT JOIN vms v ON v.host_id = h.id GROUP BY h.id
        HAVING (h.vcpus_used, h.memory_mib_used, h.disk_gib_used) IS DISTINCT FROM
               (coalesce(sum(v.vcpus), 0), coalesce(sum(v.memory_mib), 0), coalesce(sum(v.disk_gib), 0))""",
    "no host is overbooked": """
        SELECT name FROM hosts WHERE vcpus_used > vcpus OR memory_mib_used > memory_mib OR disk_gib_used > disk_gib""",
    "quota counters equal the sum over the project's VMs": """
        SELECT q.project_id, q.vms_used, q.vcpus_used, q.memory_mib_used, q.disk_gib_used
        FROM quotas q LEFT JOIN vms v ON v.project_id = q.project_id AND v.state <> 'deleted' GROUP BY q.project_id
        HAVING (q.vms_used, q.vcpus_used, q.memory_mib_used, q.disk_gib_used) IS DISTINCT FROM
               (count(v.id), coalesce(sum(v.vcpus), 0), coalesce(sum(v.memory_mib), 0),
                coalesce(sum(v.disk_gib), 0))""",
    "every project has a quota": """
        SELECT p.id FROM projects p LEFT JOIN quotas q ON q.project_id = p.id WHERE q.project_id IS NULL""",
    "nothing is placed for a deleted VM": "SELECT id FROM vms WHERE state = 'deleted' AND host_id IS NOT NULL",
    "addresses belong to living VMs, each to one, and both sides agree": """
        SELECT coalesce(a.vm_id, v.id), a.address, v.address
        FROM (SELECT * FROM addresses WHERE vm_id IS NOT NULL) a
        FULL JOIN (SELECT * FROM vms WHERE state <> 'deleted' AND address IS NOT NULL) v ON v.id = a.vm_id
        WHERE a.address IS DISTINCT FROM v.address""",
    "every error says why": """
        SELECT v.id FROM vms v WHERE state = 'error' AND (problem->>'code' IS NULL
           OR NOT EXISTS (SELECT FROM events e WHERE e.vm_id = v.id AND e.type = 'error'))""",
    "nothing is past its deadline by a minute": """
        SELECT id, state, step, deadline FROM vms WHERE deadline < now() - interval '60 s'""",
    "the log of every VM is a chain of moves from its first state to its present one": """
        WITH moves AS (
            SELECT vm_id, id, moved_from, state,
                   lag(state) OVER (PARTITION BY vm_id ORDER BY id) AS previous,
                   row_number() OVER (PARTITION BY vm_id ORDER BY id DESC) AS from_end
            FROM events WHERE moved_from IS NOT NULL
        )
        SELECT m.vm_id, m.id, m.moved_from, m.previous, m.state FROM moves m LEFT JOIN vms v ON v.id = m.vm_id
        WHERE (m.previous IS NOT NULL AND m.moved_from <> m.previous) OR (m.from_end = 1 AND m.state <> v.state)""",
    "events are numbered without a gap": """
        SELECT p.id, p.last_seq, count(e.seq), max(e.seq) FROM projects p LEFT JOIN events e ON e.project_id = p.id
        GROUP BY p.id HAVING p.last_seq <> count(e.seq) OR p.last_seq <> coalesce(max(e.seq), 0)""",
    "user-data is kept no longer than it is needed": """
        SELECT u.vm_id FROM vm_user_data u JOIN vms v ON v.id = u.vm_id WHERE v.guest_ready OR v.state = 'deleted'""",
    "no VM is both made and rejected": "SELECT r.vm_id FROM rejections r JOIN vms v ON v.id = r.vm_id",
}


async def violations(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[str, list[tuple[object, ...]]]:
    """The invariants that do not hold now, with the rows that break them."""
    found = {name: [tuple(row) for row in await connection.fetch(query)] for name, query in QUERIES.items()}
    return {name: rows for name, rows in found.items() if rows}
