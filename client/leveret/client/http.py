"""One HTTP connection to the API: tries again while that is safe, and turns what goes wrong into client errors."""

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2

from leveret.client.errors import ApiError, Unreachable

#: Longer than the API lets a long poll wait, so that the API ends it and not the client.
READ_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_TRY_AGAIN = frozenset({429, 502, 503, 504})

Sleep = Callable[[float], Awaitable[None]]


class Http:
    """Sends requests with the bearer token.

    A request is repeated for up to `retry_for_s` seconds after a failed connection or an answer that says "later",
    with growing, jittered pauses and never sooner than Retry-After asks for.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        retry_for_s: float,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self._retry_for_s = retry_for_s
        self._sleep = sleep
        # Reading the machine's certificates takes longer than a whole request to the API on this machine.
        secure = urlsplit(self.url).scheme == "https"
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
            timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            verify=ssl.create_default_context() if secure else False,
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
        wait_s: float = 0.0,
        repeatable: bool = True,
        retry_for_s: float | None = None,
    ) -> httpx2.Response:
        """The answer, when it is a good one. `wait_s` is how long the API was asked to hold its answer back.

        A request that is not `repeatable` is only sent again when it surely never arrived. Raises ApiError and
        Unreachable.
        """
        headers = {"Content-Type": "application/json"} if body is not None else None
        timeout = httpx2.Timeout(READ_TIMEOUT_S + wait_s, connect=CONNECT_TIMEOUT_S)
        give_up_at = time.monotonic() + (self._retry_for_s if retry_for_s is None else retry_for_s)
        pause_s = _FIRST_PAUSE_S
        while True:
            failure: ApiError | Unreachable
            try:
                response = await self._client.request(
                    method, path, params=params, content=body, headers=headers, timeout=timeout
                )
            except httpx2.TransportError as error:
                failure = Unreachable(self.url, str(error) or type(error).__name__)
                again = repeatable or isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                asked_s = 0.0
            except httpx2.InvalidURL as error:
                raise Unreachable(self.url, str(error)) from error
            else:
                if response.is_success:
                    return response
                failure = problem_in(response)
                again = repeatable and response.status_code in _TRY_AGAIN
                asked_s = failure.retry_after_s or 0.0
            wait_before_s = max(pause_s * random.uniform(0.5, 1.0), asked_s)
            if not again or time.monotonic() + wait_before_s > give_up_at:
                raise failure
            await self._sleep(wait_before_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


def problem_in(response: httpx2.Response) -> ApiError:
    """The problem document in an answer, or what can be said of an answer without one (a proxy's, say)."""
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        document = {}
    return ApiError(
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
