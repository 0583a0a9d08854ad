"""A project's VMs as one list of any length, read and sent in batches."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from uuid import UUID

import asyncpg
from pydantic_core import to_json

from leveret.api import queries, views
from leveret.api.auth import Asker
from leveret.api.database import Database
from leveret.api.paging import cursor_of
from leveret.api.params import ListParams
from leveret.shared.lifecycle import State

#: VMs in the first batch, which somebody waits for, and in those after it.
_FIRST = 100
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Batch:
    """Some VMs. `goes_on` says that there are more, which may be `wanted` in this answer or not."""

    rows: list[asyncpg.Record]
    goes_on: bool
    wanted: int

    @property
    def is_last(self) -> bool:
        return not self.goes_on or not self.wanted

    @property
    def cursor(self) -> str | None:
        return cursor_of(self.rows[-1]["id"]) if self.goes_on else None

    def items(self) -> bytes:
        return b",".join(views.vm(row).model_dump_json().encode() for row in self.rows)


async def batches(database: Database, asker: Asker, params: ListParams) -> AsyncGenerator[Batch, None]:
    """The VMs of the asker's project in the order of their ids.

    What comes and goes meanwhile neither moves nor doubles another. Raises LeveretError `unavailable`, or
    `unauthenticated` when the token has ended before the list did.
    """
    project = asker.identity.project
    query = queries.LIST_ALL_VMS if State.DELETED in params.state else queries.LIST_LIVE_VMS
    states = [state.value for state in params.state] or None
    after: UUID | None = params.after()
    labels = params.labels()
    wanted, size = params.limit, _FIRST
    while True:
        count = min(size, wanted)
        await asker.confirm()
        matching = (states, labels, params.host, params.name, params.group)
        rows = await database.rows(project, query, project, after, *matching, count + 1)
        batch = Batch(rows[:count], goes_on=len(rows) > count, wanted=wanted - count)
        yield batch
        if batch.is_last:
            return
        after, wanted, size = batch.rows[-1]["id"], batch.wanted, _BATCH


def whole(batch: Batch) -> bytes:
    """The page when one batch is all of it."""
    return _HEAD + batch.items() + _tail(batch)


async def pieces(first: Batch, following: AsyncGenerator[Batch, None]) -> AsyncGenerator[bytes, None]:
    """The same, batch by batch. It is a whole document only if nothing went wrong to the end."""
    async with aclosing(following):
        yield _HEAD + first.items()
        last = first
        async for last in following:
            if last.rows:  # those that were still to come may have gone meanwhile
                yield b"," + last.items()
        yield _tail(last)


_HEAD = b'{"items":['


def _tail(last: Batch) -> bytes:
    return b'],"next":' + to_json(last.cursor) + b"}"
