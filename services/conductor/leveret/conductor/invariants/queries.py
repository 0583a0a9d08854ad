"""The rules of the database, each one query that returns the rows that break it, by their ids."""

HOST_COUNTERS = """
SELECT h.id AS host_id, h.name AS host, h.vcpus_used, coalesce(sum(v.vcpus), 0) AS vcpus_placed,
       h.memory_mib_used, coalesce(sum(v.memory_mib), 0) AS memory_mib_placed,
       h.disk_gib_used, coalesce(sum(v.disk_gib), 0) AS disk_gib_placed
FROM hosts h LEFT JOIN vms v ON v.host_id = h.id
GROUP BY h.id
HAVING (h.vcpus_used, h.memory_mib_used, h.disk_gib_used) IS DISTINCT FROM
       (coalesce(sum(v.vcpus), 0), coalesce(sum(v.memory_mib), 0), coalesce(sum(v.disk_gib), 0))
"""

HOST_CAPACITY = """
SELECT id AS host_id, name AS host, vcpus_used, vcpus, memory_mib_used, memory_mib, disk_gib_used, disk_gib
FROM hosts WHERE vcpus_used > vcpus OR memory_mib_used > memory_mib OR disk_gib_used > disk_gib
"""

PLACEMENT_BY_STATE = """
SELECT id AS vm_id, state, host_id FROM vms
WHERE (host_id IS NULL AND state IN ('building', 'running', 'stopped', 'deleting'))
   OR (host_id IS NOT NULL AND state IN ('pending', 'deleted'))
"""

# The sequence is read last: whatever a row of this snapshot has was given before.
PLACEMENT_TOKENS = """
SELECT id AS vm_id, host_id, token FROM vms WHERE (host_id IS NULL) <> (token IS NULL)
UNION ALL
SELECT id, host_id, token FROM (
    SELECT id, host_id, token, count(*) OVER (PARTITION BY token) AS times FROM vms WHERE token IS NOT NULL
) AS placed
WHERE times > 1 OR token > coalesce(pg_sequence_last_value('placement_tokens'::regclass), 0)
"""

# A zone counts as it was when a VM was placed there: a host that is moved to another one breaks nothing.
GROUPS_KEPT = """
WITH placed AS (
    SELECT g.project_id, g.name, g.policy, g.topology, v.id, v.seat, v.host_id
    FROM groups g JOIN vms v ON v.project_id = g.project_id AND v.group_name = g.name
    WHERE g.enforcement = 'hard' AND v.host_id IS NOT NULL
)
SELECT project_id, name AS group, array_agg(id::text ORDER BY id) AS vm_ids FROM placed
GROUP BY project_id, name, policy, topology
HAVING CASE
    WHEN policy = 'spread' THEN count(DISTINCT seat) < count(*)
        OR (topology = 'host' AND count(DISTINCT host_id) < count(*))
    ELSE topology = 'host' AND count(DISTINCT host_id) > 1
END
"""

QUOTA_COUNTERS = """
SELECT q.project_id, q.vms_used, count(v.id) AS vms, q.vcpus_used, coalesce(sum(v.vcpus), 0) AS vcpus,
       q.memory_mib_used, coalesce(sum(v.memory_mib), 0) AS memory_mib,
       q.disk_gib_used, coalesce(sum(v.disk_gib), 0) AS disk_gib
FROM quotas q LEFT JOIN vms v ON v.project_id = q.project_id AND v.state <> 'deleted'
GROUP BY q.project_id
HAVING (q.vms_used, q.vcpus_used, q.memory_mib_used, q.disk_gib_used) IS DISTINCT FROM
       (count(v.id), coalesce(sum(v.vcpus), 0), coalesce(sum(v.memory_mib), 0), coalesce(sum(v.disk_gib), 0))
"""

QUOTA_LIMITS = """
SELECT p.id AS project_id FROM projects p LEFT JOIN quotas q ON q.project_id = p.id
WHERE q.project_id IS NULL OR q.vms_used > q.vms_max OR q.vcpus_used > q.vcpus_max
   OR q.memory_mib_used > q.memory_mib_max OR q.disk_gib_used > q.disk_gib_max
"""

NAMES = """
SELECT project_id, name, array_agg(id::text ORDER BY id) AS vm_ids FROM vms WHERE state <> 'deleted'
GROUP BY project_id, name HAVING count(*) > 1
"""

ADDRESSES_UNIQUE = """
SELECT network, address::text, array_agg(id::text ORDER BY id) AS vm_ids FROM vms
WHERE state <> 'deleted' AND address IS NOT NULL
GROUP BY network, address HAVING count(*) > 1
"""

ADDRESSES_AGREE = """
SELECT coalesce(a.vm_id, v.id) AS vm_id, a.network, a.address::text AS given, v.address::text AS held
FROM (SELECT * FROM addresses WHERE vm_id IS NOT NULL) a
FULL JOIN (SELECT * FROM vms WHERE state <> 'deleted' AND address IS NOT NULL) v
  ON v.id = a.vm_id AND v.network = a.network
WHERE a.address IS DISTINCT FROM v.address
"""

DELETED_STAYS = """
SELECT v.id AS vm_id, v.project_id, v.state FROM vms v
JOIN tombstones t ON t.vm_id = v.id AND t.project_id = v.project_id
WHERE v.state <> 'deleted'
"""

MADE_OR_REJECTED = """
SELECT r.vm_id, r.project_id FROM rejections r JOIN vms v ON v.id = r.vm_id AND v.project_id = r.project_id
UNION ALL
SELECT vm_id, project_id FROM rejections WHERE problem->>'code' IS NULL
"""

ERRORS_EXPLAINED = """
SELECT v.id AS vm_id FROM vms v
WHERE v.state = 'error' AND (v.problem->>'code' IS NULL
   OR NOT EXISTS (SELECT FROM events e WHERE e.vm_id = v.id AND e.type = 'error'))
"""

WAITS_HAVE_DEADLINES = """
SELECT id AS vm_id, state, step FROM vms
WHERE deadline IS NULL AND (
    state IN ('pending', 'building', 'deleting')
    OR (state IN ('running', 'stopped') AND observed_generation < generation)
    OR (state = 'error' AND step = 'cleanup')
)
"""

# The sweeper looks at builds a little after their deadline, and not before it has listened for a while.
DEADLINES_KEPT = """
SELECT id AS vm_id, state, step, deadline::text FROM vms WHERE deadline < now() - interval '60 s'
"""

USER_DATA_WIPED = """
SELECT u.vm_id, v.state FROM vm_user_data u JOIN vms v ON v.id = u.vm_id
WHERE v.state = 'deleted' OR (v.guest_ready AND v.spec->>'on_host_failure' IS DISTINCT FROM 'restart')
"""

USER_DATA_NOWHERE_ELSE = """
SELECT id AS vm_id, 'vms.spec' AS place FROM vms WHERE spec ?| ARRAY['user_data', 'user_data_base64']
UNION ALL
SELECT vm_id, 'events.data' FROM events
WHERE data ?| ARRAY['user_data', 'user_data_base64', 'hash', 'secret', 'password']
"""

EVENTS_TOLD = """
SELECT project_id, NULL::bigint AS seq, count(*) AS events FROM events
WHERE seq IS NULL AND at < now() - interval '60 s' GROUP BY project_id
UNION ALL
SELECT p.id, min(e.seq), count(*) FROM projects p
JOIN events e ON e.project_id = p.id AND e.seq > p.published_seq AND e.at < now() - interval '60 s'
WHERE p.published_seq < p.last_seq GROUP BY p.id
"""

# A retry is accepted, too; that makes no VM.
ACCEPTED_ONCE = """
SELECT coalesce(v.id, e.vm_id) AS vm_id, coalesce(e.times, 0) AS times, v.id IS NOT NULL AS there
FROM vms v FULL JOIN (
    SELECT vm_id, count(*) AS times FROM events
    WHERE type = 'accepted' AND data->>'verb' IS DISTINCT FROM 'retry' GROUP BY vm_id
) e ON e.vm_id = v.id
WHERE v.id IS NULL OR e.times IS DISTINCT FROM 1
"""

# The first state is pending, every move begins where the last one ended, and the last one ends where the VM is.
MOVES_CHAINED = """
WITH moves AS (
    SELECT vm_id, id, moved_from, state,
           lag(state, 1, 'pending') OVER (PARTITION BY vm_id ORDER BY id) AS previous,
           row_number() OVER (PARTITION BY vm_id ORDER BY id DESC) AS from_end
    FROM events WHERE moved_from IS NOT NULL
)
SELECT m.vm_id, m.id AS event_id, m.previous, m.moved_from, m.state, v.state AS present
FROM moves m LEFT JOIN vms v ON v.id = m.vm_id
WHERE m.moved_from <> m.previous OR NOT vm_move_is_legal(m.moved_from, m.state)
   OR (m.from_end = 1 AND m.state <> v.state)
UNION ALL
SELECT v.id, NULL, NULL, NULL, NULL, v.state FROM vms v
WHERE v.state <> 'pending' AND NOT EXISTS (SELECT FROM moves m WHERE m.vm_id = v.id)
"""

# Events go with their VM: only behind the newest that was forgotten all of them must be there.
EVENTS_NUMBERED = """
SELECT p.id AS project_id, p.forgotten_seq, p.last_seq, count(e.seq) AS events
FROM projects p LEFT JOIN events e ON e.project_id = p.id AND e.seq > p.forgotten_seq
GROUP BY p.id
HAVING count(e.seq) <> p.last_seq - p.forgotten_seq OR count(DISTINCT e.seq) <> count(e.seq)
    OR coalesce(max(e.seq), p.forgotten_seq) <> p.last_seq
    OR p.published_seq > p.last_seq
"""

EVENTS_IN_ORDER = """
SELECT vm_id, id AS event_id, seq, before FROM (
    SELECT vm_id, id, seq, lag(seq) OVER (PARTITION BY vm_id ORDER BY id) AS before
    FROM events WHERE seq IS NOT NULL AND state IS NOT NULL
) AS numbered WHERE seq < before
"""
