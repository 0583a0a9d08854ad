"""Addresses: each is a row, and taking one is taking a row."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from ipaddress import IPv4Address
from uuid import UUID

from leveret.conductor.database import Connection

_RESERVE = """
SELECT address FROM addresses WHERE network = $1 AND vm_id IS NULL
ORDER BY freed_at, address LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
"""


async def reserve(connection: Connection, wanted: Counter[str]) -> dict[str, list[IPv4Address]]:
    """Lock up to so many free addresses of each network; they are taken by `take`, or free again at the rollback."""
    reserved: dict[str, list[IPv4Address]] = defaultdict(list)
    for network in sorted(wanted):
        rows = await connection.fetch(_RESERVE, network, wanted[network])
        reserved[network] = [row["address"] for row in rows]
    return reserved


async def take(connection: Connection, taken: Sequence[tuple[str, IPv4Address, UUID]]) -> None:
    if taken:
        await connection.execute(
            """UPDATE addresses SET vm_id = t.vm_id
            FROM unnest($1::text[], $2::inet[], $3::uuid[]) AS t (network, address, vm_id)
            WHERE addresses.network = t.network AND addresses.address = t.address""",
            [network for network, _, _ in taken],
            [address for _, address, _ in taken],
            [vm_id for _, _, vm_id in taken],
        )


async def free(connection: Connection, vm_ids: Sequence[UUID]) -> None:
    if vm_ids:
        await connection.execute(
            "UPDATE addresses SET vm_id = NULL, freed_at = now() WHERE vm_id = ANY($1)", list(vm_ids)
        )
