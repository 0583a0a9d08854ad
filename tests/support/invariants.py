"""What must hold at rest: the product's own rules of the database."""

import asyncpg
from peers import eventually

from leveret.client import Leveret
from leveret.conductor.invariants import INVARIANTS
from leveret.conductor.invariants.database import violations_of
from leveret.shared.checks import CheckReport


async def violations(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[str, list[tuple[object, ...]]]:
    """The invariants that do not hold now, with the first of the rows that break them."""
    found = {
        invariant.name: await violations_of(connection, invariant.query) for invariant in INVARIANTS if invariant.query
    }
    return {name: [tuple(row.values()) for row in broken.examples] for name, broken in found.items() if broken.count}


async def checked(client: Leveret, *, within_s: float = 30.0) -> CheckReport:
    """An installation's own report on itself, with everything looked at: who is just coming back cannot be."""
    report: CheckReport | None = None

    async def is_whole() -> bool:
        nonlocal report
        report = await client.check()
        return not report.unchecked

    await eventually(is_whole, within_s=within_s, what="everything looked at")
    assert report is not None
    return report


def broken_in(report: CheckReport) -> dict[str, tuple[dict[str, object], ...]]:
    """The rules that do not hold, each with examples."""
    return {rule.name: tuple(rule.examples) for rule in report.rules if rule.broken != 0}
