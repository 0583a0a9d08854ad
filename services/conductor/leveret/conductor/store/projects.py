"""Projects: their limits, their tokens, and the broker users that speak for them."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from leveret.conductor.database import Connection, count_of
from leveret.conductor.rows import Change, Vm
from leveret.shared.lifecycle import State

RESOURCES = ("vms", "vcpus", "memory_mib", "disk_gib")
RATES = ("requests_per_s", "request_burst")


@dataclass(frozen=True, slots=True)
class AmqpUser:
    project_id: str
    role: str


@dataclass(slots=True)
class Room:
    """What a project may still have. `limits` of None are none; taking moves `used` as the counters will move."""

    limits: dict[str, int | None]
    used: dict[str, int]

    def exceeded_by(self, *vms: Vm) -> dict[str, dict[str, int]]:
        """The limits that these VMs would break, each as {limit, used, asked}; nothing when they fit."""
        return {
            name: {"limit": limit, "used": self.used[name], "asked": asked}
            for name, asked in amounts_of(*vms).items()
            if (limit := self.limits[name]) is not None and self.used[name] + asked > limit
        }

    def take(self, *vms: Vm) -> None:
        for name, amount in amounts_of(*vms).items():
            self.used[name] += amount


def amounts_of(*vms: Vm) -> dict[str, int]:
    """What VMs count for in their project's quota."""
    return {
        "vms": len(vms),
        "vcpus": sum(vm.vcpus for vm in vms),
        "memory_mib": sum(vm.memory_mib for vm in vms),
        "disk_gib": sum(vm.disk_gib for vm in vms),
    }


_ROOM = f"""
SELECT q.project_id, {", ".join(f"{name}_max, {name}_used" for name in RESOURCES)}
FROM quotas q WHERE q.project_id = ANY($1) AND NOT q.closed
ORDER BY q.project_id FOR NO KEY UPDATE
"""

# A counter that is wrong for whatever reason must not keep a VM from going (law 7): it does not sink below nothing.
_BOOK = f"""
UPDATE quotas SET {", ".join(f"{name}_used = greatest(0, {name}_used + d.{name})" for name in RESOURCES)}
FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[])
    AS d (project_id, vms, vcpus, memory_mib, disk_gib)
WHERE quotas.project_id = d.project_id
"""


async def lock_rooms(connection: Connection, ids: Collection[str]) -> dict[str, Room]:
    """What each of these projects may still have, locked until the transaction ends. One that is closed is not there.

    To be called before any host is locked: that order is the same everywhere, so nobody waits in a circle.
    """
    if not ids:
        return {}
    rows = await connection.fetch(_ROOM, list(ids))
    return {
        row["project_id"]: Room(
            {name: row[f"{name}_max"] for name in RESOURCES}, {name: row[f"{name}_used"] for name in RESOURCES}
        )
        for row in rows
    }


async def book(connection: Connection, changes: Sequence[Change]) -> None:
    """Move the counters by the VMs that were made and those that are gone. The CHECKs refuse what is too much."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(RESOURCES, 0))
    for change in changes:
        sign = _sign(change)
        for name, amount in amounts_of(change.after).items() if sign else ():
            sums[change.after.project_id][name] += sign * amount
    if sums:
        ids = sorted(sums)
        await connection.execute(_BOOK, ids, *([sums[project][name] for project in ids] for name in RESOURCES))


def frees_quota(change: Change) -> bool:
    return _sign(change) < 0


def _sign(change: Change) -> int:
    if change.before is None:
        return +1
    return -1 if change.after.state is State.DELETED and change.before.state is not State.DELETED else 0


async def take_requests(connection: Connection, wanted: Mapping[str, int]) -> dict[str, tuple[int, float]]:
    """Draw on each project's allowance: how many requests were granted, and in how many seconds there is one again."""
    rows = await connection.fetch(
        "SELECT * FROM take_requests($1::text[], $2::integer[])", list(wanted), list(wanted.values())
    )
    return {row["project"]: (row["granted"], row["retry_after_s"]) for row in rows}


async def open_ids(connection: Connection, among: Collection[str] | None = None) -> set[str]:
    """The projects that are not closed: all, or those among these."""
    rows = await connection.fetch(
        "SELECT id FROM projects WHERE deleted_at IS NULL AND ($1::text[] IS NULL OR id = ANY($1))",
        list(among) if among is not None else None,
    )
    return {row["id"] for row in rows}


# Administration


async def create(connection: Connection, project: str) -> bool:
    """Whether it was made; otherwise it is there, or was."""
    status = await connection.execute("INSERT INTO projects (id) VALUES ($1) ON CONFLICT DO NOTHING", project)
    return bool(count_of(status))


async def quota(connection: Connection, project: str) -> dict[str, Any] | None:
    """A project's limits and what it uses, locked; None when there is no such project, or it is closed."""
    row = await connection.fetchrow(
        "SELECT * FROM quotas WHERE project_id = $1 AND NOT closed FOR NO KEY UPDATE", project
    )
    return dict(row) if row is not None else None


async def limit(connection: Connection, project: str, limits: Mapping[str, int | None]) -> None:
    """Set these limits, by their names in the document."""
    columns = {name: f"{name}_max" if name in RESOURCES else name for name in limits}
    if columns:
        assigned = ", ".join(f"{column} = ${n}" for n, column in enumerate(columns.values(), start=2))
        await connection.execute(f"UPDATE quotas SET {assigned} WHERE project_id = $1", project, *limits.values())


async def close(connection: Connection, project: str) -> None:
    """No token and no broker user means this project any more."""
    await connection.execute("UPDATE quotas SET closed = true WHERE project_id = $1", project)
    await connection.execute("UPDATE projects SET deleted_at = now() WHERE id = $1", project)
    await connection.execute(
        "UPDATE tokens SET revoked_at = now() WHERE project_id = $1 AND revoked_at IS NULL", project
    )
    await connection.execute("DELETE FROM amqp_users WHERE project_id = $1", project)


@dataclass(frozen=True, slots=True)
class Token:
    id: UUID
    project_id: str
    name: str
    role: str
    hash: bytes
    expires_at: datetime | None
    created_by: str


async def add_token(connection: Connection, token: Token) -> bool:
    """Whether it was added; otherwise it is there already. The caller has seen that no other has its name."""
    status = await connection.execute(
        """INSERT INTO tokens (id, project_id, name, role, hash, expires_at, created_by)
        VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (id) DO NOTHING""",
        token.id,
        token.project_id,
        token.name,
        token.role,
        token.hash,
        token.expires_at,
        token.created_by,
    )
    return bool(count_of(status))


async def token_named(connection: Connection, project: str, name: str) -> UUID | None:
    """The id of the living token of this name."""
    found: UUID | None = await connection.fetchval(
        "SELECT id FROM tokens WHERE project_id = $1 AND name = $2 AND revoked_at IS NULL", project, name
    )
    return found


async def revoke_token(connection: Connection, project: str, token_id: UUID) -> tuple[str, bool] | None:
    """The token's name, and whether it was revoked just now; None when the project has no such token."""
    row = await connection.fetchrow(
        "SELECT name, revoked_at FROM tokens WHERE project_id = $1 AND id = $2 FOR NO KEY UPDATE", project, token_id
    )
    if row is None:
        return None
    await connection.execute("UPDATE tokens SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL", token_id)
    return row["name"], row["revoked_at"] is None


async def is_administered_without(connection: Connection, *, project: str = "", token_id: UUID | None = None) -> bool:
    """Whether as many as before, or at least one, can administer the installation without this project or token."""
    left: bool = await connection.fetchval(
        """SELECT count(*) = count(*) FILTER (WHERE is_other) OR count(*) FILTER (WHERE is_other) > 0
        FROM (
            SELECT p.id <> $1 AND t.id IS DISTINCT FROM $2 AS is_other
            FROM tokens t JOIN projects p ON p.id = t.project_id
            WHERE t.role = 'admin' AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now())
              AND p.deleted_at IS NULL
        ) AS administrators""",
        project,
        token_id,
    )
    return left


async def tokens_used(connection: Connection, last_used: Mapping[UUID, float]) -> None:
    """Note when tokens were used; never earlier than is known, and never in the future by the database's clock."""
    await connection.execute(
        """UPDATE tokens SET last_used_at = greatest(last_used_at, least(to_timestamp(u.at), now()))
        FROM unnest($1::uuid[], $2::float8[]) AS u (id, at) WHERE tokens.id = u.id""",
        list(last_used),
        list(last_used.values()),
    )


async def amqp_users(connection: Connection, names: Sequence[str]) -> dict[str, AmqpUser]:
    """What these broker users stand for; those that stand for nothing are left out."""
    rows = await connection.fetch("SELECT name, project_id, role FROM amqp_users WHERE name = ANY($1)", list(names))
    return {row["name"]: AmqpUser(row["project_id"], row["role"]) for row in rows}


async def put_amqp_user(connection: Connection, name: str, user: AmqpUser, by: str) -> bool:
    """Whether it speaks for this project now; it may speak for another."""
    status = await connection.execute(
        """INSERT INTO amqp_users (name, project_id, role, created_by) VALUES ($1, $2, $3, $4)
        ON CONFLICT (name) DO UPDATE SET role = excluded.role WHERE amqp_users.project_id = excluded.project_id""",
        name,
        user.project_id,
        user.role,
        by,
    )
    return bool(count_of(status))


async def remove_amqp_user(connection: Connection, project: str, name: str) -> bool:
    """Whether there was one."""
    status = await connection.execute("DELETE FROM amqp_users WHERE name = $1 AND project_id = $2", name, project)
    return bool(count_of(status))
