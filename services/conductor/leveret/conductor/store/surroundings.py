"""Everything that a wave of creates must know about the world, in one round trip."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from leveret.conductor.database import Connection
from leveret.shared.errors import Problem

_LOOK = """
SELECT 'buried' AS what, vm_id::text AS one, project_id AS two, NULL::jsonb AS document FROM tombstones
WHERE (vm_id, project_id) IN (SELECT * FROM unnest($1::uuid[], $2::text[]))
UNION ALL
SELECT 'rejected', vm_id::text, project_id, jsonb_build_object('request_id', request_id, 'problem', problem)
FROM rejections WHERE (vm_id, project_id) IN (SELECT * FROM unnest($1::uuid[], $2::text[]))
UNION ALL
SELECT 'taken', project_id, name, NULL FROM vms
WHERE state <> 'deleted' AND (project_id, name) IN (SELECT * FROM unnest($2::text[], $3::text[]))
UNION ALL
SELECT 'network', name, NULL, NULL FROM networks WHERE name = ANY($4)
UNION ALL
SELECT 'image', name, NULL, jsonb_build_object('name', name, 'url', url, 'sha256', sha256, 'format', format) FROM images
WHERE name = ANY($5)
"""


@dataclass(slots=True)
class Surroundings:
    """What there is already.

    `buried` are ids with their projects, `taken` names with theirs; `rejected` says for an id in a project
    which request was refused, and why.
    """

    buried: set[tuple[UUID, str]] = field(default_factory=set)
    rejected: dict[tuple[UUID, str], tuple[str, Problem]] = field(default_factory=dict)
    taken: set[tuple[str, str]] = field(default_factory=set)
    networks: set[str] = field(default_factory=set)
    images: dict[str, dict[str, Any]] = field(default_factory=dict)


async def look(
    connection: Connection,
    wanted: Sequence[tuple[UUID, str, str]],
    networks: Iterable[str],
    images: Iterable[str],
) -> Surroundings:
    """What there is already of these (id, project, name), of these networks and of these registered images."""
    found = Surroundings()
    columns = [list(column) for column in zip(*wanted, strict=True)]
    for row in await connection.fetch(_LOOK, *columns, list(networks), list(images)):
        match row["what"]:
            case "buried":
                found.buried.add((UUID(row["one"]), row["two"]))
            case "rejected":
                problem = Problem.model_validate(row["document"]["problem"])
                found.rejected[UUID(row["one"]), row["two"]] = (row["document"]["request_id"], problem)
            case "taken":
                found.taken.add((row["one"], row["two"]))
            case "network":
                found.networks.add(row["one"])
            case "image":
                found.images[row["one"]] = row["document"]
    return found
