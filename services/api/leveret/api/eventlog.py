"""Reading the event log of a project: what comes after a number, and whether anything before it may be missing."""

from dataclasses import dataclass
from uuid import UUID

from leveret.api import queries, views
from leveret.api.database import Database
from leveret.shared.documents import EventView


@dataclass(frozen=True, slots=True)
class Page:
    """Some events after a number.

    `checked` is the number up to which there are no others that were asked for; `is_full` says that there may be more
    after it. What is not greater than `forgotten_seq` may be forgotten. `last_seq` is the newest event that there is:
    it is only less than the number that was asked with when that is of another installation or a lost time.
    """

    items: tuple[EventView, ...]
    checked: int
    is_full: bool
    forgotten_seq: int
    last_seq: int


class EventLog:
    """Every verb raises LeveretError `unavailable`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def newest(self, project: str) -> int:
        """The number of the newest event; 0 when there never was one."""
        row = await self._database.row(project, queries.LAST_SEQ, project)
        return row["last_seq"] if row is not None else 0

    async def read(self, project: str, after: int, limit: int, vm_id: UUID | None = None) -> Page:
        """Up to `limit` events after this number: all of them, or those about one VM."""
        if vm_id is None:
            rows = await self._database.rows(project, queries.LIST_EVENTS, project, after, limit)
        else:
            rows = await self._database.rows(project, queries.LIST_VM_EVENTS, project, after, limit, vm_id)
        items = tuple(views.event(row) for row in rows if row["seq"] is not None)
        is_full = len(items) == limit
        last_seq, forgotten_seq = (rows[0]["last_seq"], rows[0]["forgotten_seq"]) if rows else (after, 0)
        checked = items[-1].seq if is_full else max(after, last_seq)
        return Page(items, checked, is_full, forgotten_seq, last_seq)
