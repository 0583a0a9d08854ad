"""The vms table, and the one function that writes what was decided.

Lock order: rows of vms by id, then of quotas by project, then of groups by project and name, then of hosts by id. Two
conductors therefore wait for each other, and hardly ever in a circle; should they, Postgres ends one transaction, and
its batch is tried again.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from leveret.conductor.database import Connection, count_of
from leveret.conductor.rows import VM_COLUMNS, Change, Vm
from leveret.conductor.store import addresses, events, hosts, projects
from leveret.shared.lifecycle import State


@dataclass(frozen=True, slots=True)
class Column:
    """How a column travels in a batch: as an array of `sent`, made into the column's value by `expression`."""

    sent: str
    changes: bool = False
    expression: str = "{}"


# An array of arrays cannot be unnested row by row, so what is itself a list travels as text.
_COLUMNS = {
    "id": Column("uuid"),
    "project_id": Column("text"),
    "name": Column("text", changes=True),
    "spec": Column("jsonb"),
    "spec_hash": Column("bytea"),
    "labels": Column("jsonb", changes=True),
    "vcpus": Column("integer"),
    "memory_mib": Column("bigint"),
    "disk_gib": Column("bigint"),
    "image": Column("jsonb"),
    "network": Column("text"),
    "mac": Column("text"),
    "created_at": Column("timestamptz"),
    "bundle": Column("uuid"),
    "group_name": Column("text", changes=True),
    "seat": Column("text", changes=True),
    "looked_rooms": Column("bigint", changes=True),
    "address": Column("inet", changes=True),
    "desired": Column("text", changes=True),
    "state": Column("text", changes=True),
    "deadline": Column("timestamptz", changes=True),
    "generation": Column("bigint", changes=True),
    "restarts": Column("integer", changes=True),
    "grace_s": Column("integer", changes=True),
    "host_id": Column("uuid", changes=True),
    "token": Column("bigint", changes=True),
    "attempts": Column("integer", changes=True),
    "failed_hosts": Column("text", changes=True, expression="{}::jsonb"),
    "step": Column("text", changes=True),
    "observed_generation": Column("bigint", changes=True),
    "report_epoch": Column("bigint", changes=True),
    "report_seq": Column("bigint", changes=True),
    "guest_ready": Column("boolean", changes=True),
    "steps": Column("text", changes=True, expression="{}::jsonb"),
    "ssh": Column("jsonb", changes=True),
    "problem": Column("jsonb", changes=True),
    "sent_at": Column("timestamptz", changes=True),
    "recent_requests": Column("text", changes=True, expression="ARRAY(SELECT jsonb_array_elements_text({}::jsonb))"),
}
_CHANGING = [name for name, column in _COLUMNS.items() if column.changes]


def _value(name: str) -> str:
    return _COLUMNS[name].expression.format(f"new.{name}")


def _parameters(names: Iterable[str]) -> str:
    return ", ".join(f"${n}::{_COLUMNS[name].sent}[]" for n, name in enumerate(names, start=1))


_INSERT = f"""
INSERT INTO vms ({", ".join(_COLUMNS)})
SELECT {", ".join(_value(name) for name in _COLUMNS)}
FROM unnest({_parameters(_COLUMNS)}) AS new ({", ".join(_COLUMNS)})
ORDER BY new.id
ON CONFLICT DO NOTHING
RETURNING id
"""

_UPDATED = ["id", *_CHANGING]
_UPDATE = f"""
UPDATE vms SET {", ".join(f"{name} = {_value(name)}" for name in _CHANGING)},
    updated_at = CASE WHEN new.is_visible THEN now() ELSE vms.updated_at END
FROM unnest({_parameters(_UPDATED)}, ${len(_UPDATED) + 1}::bigint[], ${len(_UPDATED) + 2}::boolean[])
    AS new ({", ".join(_UPDATED)}, known_generation, is_visible)
WHERE vms.id = new.id AND vms.generation = new.known_generation
"""

_SELECT = f"SELECT {', '.join(VM_COLUMNS)} FROM vms"


async def lock(connection: Connection, ids: Iterable[UUID]) -> dict[UUID, Vm]:
    """These VMs, locked until the transaction ends. Unknown ids are left out."""
    rows = await connection.fetch(f"{_SELECT} WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE", list(ids))
    return {row["id"]: Vm.of(row) for row in rows}


# The project that has least comes first. Bundles come whole: one that another conductor has a part of is left to it.
_PENDING = f"""
WITH due AS (
    SELECT id, bundle, created_at, row_number() OVER (PARTITION BY project_id ORDER BY created_at, id) + (
        SELECT count(*) FROM vms placed WHERE placed.project_id = vms.project_id AND placed.host_id IS NOT NULL
    ) AS turn
    FROM vms WHERE state = 'pending' AND deadline > now() AND looked_rooms IS DISTINCT FROM $1 * 128 + CASE
        WHEN bundle IS NULL THEN 1
        ELSE (SELECT count(*) FROM vms mates WHERE mates.bundle = vms.bundle AND mates.state = 'pending')
    END
), first AS (
    SELECT coalesce(bundle, id) AS bundle, min(turn) AS turn, min(created_at) AS since FROM due
    GROUP BY 1 ORDER BY 2, 3 LIMIT $2
), locked AS (
    SELECT {", ".join(f"v.{name}" for name in VM_COLUMNS)}, f.turn, f.since FROM vms v
    JOIN first f ON coalesce(v.bundle, v.id) = f.bundle WHERE v.state = 'pending'
    ORDER BY v.id FOR NO KEY UPDATE OF v SKIP LOCKED
)
SELECT *, (SELECT count(*) FROM vms b WHERE b.bundle = locked.bundle AND b.state = 'pending') AS together
FROM locked ORDER BY turn, since, bundle, id
"""


def looked_at(rooms: int, companions: int) -> int:
    """What a VM that waits was looked at with: so much room that had come about, and so many to be placed together.

    Both change what comes of another look: a bundle of which one was deleted needs less. There are at most 100.
    """
    return rooms * 128 + companions


async def lock_pending(connection: Connection, rooms: int, limit: int) -> list[list[Vm]]:
    """VMs that wait for a host, unless another conductor is at them, or they were looked at as they are (`looked_at`).

    Up to `limit` bundles, each to be placed whole; a VM that was asked for by itself is a bundle of one. As if they
    were placed one after the other, the next is always of the project that has the fewest VMs then, and its oldest.
    """
    bundles: dict[UUID, list[Vm]] = {}
    whole: dict[UUID, int] = {}
    for row in await connection.fetch(_PENDING, rooms, limit):
        vm = Vm.of(row)
        key = vm.bundle or vm.id
        bundles.setdefault(key, []).append(vm)
        whole[key] = row["together"] if vm.bundle else 1
    return [vms for key, vms in bundles.items() if len(vms) == whole[key]]


async def lock_late(connection: Connection, backstop: timedelta, limit: int) -> list[Vm]:
    """VMs whose deadline has passed, builds by `backstop`, unless another conductor is at them."""
    rows = await connection.fetch(
        f"""{_SELECT} WHERE deadline <= now() AND (state <> 'building' OR deadline <= now() - $1::interval)
        ORDER BY deadline LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED""",
        backstop,
        limit,
    )
    return [Vm.of(row) for row in rows]


async def lock_unsent(connection: Connection, resend: timedelta, limit: int) -> list[Vm]:
    """VMs that lag, and to whose hosts nothing was said for a while. A silent host will ask when it is back."""
    rows = await connection.fetch(
        f"""{_SELECT}
        WHERE deadline IS NOT NULL AND (sent_at IS NULL OR sent_at < now() - $1::interval)
          AND host_id IN (SELECT id FROM hosts WHERE state NOT IN ('silent', 'retired'))
        ORDER BY sent_at NULLS FIRST LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED""",
        resend,
        limit,
    )
    return [vm for vm in map(Vm.of, rows) if vm.is_lagging]


async def lock_stranded(connection: Connection, limit: int) -> list[Vm]:
    """VMs on hosts that are proven to be off, to which that was not yet applied; unless another conductor is at them.

    A fenced host of which a later incarnation was heard is back: what stands on it goes on.
    """
    rows = await connection.fetch(
        f"""SELECT {", ".join(f"v.{name}" for name in VM_COLUMNS)} FROM vms v JOIN hosts h ON h.id = v.host_id
        WHERE h.state = 'retired'
           OR (h.state = 'fenced' AND h.epoch = h.fenced_epoch
               AND NOT (v.state = 'error' AND v.problem->>'code' = 'host_fenced'))
        ORDER BY v.id LIMIT $1 FOR NO KEY UPDATE OF v SKIP LOCKED""",
        limit,
    )
    return [Vm.of(row) for row in rows]


async def placed_on(connection: Connection, host_ids: Sequence[UUID]) -> set[UUID]:
    """The ids of everything placed on these hosts."""
    if not host_ids:
        return set()
    rows = await connection.fetch("SELECT id FROM vms WHERE host_id = ANY($1)", list(host_ids))
    return {row["id"] for row in rows}


async def taken_names(connection: Connection, wanted: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Which of these (project, name) a living VM has."""
    rows = await connection.fetch(
        """SELECT project_id, name FROM vms
        WHERE state <> 'deleted' AND (project_id, name) IN (SELECT * FROM unnest($1::text[], $2::text[]))""",
        [project for project, _ in wanted],
        [name for _, name in wanted],
    )
    return {(row["project_id"], row["name"]) for row in rows}


async def mark_sent(connection: Connection, ids: Sequence[UUID]) -> None:
    if ids:
        await connection.execute("UPDATE vms SET sent_at = now() WHERE id = ANY($1)", list(ids))


async def new_tokens(connection: Connection, count: int) -> list[int]:
    """Fences for placements: each is larger than any before it."""
    rows = await connection.fetch("SELECT nextval('placement_tokens') AS token FROM generate_series(1, $1)", count)
    return [row["token"] for row in rows]


async def outrun_tokens(connection: Connection, token: int) -> int:
    """Give out no token that is not newer than this one, which a host has. Returns how many had to be passed over.

    There are some when an older copy of the database was restored. Each is drawn, and not the sequence set, so that it
    cannot go back, whoever else is drawing; of very many the rest is passed over when the host is heard of again.
    """
    passed = await connection.fetchval(
        """SELECT count(nextval('placement_tokens'))
        FROM (SELECT coalesce(pg_sequence_last_value('placement_tokens'::regclass), 0) AS last) AS given,
             generate_series(last + 1, least($1::bigint, last + 1000000))""",
        token,
    )
    assert isinstance(passed, int)
    return passed


async def record(connection: Connection, changes: Sequence[Change]) -> list[Change]:
    """Write changes: rows, counters, addresses, user-data and events, all of it in the caller's transaction (law 4).

    Returns those that were written. A new VM whose id or name somebody else took in the meantime is not; the rest
    were locked by the caller, so they are.
    """
    new = [change for change in changes if change.before is None]
    old = [change for change in changes if change.before is not None]
    written = await _insert(connection, new) + await _update(connection, old)
    await projects.book(connection, written)
    await hosts.book(connection, written)
    await addresses.free(connection, [c.after.id for c in old if c.after.state is State.DELETED])
    await _wipe_user_data(connection, written)
    await events.append(connection, [event for change in written for event in change.events])
    return written


async def _insert(connection: Connection, changes: Sequence[Change]) -> list[Change]:
    if not changes:
        return []
    rows = await connection.fetch(_INSERT, *_arrays([change.after for change in changes], list(_COLUMNS)))
    inserted = {row["id"] for row in rows}
    return [change for change in changes if change.after.id in inserted]


async def _update(connection: Connection, changes: Sequence[Change]) -> list[Change]:
    if not changes:
        return []
    known = [change.before.generation for change in changes if change.before is not None]
    visible = [change.is_visible for change in changes]
    status = await connection.execute(_UPDATE, *_arrays([change.after for change in changes], _UPDATED), known, visible)
    if count_of(status) != len(changes):
        raise RuntimeError(f"{len(changes)} locked VMs were to be updated: {status}")
    return list(changes)


def _arrays(vms: Sequence[Vm], names: Sequence[str]) -> list[list[object]]:
    return [[_sent(vm, name) for vm in vms] for name in names]


def _sent(vm: Vm, name: str) -> object:
    value: object = getattr(vm, name)
    return json.dumps(value) if isinstance(value, tuple) else value


async def _wipe_user_data(connection: Connection, changes: Sequence[Change]) -> None:
    """Once the guest has read it, or will never: secrets are kept no longer than they are needed.

    A VM that is to be made anew when its host fails needs it until it is deleted.
    """
    done = [
        c.after.id
        for c in changes
        if c.after.state is State.DELETED or (c.after.guest_ready and not c.after.is_made_anew)
    ]
    if done:
        await connection.execute(
            """WITH wiped AS (DELETE FROM vm_user_data WHERE vm_id = ANY($1) RETURNING vm_id)
            UPDATE vms SET user_data_wiped = true FROM wiped WHERE vms.id = wiped.vm_id""",
            done,
        )


async def put_user_data(connection: Connection, user_data: dict[UUID, bytes]) -> None:
    if user_data:
        await connection.execute(
            "INSERT INTO vm_user_data SELECT * FROM unnest($1::uuid[], $2::bytea[])",
            list(user_data),
            list(user_data.values()),
        )


async def claim_ids(connection: Connection, ids: Iterable[UUID]) -> datetime:
    """Nobody else makes or buries VMs of these ids until the transaction ends: there is no row yet to lock.

    Returns the transaction's time, to save a round trip.
    """
    keys = sorted({int.from_bytes(vm_id.bytes[8:], signed=True) for vm_id in ids})
    row = await connection.fetchrow(
        "SELECT now() AS now, (SELECT count(pg_advisory_xact_lock(key)) FROM unnest($1::bigint[]) AS key)", keys
    )
    assert row is not None
    now: datetime = row["now"]
    return now


async def database_now(connection: Connection) -> datetime:
    """The transaction's time: the only clock that deadlines are set by."""
    now = await connection.fetchval("SELECT now()")
    assert isinstance(now, datetime)
    return now
