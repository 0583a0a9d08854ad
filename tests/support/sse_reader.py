"""Reading server-sent events as a browser does (WHATWG HTML, 9.2.6)."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from httpx2 import AsyncClient, Response

ACCEPT = {"Accept": "text/event-stream"}


@dataclass(frozen=True)
class Event:
    id: str | None
    name: str
    data: dict[str, Any]


class Stream:
    """One connection. `last_id` is where to go on when it breaks."""

    def __init__(self, response: Response, last_id: str = "") -> None:
        self.response = response
        self.last_id = last_id
        self.comments = 0
        self.retry_ms: int | None = None
        self._lines = response.aiter_lines()
        self._held: list[str] = []

    async def next(self) -> Event | None:
        """The next event; None when the stream ends. What a cut connection left half is dropped, as it should be."""
        async for line in self._lines:
            if line:
                self._held.append(line)
            elif (event := self._dispatch()) is not None:
                return event
        return None

    async def take(self, count: int) -> list[Event]:
        """The next so many events; fewer only when the stream ends."""
        taken: list[Event] = []
        while len(taken) < count and (event := await self.next()) is not None:
            taken.append(event)
        return taken

    async def next_comment(self) -> None:
        """Return at the next heartbeat; what comes before it must not be an event."""
        async for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
                return
            assert not line or line.startswith("retry:"), line
        raise AssertionError("the stream ended")

    def _dispatch(self) -> Event | None:
        lines, self._held = self._held, []
        fields: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not name:
                self.comments += 1
            elif name == "retry":
                self.retry_ms = int(value)
            else:
                assert name in {"id", "event", "data"}, line
                assert name not in fields, line
                fields[name] = value
        if "id" in fields:
            self.last_id = fields["id"]
        if "data" not in fields:
            return None
        return Event(fields.get("id"), fields.get("event", "message"), json.loads(fields["data"]))


@asynccontextmanager
async def streaming(
    client: AsyncClient, path: str = "/v1/events", *, last_id: str = "", **params: Any
) -> AsyncIterator[Stream]:
    """A stream, once it has begun."""
    headers = ACCEPT | ({"Last-Event-ID": last_id} if last_id else {})
    async with client.stream("GET", path, params=params, headers=headers, timeout=60) as response:
        if response.status_code != 200:
            await response.aread()
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        yield Stream(response, last_id)
