"""Watching: server-sent events, resumed by themselves, each exactly once and in order."""

import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from httpx2 import ServerSentEvent
from pydantic import BaseModel, ValidationError

from leveret.client.errors import ApiError, EventGap, Unreachable, refusal
from leveret.client.http import Http
from leveret.shared.documents import EventView

#: How long a watcher keeps knocking at an API that went away: a restart takes 2 s, a machine's reboot a minute.
WATCH_RETRY_S = 90.0
#: The API says something every 15 s, if only a comment. After this time without a byte the connection is dead.
SILENCE_S = 40.0
_STEADY_S = 1.0
_FIRST_PAUSE_S = 0.1
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 5.0

OnGap = Callable[[EventGap], None]


class _Gap(BaseModel):
    """The data of an `event: gap`: up to where the log is forgotten, and with what it ends."""

    forgotten_seq: int = 0
    last_seq: int | None = None


@dataclass
class Watch:
    """One watcher of one address. `after` is the number of the last event that it has given away."""

    http: Http
    path: str
    after: int
    give_up_s: float = WATCH_RETRY_S
    silence_s: float = SILENCE_S
    on_gap: OnGap | None = None

    async def events(self) -> AsyncGenerator[EventView, None]:
        """Events for ever. Raises what went wrong last when there was no API for `give_up_s`, and a refusal at once."""
        failures, down_since, resuming = 0, 0.0, False
        while True:
            steady_at = time.monotonic() + _STEADY_S
            failure: ApiError | Unreachable
            try:
                async with self.http.listen(
                    self.path, params=self._params(resuming), headers=self._headers(resuming), silence_s=self.silence_s
                ) as frames:
                    down_since, resuming = 0.0, True
                    async for frame in frames:
                        event = self._event_in(frame)
                        if event is not None:
                            failures = 0
                            yield event
                failure = Unreachable(self.http.url, "it ended the stream of events")
            except ApiError as error:
                if error.status not in {408, 429} and error.status < 500:
                    raise
                failure = error
            except Unreachable as error:
                failure = error
            now = time.monotonic()
            failures = 0 if not down_since and now > steady_at else failures
            down_since = down_since or now
            pause_s = self._pause_s(failures, failure)
            failures += 1
            if now + pause_s - down_since > self.give_up_s:
                raise failure
            await self.http.sleep(pause_s)

    def _params(self, resuming: bool) -> dict[str, int]:
        return {} if resuming else {"after": self.after}

    def _headers(self, resuming: bool) -> dict[str, str]:
        return {"Last-Event-ID": str(self.after)} if resuming else {}

    def _event_in(self, frame: ServerSentEvent) -> EventView | None:
        """The event in a frame, when it is one that was not yet given away."""
        if not frame.data:
            return None  # the server's `retry`, say
        try:
            if frame.event == "gap":
                self._skip(_Gap.model_validate_json(frame.data))
                return None
            event = EventView.model_validate_json(frame.data)
        except ValidationError as error:
            raise refusal("unreadable_answer", f"an event cannot be read: {error}", status=200) from error
        if event.seq <= self.after:
            return None
        self.after = event.seq
        return event

    def _skip(self, gap: _Gap) -> None:
        """Go on behind what is forgotten, or from the end of a log that does not reach to where this watcher was."""
        if gap.last_seq is not None and gap.last_seq < self.after:
            until = gap.last_seq
        elif gap.forgotten_seq > self.after:
            until = gap.forgotten_seq
        else:
            return
        error = EventGap(self.after, until)
        self.after = until
        if self.on_gap is None:
            raise error
        self.on_gap(error)

    @staticmethod
    def _pause_s(failures: int, failure: ApiError | Unreachable) -> float:
        """Back at once after a cut; an API that is away is knocked at more and more seldom, by everybody apart."""
        longest_s = _FIRST_PAUSE_S if failures == 0 else min(_PAUSE_S * 2.0 ** (failures - 1), _LONGEST_PAUSE_S)
        asked_s = (failure.retry_after_s or 0.0) if isinstance(failure, ApiError) else 0.0
        return max(asked_s, longest_s * random.uniform(0.3, 1.0))
