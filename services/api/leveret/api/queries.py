"""Every SQL statement of the API. All of them read; every one of a VM or an event is bound to its project."""

#: A token by the SHA-256 of what was presented. Its validity is judged by the database's clock.
GET_IDENTITY = """
SELECT project_id, role, name,
       revoked_at IS NOT NULL AS revoked,
       coalesce(expires_at <= now(), false) AS expired
FROM tokens WHERE hash = $1
"""

_VM = """
SELECT v.id, v.project_id AS project, v.name, v.state, v.step, v.desired, v.generation, v.observed_generation,
       v.vcpus, v.memory_mib, v.disk_gib, v.image, v.network, host(v.address) AS address, v.mac, v.ssh,
       h.name AS host, h.zone, v.labels, v.guest_ready, v.problem, v.attempts, v.created_at, v.updated_at, v.host_id
FROM vms v LEFT JOIN hosts h ON h.id = v.host_id
"""

GET_VM = f"{_VM} WHERE v.project_id = $1 AND v.id = $2"

_MATCHES = """
    AND ($2::uuid IS NULL OR v.id > $2)
    AND ($3::text[] IS NULL OR v.state = ANY ($3))
    AND ($4::jsonb IS NULL OR v.labels @> $4)
    AND ($5::text IS NULL OR h.name = $5 OR v.host_id::text = $5)
    AND ($6::text IS NULL OR v.name = $6)
ORDER BY v.id LIMIT $7
"""

#: Parameters: project, id to start after, states, labels, host id or name, VM name, limit; null means any.
LIST_LIVE_VMS = f"{_VM} WHERE v.project_id = $1 AND v.state <> 'deleted' {_MATCHES}"
#: The same, with those that are deleted.
LIST_ALL_VMS = f"{_VM} WHERE v.project_id = $1 {_MATCHES}"

GET_REJECTION = "SELECT request_id, problem FROM rejections WHERE project_id = $1 AND vm_id = $2"

GET_TOMBSTONE = "SELECT 1 FROM tombstones WHERE project_id = $1 AND vm_id = $2"

_EVENT = "SELECT seq, vm_id, vm_name, type, state, at, data FROM events"

#: Only numbered events: the relay numbers them in the order in which they became visible.
LIST_EVENTS = f"{_EVENT} WHERE project_id = $1 AND seq > $2 ORDER BY seq LIMIT $3"

LIST_VM_EVENTS = f"{_EVENT} WHERE project_id = $1 AND seq > $2 AND vm_id = $4 ORDER BY seq LIMIT $3"

LAST_SEQ = "SELECT last_seq FROM projects WHERE id = $1"

#: What the feed needs to know of new events in order to wake whom they concern.
NEWS = "SELECT seq, vm_id, state FROM events WHERE project_id = $1 AND seq > $2 ORDER BY seq LIMIT $3"

_HOST = """
SELECT h.id, h.name, h.zone, h.state, h.state_reason, h.labels, h.virt_type, h.vcpus, h.vcpus_used, h.memory_mib,
       h.memory_mib_used, h.disk_gib, h.disk_gib_used, h.heartbeat_at,
       (SELECT count(*) FROM vms v WHERE v.host_id = h.id) AS vms
FROM hosts h
"""

LIST_HOSTS = f"{_HOST} ORDER BY h.name, h.id"

#: By id or name. Names are not unique over time: the one that was heard of last is meant.
GET_HOST = f"{_HOST} WHERE h.id::text = $1 OR h.name = $1 ORDER BY h.heartbeat_at DESC LIMIT 1"

LIST_IMAGES = "SELECT name, url, sha256, format FROM images ORDER BY name"

#: Says that Postgres answers and that the schema is there.
CHECK = "SELECT 1 FROM projects LIMIT 1"
