"""What must hold at rest: the product's own rules of the database."""

import asyncpg

from leveret.conductor.invariants import INVARIANTS
from leveret.conductor.invariants.database import violations_of


async def violations(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[str, list[tuple[object, ...]]]:
    """The invariants that do not hold now, with the first of the rows that break them."""
    found = {
        invariant.name: await violations_of(connection, invariant.query) for invariant in INVARIANTS if invariant.query
    }
    return {name: [tuple(row.values()) for row in broken.examples] for name, broken in found.items() if broken.count}
