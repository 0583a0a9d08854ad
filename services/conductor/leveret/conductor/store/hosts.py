"""The hosts table: registration, leases, and the counters that VMs' rows add up to."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from leveret.conductor.database import Connection
from leveret.conductor.rows import Change, Vm, told
from leveret.conductor.scheduling.host import Host
from leveret.shared.messages import Heartbeat

_SNAPSHOT = """
SELECT id, name, zone, state, problem IS NULL AS healthy, labels, vcpus, memory_mib, disk_gib,
       vcpus - vcpus_used AS vcpus_free,
       memory_mib - memory_mib_used AS memory_mib_free,
       disk_gib - disk_gib_used AS disk_gib_free,
       taints, vms_max, images
"""

# Only where it matters, since it costs a look at the index for each host.
_COUNT = "CASE WHEN vms_max IS NULL THEN 0 ELSE (SELECT count(*) FROM vms WHERE vms.host_id = hosts.id) END AS vms"

# Capacity never sinks below what is placed: a host that shrank is full, not overbooked. Images may be stored beside the
# row, where an equal value would be written anew with every heartbeat: so the old one is kept.
_REGISTER = """
INSERT INTO hosts AS h (id, name, zone, labels, epoch, virt_type, version, vcpus, memory_mib, disk_gib,
                        foreign_domains, problem, taints, vms_max, images)
SELECT b.id, name, zone, labels, epoch, virt_type, version, vcpus, memory_mib, disk_gib, foreign_domains, problem,
       taints, vms_max, string_to_array(images, ' ')
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::jsonb[], $5::bigint[], $6::text[], $7::text[],
            $8::integer[], $9::bigint[], $10::bigint[], $11::integer[], $12::jsonb[], $13::jsonb[], $14::integer[],
            $15::text[]) AS b (id, name, zone, labels, epoch, virt_type, version, vcpus, memory_mib, disk_gib,
                               foreign_domains, problem, taints, vms_max, images)
ORDER BY b.id
ON CONFLICT (id) DO UPDATE SET
    name = excluded.name, zone = excluded.zone, labels = excluded.labels, epoch = excluded.epoch,
    virt_type = excluded.virt_type, version = excluded.version,
    vcpus = greatest(excluded.vcpus, h.vcpus_used),
    memory_mib = greatest(excluded.memory_mib, h.memory_mib_used),
    disk_gib = greatest(excluded.disk_gib, h.disk_gib_used),
    foreign_domains = excluded.foreign_domains, problem = excluded.problem,
    taints = excluded.taints, vms_max = excluded.vms_max,
    images = CASE WHEN h.images = excluded.images THEN h.images ELSE excluded.images END,
    state = CASE h.state WHEN 'silent' THEN 'up' ELSE h.state END,
    state_reason = CASE h.state
        WHEN 'silent' THEN NULL
        WHEN 'retired' THEN 'still heard of: stop its worker; what is over on it is removed'
        ELSE h.state_reason
    END,
    heartbeat_at = now()
WHERE h.epoch <= excluded.epoch
"""

_BOOK = """
WITH moved AS (
    SELECT h.id, d.vcpus, d.memory_mib, d.disk_gib
    FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[]) AS d (id, vcpus, memory_mib, disk_gib)
    JOIN hosts h USING (id) ORDER BY h.id FOR NO KEY UPDATE OF h
)
UPDATE hosts SET vcpus_used = vcpus_used + moved.vcpus, memory_mib_used = memory_mib_used + moved.memory_mib,
                 disk_gib_used = disk_gib_used + moved.disk_gib
FROM moved WHERE hosts.id = moved.id
"""

# What hosts would report if nothing had been lost; the text that messages.digest_of hashes.
_DIGESTS = """
SELECT h.id, left(encode(sha256(convert_to(coalesce(string_agg(
           concat_ws(':', v.id, v.token, v.generation, v.state), E'\n'
           ORDER BY concat_ws(':', v.id, v.token, v.generation, v.state) COLLATE "C"), ''), 'UTF8')), 'hex'), 32)
           AS digest
FROM unnest($1::uuid[]) AS h (id)
LEFT JOIN vms v ON v.host_id = h.id AND v.observed_generation = v.generation AND v.state IN ('running', 'stopped')
GROUP BY h.id
"""


async def snapshot(connection: Connection) -> list[Host]:
    """Every host that is not gone for good, as the scheduler sees it."""
    rows = await connection.fetch(f"{_SNAPSHOT}, {_COUNT} FROM hosts WHERE state <> 'retired'")
    return [_host(row) for row in rows]


async def lock(
    connection: Connection, ids: Collection[UUID | None], *, if_failing: Collection[UUID] = ()
) -> dict[UUID, Host]:
    """These hosts as they are now, locked until the transaction ends; and others, if builds failed on them lately."""
    if not ids and not if_failing:
        return {}
    rows = await connection.fetch(
        f"{_SNAPSHOT} FROM hosts WHERE id = ANY($1) OR (id = ANY($2) AND failures > 0) ORDER BY id FOR NO KEY UPDATE",
        list(ids),
        list(if_failing),
    )
    locked = {row["id"]: _host(row) for row in rows}
    if limited := [host.id for host in locked.values() if host.vms_max is not None]:
        # By a statement of its own: what one that waited for the lock had read beside it would be older than the lock.
        for row in await connection.fetch(f"SELECT id, {_COUNT} FROM hosts WHERE id = ANY($1)", limited):
            locked[row["id"]].vms = row["vms"]
    return locked


def _host(row: Any) -> Host:
    return Host(**dict(row, images=frozenset(row["images"])))


async def rooms(connection: Connection) -> int:
    """How often room has come about on any host: another number than before means that there may be some."""
    count = await connection.fetchval("SELECT coalesce(sum(rooms), 0)::bigint FROM hosts")
    assert isinstance(count, int)
    return count


@dataclass(frozen=True, slots=True)
class Fenced:
    """A fenced host: the incarnation of its worker that was declared off, and whether the present one is clean."""

    fenced_epoch: int
    is_clean: bool


_FENCED = """
SELECT id, fenced_epoch, clean_epoch IS NOT DISTINCT FROM epoch AS is_clean FROM hosts
WHERE state = 'fenced' AND id = ANY($1) ORDER BY id
"""


async def fenced(connection: Connection, ids: Collection[UUID], *, hold: bool = False) -> dict[UUID, Fenced]:
    """Those of these hosts that are fenced; with `hold` they stay so until the transaction ends."""
    rows = await connection.fetch(f"{_FENCED} FOR SHARE" if hold else _FENCED, list(ids))
    return {row["id"]: Fenced(row["fenced_epoch"], row["is_clean"]) for row in rows}


async def retired(connection: Connection, ids: Collection[UUID]) -> set[UUID]:
    """Those of these hosts that were given up for good, and are heard of all the same."""
    rows = await connection.fetch("SELECT id FROM hosts WHERE state = 'retired' AND id = ANY($1)", list(ids))
    return {row["id"] for row in rows}


async def mark_clean(connection: Connection, epochs: Mapping[UUID, int]) -> None:
    """These incarnations of fenced hosts' workers have listed nothing of what is over."""
    for host_id in sorted(epochs):
        await connection.execute(
            "UPDATE hosts SET clean_epoch = $2 WHERE id = $1 AND epoch = $2 AND state = 'fenced'",
            host_id,
            epochs[host_id],
        )


async def mark_unclean(connection: Connection, ids: Collection[UUID]) -> None:
    """VMs were taken off these hosts unseen: something of them may be left there."""
    await connection.execute("UPDATE hosts SET clean_epoch = NULL WHERE id = ANY($1)", list(ids))


async def book(connection: Connection, changes: Sequence[Change]) -> None:
    """Move the counters by what these changes placed and released. The CHECKs refuse to overbook."""
    sums: dict[UUID, list[int]] = defaultdict(lambda: [0, 0, 0])
    for change in changes:
        before = change.before.host_id if change.before else None
        if before != change.after.host_id:
            _add(sums, before, change.after, -1)
            _add(sums, change.after.host_id, change.after, +1)
    if not sums:
        return
    ids = list(sums)
    await connection.execute(_BOOK, ids, *([sums[host][n] for host in ids] for n in range(3)))


def _add(sums: dict[UUID, list[int]], host_id: UUID | None, vm: Vm, sign: int) -> None:
    if host_id is not None:
        for n, amount in enumerate((vm.vcpus, vm.memory_mib, vm.disk_gib)):
            sums[host_id][n] += sign * amount


async def register(connection: Connection, heartbeats: Sequence[Heartbeat]) -> None:
    """Renew leases, and make hosts of ids that are new. One heartbeat a host; an older incarnation's is ignored."""
    columns = zip(*(_registered(heartbeat) for heartbeat in heartbeats), strict=True)
    await connection.execute(_REGISTER, *(list(column) for column in columns))


def _registered(beat: Heartbeat) -> tuple[Any, ...]:
    return (
        beat.host_id,
        beat.name,
        beat.zone,
        beat.labels,
        beat.epoch,
        beat.virt_type,
        beat.version,
        beat.placeable.vcpus,
        beat.placeable.memory_mib,
        beat.placeable.disk_gib,
        beat.foreign,
        told(beat.problem) if beat.problem else None,
        beat.taints,
        beat.vms_max,
        " ".join(sorted(beat.images)),
    )


async def learn_epochs(connection: Connection, epochs: Mapping[UUID, int]) -> None:
    """A host's list may come before the first heartbeat of its worker: commands must name the new incarnation."""
    for host_id in sorted(epochs):
        await connection.execute("UPDATE hosts SET epoch = $2 WHERE id = $1 AND epoch < $2", host_id, epochs[host_id])


async def digests(connection: Connection, ids: Sequence[UUID]) -> dict[UUID, str]:
    """What each host's digest should be."""
    return {row["id"]: row["digest"] for row in await connection.fetch(_DIGESTS, list(ids))}


async def silence(connection: Connection, lease: timedelta) -> list[str]:
    """Hosts that have not been heard of get no new work; nothing on them is touched (law 3). Returns their names."""
    rows = await connection.fetch(
        """UPDATE hosts SET state = 'silent',
                            state_reason = 'no heartbeat since ' || to_char(heartbeat_at, 'YYYY-MM-DD HH24:MI:SS TZ')
        WHERE id IN (
            SELECT id FROM hosts WHERE state = 'up' AND heartbeat_at < now() - $1::interval
            FOR NO KEY UPDATE SKIP LOCKED
        ) RETURNING name""",
        lease,
    )
    return [row["name"] for row in rows]


async def count_builds(
    connection: Connection, failed: Sequence[tuple[UUID, str]], built: Sequence[UUID], cordon_after: int
) -> list[str]:
    """Count failed builds in a row, and cordon the hosts that had too many. Returns the names of those.

    `failed` are builds: the host of each, and in words why it failed.
    """
    if built:
        await connection.execute(
            "UPDATE hosts SET failures = 0 WHERE id IN "
            "(SELECT id FROM hosts WHERE id = ANY($1) AND failures > 0 ORDER BY id FOR NO KEY UPDATE)",
            list(built),
        )
    if not failed:
        return []
    rows = await connection.fetch(
        """WITH counted AS (
            SELECT f.id, count(*) AS n FROM unnest($1::uuid[]) AS f (id) GROUP BY f.id ORDER BY f.id
        ), now_failing AS (
            UPDATE hosts h SET failures = h.failures + counted.n FROM counted WHERE h.id = counted.id
            RETURNING h.id, h.failures
        )
        SELECT id, failures FROM now_failing WHERE failures >= $2""",
        [host_id for host_id, _ in failed],
        cordon_after,
    )
    last = dict(failed)
    cordoned = await connection.fetch(
        """UPDATE hosts SET state = 'cordoned', state_reason = failures || ' builds failed in a row; the last: ' || last
        FROM unnest($1::uuid[], $2::text[]) AS f (id, last) WHERE hosts.id = f.id AND state = 'up' RETURNING name""",
        [row["id"] for row in rows],
        [last[row["id"]] for row in rows],
    )
    return [row["name"] for row in cordoned]
