"""Every SQL statement of the API. All of them read; every one of a VM or an event is bound to its project.

Postgres would show them no other project's rows anyway; saying it twice costs nothing.
"""

#: Whose token it is, by the SHA-256 of what was presented. Its validity is judged by the database's clock.
IDENTIFY = "SELECT id, project_id, role, name, revoked, expired FROM identify($1)"

#: What its holder may know of a token.
GET_OWN_TOKEN = "SELECT expires_at FROM tokens WHERE project_id = $1 AND id = $2"  # noqa: S105  (no secret)

#: Only hosts that are up become `silent`; one that is cordoned or fenced is silent when nothing was heard for a while.
_VM = """
SELECT v.id, v.project_id AS project, v.name, v.state, v.step, v.desired, v.generation, v.observed_generation,
       v.vcpus, v.memory_mib, v.disk_gib, v.image, v.network, host(v.address) AS address, v.mac, v.ssh,
       h.name AS host, h.zone, v.labels, v.guest_ready, v.problem, v.attempts, v.created_at, v.updated_at, v.host_id,
       coalesce(v.spec ->> 'on_host_failure', 'none') AS on_host_failure, v.group_name AS "group",
       CASE WHEN h.state = 'silent' OR (h.state <> 'up' AND h.heartbeat_at < now() - interval '1 minute')
            THEN h.heartbeat_at END AS host_silent_since
FROM vms v LEFT JOIN hosts h ON h.id = v.host_id
"""

GET_VM = f"{_VM} WHERE v.project_id = $1 AND v.id = $2"

GET_VMS = f"{_VM} WHERE v.project_id = $1 AND v.id = ANY ($2::uuid[])"

_MATCHES = """
    AND ($2::uuid IS NULL OR v.id > $2)
    AND ($3::text[] IS NULL OR v.state = ANY ($3))
    AND ($4::jsonb IS NULL OR NOT EXISTS (
        SELECT FROM jsonb_to_recordset($4) AS r (key text, among jsonb, wanted boolean)
        WHERE r.wanted IS DISTINCT FROM CASE
            WHEN r.among IS NULL THEN v.labels ? r.key
            ELSE coalesce(r.among ? (v.labels ->> r.key), false)
        END
    ))
    AND ($5::text IS NULL OR h.name = $5 OR v.host_id::text = $5)
    AND ($6::text IS NULL OR v.name = $6)
    AND ($7::text IS NULL OR v.group_name = $7)
ORDER BY v.id LIMIT $8
"""

#: Parameters: project, id to start after, states, label requirements (see leveret.api.selectors), host id or name,
#: VM name, group, limit; null means any.
LIST_LIVE_VMS = f"{_VM} WHERE v.project_id = $1 AND v.state <> 'deleted' {_MATCHES}"
#: The same, with those that are deleted.
LIST_ALL_VMS = f"{_VM} WHERE v.project_id = $1 {_MATCHES}"

GET_REJECTION = "SELECT request_id, problem FROM rejections WHERE project_id = $1 AND vm_id = $2"

GET_TOMBSTONE = "SELECT 1 FROM tombstones WHERE project_id = $1 AND vm_id = $2"

#: Where a VM stands, and what was asked of that.
GET_PLACEMENT = """
SELECT v.id AS vm_id, v.name, v.state, h.name AS host, h.zone, v.spec -> 'placement' AS placement, v.problem
FROM vms v LEFT JOIN hosts h ON h.id = v.host_id WHERE v.project_id = $1 AND v.id = $2
"""

#: What happened to a VM on its way to a host, the newest first; the last parameter is how many.
LIST_DECISIONS = """
SELECT type, at, data FROM events
WHERE project_id = $1 AND vm_id = $2 AND type IN ('scheduled', 'build_failed', 'pending')
ORDER BY id DESC LIMIT $3
"""

_EVENTS = """
SELECT p.last_seq, p.forgotten_seq, e.*
FROM projects p LEFT JOIN LATERAL (
    SELECT seq, vm_id, vm_name, type, state, at, data FROM events
    WHERE project_id = p.id AND seq > $2 {matches} ORDER BY seq LIMIT $3
) AS e ON true
WHERE p.id = $1 ORDER BY e.seq
"""

#: Only numbered events: the relay numbers them in the order in which they became visible. Every row, and a row without
#: an event when there is none, tells of the newest event and of the newest that is forgotten, as of the same moment.
LIST_EVENTS = _EVENTS.format(matches="")

LIST_VM_EVENTS = _EVENTS.format(matches="AND vm_id = $4")

LAST_SEQ = "SELECT last_seq FROM projects WHERE id = $1"

#: What the feed needs to know of new events in order to wake whom they concern.
NEWS = "SELECT seq, vm_id, state FROM events WHERE project_id = $1 AND seq > $2 ORDER BY seq LIMIT $3"

#: A fenced host is clean when its present worker has shown that nothing of what is over is left on it.
_HOST = """
SELECT h.id, h.name, h.zone, h.state, h.state_reason, h.labels, h.virt_type, h.vcpus, h.vcpus_used, h.memory_mib,
       h.memory_mib_used, h.disk_gib, h.disk_gib_used, h.heartbeat_at, coalesce(c.vms, 0) AS vms,
       coalesce(c.vms_to_restart, 0) AS vms_to_restart, h.taints, h.vms_max, h.problem,
       CASE WHEN h.state = 'fenced' THEN h.clean_epoch IS NOT DISTINCT FROM h.epoch END AS clean
FROM hosts h LEFT JOIN vms_on_hosts() AS c ON c.host_id = h.id
"""

LIST_HOSTS = f"{_HOST} ORDER BY h.name, h.id"

#: By id or name. Names are not unique: a machine that was set up anew has the name of the one that it was.
FIND_HOSTS = f"{_HOST} WHERE h.id = $1 OR h.name = $2 ORDER BY h.heartbeat_at DESC, h.id"

_GROUP = """
SELECT g.name, g.policy, g.enforcement, g.topology, g.created_at,
       (SELECT count(*) FROM vms v WHERE v.project_id = g.project_id AND v.group_name = g.name) AS vms
FROM groups g WHERE g.project_id = $1
"""

GET_GROUP = f"{_GROUP} AND g.name = $2"

LIST_GROUPS = f"{_GROUP} AND ($2::text IS NULL OR g.name > $2) ORDER BY g.name LIMIT $3"

LIST_IMAGES = "SELECT name, url, sha256, format FROM images ORDER BY name"

#: Says that Postgres answers and that the schema is there.
CHECK = "SELECT 1 FROM projects LIMIT 1"

_PROJECT = """
SELECT p.id, p.created_at, q.vms_max, q.vcpus_max, q.memory_mib_max, q.disk_gib_max, q.vms_used, q.vcpus_used,
       q.memory_mib_used, q.disk_gib_used, q.requests_per_s, q.request_burst
FROM projects p JOIN quotas q ON q.project_id = p.id WHERE p.deleted_at IS NULL
"""

GET_PROJECT = f"{_PROJECT} AND p.id = $1"

#: Parameters: the only project to show, the id to start after (null means any), limit.
LIST_PROJECTS = f"""{_PROJECT}
AND ($1::text IS NULL OR p.id = $1) AND ($2::text IS NULL OR p.id > $2) ORDER BY p.id LIMIT $3
"""

_OF_TOKEN = """
SELECT id, project_id AS project, name, role, created_at, created_by, expires_at, last_used_at, revoked_at
FROM tokens WHERE project_id = $1
"""  # noqa: S105  (SQL)

GET_TOKEN = f"{_OF_TOKEN} AND id = $2"

#: Parameters: project, the time of making and the id of the one to start after (null means any), limit.
LIST_TOKENS = f"""{_OF_TOKEN}
AND ($2::timestamptz IS NULL OR (created_at, id) > ($2, $3::uuid)) ORDER BY created_at, id LIMIT $4
"""

_AMQP_USER = """
SELECT name, project_id AS project, role, created_at, created_by FROM amqp_users WHERE project_id = $1
"""

GET_AMQP_USER = f"{_AMQP_USER} AND name = $2"

LIST_AMQP_USERS = f"{_AMQP_USER} AND ($2::text IS NULL OR name > $2) ORDER BY name LIMIT $3"
