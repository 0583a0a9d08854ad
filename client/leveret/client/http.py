"""One HTTP connection to the API: tries again while that is safe, and turns what goes wrong into client errors."""

import asyncio
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2

from leveret.client.errors import ApiError, ConfigError, Unreachable, refusal
from leveret.client.inputs import check_request_id, check_token, check_url
from leveret.shared import ids

#: Longer than the API lets a long poll wait, so that the API ends it and not the client.
READ_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_TRY_AGAIN = frozenset({429, 502, 503, 504})
#: Not the network's doing: another attempt would end in the same way.
_NOT_TO_BE_SENT = (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL)
_STREAM = "text/event-stream"

Sleep = Callable[[float], Awaitable[None]]
#: Told before each pause: what went wrong, since when it does, and how much longer it is tried, both in seconds.
OnRetry = Callable[[ApiError | Unreachable, float, float], None]


class Http:
    """Sends requests with the bearer token.

    A request is repeated for up to `retry_for_s` seconds after a failed connection or an answer that says "later",
    with growing, jittered pauses and never sooner than Retry-After asks for. Raises ConfigError when url or token
    cannot be one; what was wrong with them is told without them.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        retry_for_s: float,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
        on_retry: OnRetry | None = None,
    ) -> None:
        self.url = check_url(url)
        self._retry_for_s = retry_for_s
        self.sleep = sleep
        self._on_retry = on_retry
        # Reading the machine's certificates takes longer than a whole request to the API on this machine.
        secure = urlsplit(self.url).scheme == "https"
        try:
            base_url = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise self._not_to_be_sent(error) from None
        self._client = httpx2.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {check_token(token)}", "Accept": "application/json"},
            timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            verify=ssl.create_default_context() if secure else False,
            # Every watcher holds one for as long as it watches.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
            follow_redirects=False,  # a token goes to the address it was given for and to no other
            transport=transport,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def send(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        body: str | None = None,
        headers: dict[str, str] | None = None,
        request_id: str | None = None,
        wait_s: float = 0.0,
        repeatable: bool = True,
        missing_is_done: bool = False,
        retry_for_s: float | None = None,
    ) -> httpx2.Response:
        """The answer, when it is a good one. `wait_s` is how long the API was asked to hold its answer back.

        Whatever changes something has an X-Request-Id of its own, the same each time it is sent: Leveret carries it out
        once. A request that is not `repeatable` all the same is only sent again when it surely never arrived. With
        `missing_is_done` a 404 to a repetition is good news: the first one removed what it was about. Raises ApiError,
        Unreachable, and ValueError or ConfigError for what cannot be sent at all.
        """
        headers = dict(headers or {})
        if body is not None:
            headers["Content-Type"] = "application/json"
        if method != "GET":
            headers["X-Request-Id"] = str(ids.new_id()) if request_id is None else check_request_id(request_id)
        timeout = httpx2.Timeout(READ_TIMEOUT_S + wait_s, connect=CONNECT_TIMEOUT_S)
        began_at = time.monotonic()
        give_up_at = began_at + (self._retry_for_s if retry_for_s is None else retry_for_s)
        pause_s = _FIRST_PAUSE_S
        is_repetition = False
        while True:
            failure: ApiError | Unreachable
            try:
                response = await self._client.request(
                    method, path, params=params, content=body, headers=headers, timeout=timeout
                )
            except _NOT_TO_BE_SENT as error:
                raise self._not_to_be_sent(error) from None
            except httpx2.TransportError as error:
                failure = self._unreachable(error)
                again = repeatable or isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                asked_s = 0.0
            else:
                if response.is_success or (missing_is_done and is_repetition and response.status_code == 404):
                    return response
                failure = problem_in(response)
                again = repeatable and response.status_code in _TRY_AGAIN
                asked_s = failure.retry_after_s or 0.0
            wait_before_s = max(pause_s * random.uniform(0.5, 1.0), asked_s)
            now = time.monotonic()
            if not again or now + wait_before_s > give_up_at:
                raise failure
            if self._on_retry is not None:
                self._on_retry(failure, now - began_at, give_up_at - now)
            await self.sleep(wait_before_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            is_repetition = True

    @asynccontextmanager
    async def listen(
        self, path: str, *, params: dict[str, Any], headers: dict[str, str], silence_s: float
    ) -> AsyncIterator[AsyncIterator[httpx2.ServerSentEvent]]:
        """One stream of server-sent events, open: nothing here tries again.

        A connection on which no byte comes for `silence_s` seconds counts as cut. Raises ApiError when it is refused,
        and Unreachable when it breaks, on entering or while it is read.
        """
        timeout = httpx2.Timeout(CONNECT_TIMEOUT_S, read=silence_s)
        try:
            async with self._client.sse(path, params=params, headers=headers, timeout=timeout) as source:
                response = source.response
                kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                if not response.is_success:
                    await response.aread()
                    raise problem_in(response)
                if kind != _STREAM:
                    raise unreadable(response, f"it sent {kind or 'nothing'} and not {_STREAM}")
                yield aiter(source)
        except _NOT_TO_BE_SENT as error:
            raise self._not_to_be_sent(error) from None
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def _not_to_be_sent(self, error: Exception) -> ConfigError:
        """Its own text is never told: it repeats what was to be sent, the token too."""
        return ConfigError(f"a request to {self.url} cannot be sent as it is ({type(error).__name__}).")

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(self.url, str(error) or type(error).__name__)


def unreadable(response: httpx2.Response, why: str) -> ApiError:
    """The error for an answer that is not what the API of this version sends; a proxy's, perhaps."""
    request_id = response.headers.get("x-request-id")
    message = f"the answer cannot be read: {why}"
    return refusal("unreadable_answer", message, status=response.status_code, request_id=request_id)


def problem_in(response: httpx2.Response) -> ApiError:
    """The problem document in an answer, or what can be said of an answer without one (a proxy's, say)."""
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        document = {}
    return refusal(
        status=response.status_code,
        code=str(document.get("code") or f"http_{response.status_code}"),
        message=str(document.get("detail") or document.get("title") or response.reason_phrase or "no reason given"),
        hint=str(document.get("hint") or ""),
        request_id=document.get("request_id") or response.headers.get("x-request-id"),
        errors=[fault for fault in document.get("errors") or [] if isinstance(fault, dict)],
        details=document.get("details") or {},
        retry_after_s=_seconds(response.headers.get("retry-after")),
    )


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; its form as a date is not used by the API."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
