"""Looking at the rules of the database: one snapshot, nothing locked, bounded in time and size."""

import time
from collections.abc import Collection
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg

from leveret.conductor.database import Connection, Pool, statement
from leveret.conductor.invariants.invariant import Broken, Findings, Invariant, Place
from leveret.conductor.invariants.table import INVARIANTS
from leveret.shared.bus import Paused
from leveret.shared.checks import EXAMPLES_MAX


async def check_database(pool: Pool, places: Collection[Place], *, budget_s: float) -> Findings:
    """Look at every rule in these places. Those for which there is no time in `budget_s` are told as unchecked."""
    findings = Findings()
    until = time.monotonic() + budget_s
    try:
        async with (
            statement(pool) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            await connection.execute("SET LOCAL jit = off")  # compiling takes longer than these queries
            for invariant in INVARIANTS:
                if invariant.place in places and invariant.query is not None:
                    await _look(connection, invariant, until - time.monotonic(), findings)
    except Paused as paused:
        findings.unchecked.append(("postgres", str(paused)))
    return findings


async def _look(connection: Connection, invariant: Invariant, left_s: float, findings: Findings) -> None:
    assert invariant.query is not None
    if left_s < 0.01:
        findings.unchecked.append((invariant.name, "There was no time left for it."))
        return
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL statement_timeout = {int(left_s * 1000)}")
            findings.looked_at[invariant.name] = await violations_of(connection, invariant.query)
    except asyncpg.QueryCanceledError:
        findings.unchecked.append((invariant.name, f"It took longer than {left_s:.0f} s to look."))


async def violations_of(connection: Connection, query: str) -> Broken:
    """How many rows a rule's query returns, and the first of them."""
    rows = await connection.fetch(
        f"SELECT count(*) OVER () AS all_of_them, broken.* FROM ({query}) AS broken LIMIT {EXAMPLES_MAX}"  # noqa: S608
    )
    examples = [{name: _plain(value) for name, value in row.items() if name != "all_of_them"} for row in rows]
    return Broken(rows[0]["all_of_them"] if rows else 0, examples)


def _plain(value: Any) -> Any:
    match value:
        case UUID() | datetime():
            return str(value)
        case Decimal():
            return int(value)
        case _:
            return value
