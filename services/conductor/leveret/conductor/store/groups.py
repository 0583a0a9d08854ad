"""The groups table, and where the members of groups are."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any
from uuid import UUID

from leveret.conductor.database import Connection, count_of
from leveret.conductor.scheduling import GroupView
from leveret.shared.groups import CreateGroup

Name = tuple[str, str]

_LOCK = """
SELECT g.project_id, g.name, g.policy, g.enforcement, g.topology FROM groups g
JOIN unnest($1::text[], $2::text[]) AS wanted (project_id, name) USING (project_id, name)
ORDER BY g.project_id, g.name FOR NO KEY UPDATE OF g
"""
_MEMBERS = """
SELECT v.project_id, v.group_name AS name, v.host_id, h.zone, count(*) AS vms
FROM vms v JOIN hosts h ON h.id = v.host_id
JOIN unnest($1::text[], $2::text[]) AS wanted (project_id, name)
    ON wanted.project_id = v.project_id AND wanted.name = v.group_name
GROUP BY v.project_id, v.group_name, v.host_id, h.zone
"""


async def lock(connection: Connection, names: Collection[Name]) -> dict[Name, GroupView]:
    """These groups, each (project, name), with where their members are now; unknown ones are left out.

    Until the transaction ends nobody else places their members: who places at the same time would not see these.
    """
    if not names:
        return {}
    wanted = [list(column) for column in zip(*sorted(names), strict=True)]
    there = await connection.fetch(_LOCK, *wanted)
    by_host: dict[Name, dict[UUID, int]] = defaultdict(dict)
    by_zone: dict[Name, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    # A statement of its own: what was placed by whom this one waited for must be seen.
    for row in await connection.fetch(_MEMBERS, *wanted):
        name = (row["project_id"], row["name"])
        by_host[name][row["host_id"]] = row["vms"]
        by_zone[name][row["zone"]] += row["vms"]
    return {
        (name := (row["project_id"], row["name"])): GroupView(
            policy=row["policy"],
            hard=row["enforcement"] == "hard",
            topology=row["topology"],
            by_host=by_host[name],
            by_zone=dict(by_zone[name]),
        )
        for row in there
    }


async def create(connection: Connection, project: str, group: CreateGroup) -> bool:
    """Whether it was made; otherwise the project has one of this name."""
    status = await connection.execute(
        """INSERT INTO groups (project_id, name, policy, enforcement, topology)
        VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING""",
        project,
        group.name,
        group.policy,
        group.enforcement,
        group.topology,
    )
    return bool(count_of(status))


async def find(connection: Connection, project: str, name: str) -> dict[str, Any] | None:
    """The group's document, with `vms`, how many it has; locked, so that none joins it. None when there is none."""
    row = await connection.fetchrow(
        "SELECT name, policy, enforcement, topology FROM groups WHERE project_id = $1 AND name = $2 FOR UPDATE",
        project,
        name,
    )
    if row is None:
        return None
    vms = await connection.fetchval("SELECT count(*) FROM vms WHERE project_id = $1 AND group_name = $2", project, name)
    return {**row, "vms": vms}


async def delete(connection: Connection, project: str, name: str) -> None:
    await connection.execute("DELETE FROM groups WHERE project_id = $1 AND name = $2", project, name)
