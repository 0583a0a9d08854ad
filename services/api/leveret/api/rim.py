"""The rim of the API: every request gets an id, a limit, a log line, a measurement, and an answer even for a defect."""

import time
from typing import Any

import structlog
from fastapi import FastAPI, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leveret.api.metrics import Metrics
from leveret.api.problems import answer
from leveret.shared import ids
from leveret.shared.errors import Code, Problem
from leveret.shared.fault_points import take
from leveret.shared.headers import is_request_id, trace_id_in

log = structlog.get_logger()

_METHODS = frozenset({"GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH"})
_V1 = "/v1/"


class Rim:
    """An ASGI middleware: the outermost part that is ours."""

    def __init__(self, app: ASGIApp, *, api: FastAPI, metrics: Metrics, max_in_flight: int) -> None:
        self._app = app
        self._api = api
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self._api
        state = scope.setdefault("state", {})
        asked = Headers(scope=scope)
        state["request_id"] = request_id = request_id_from(asked.get("x-request-id"))
        state["trace_id"] = trace_id_in(asked.get("traceparent"))
        began = time.perf_counter()
        status, answered = 0, None

        async def send_named(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], time.perf_counter()
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                _protect(headers, is_private="authorization" in asked)
                await take("api.answer", send, message)
            else:
                await send(message)

        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        try:
            if self._in_flight > self._max_in_flight and scope["path"].startswith(_V1):
                problem = Problem.of(Code.UNAVAILABLE, "Too many requests are under way here.")
                await answer(Request(scope), problem)(scope, receive, send_named)
            else:
                await self._app(scope, receive, send_named)
        except Exception:  # the rim
            log.exception("request.crashed", request_id=request_id)
            if status:
                raise  # the answer has begun: all that is left is to cut it off
            problem = Problem.of(Code.INTERNAL, "Something went wrong here.")
            await answer(Request(scope), problem)(scope, receive, send_named)
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)
            now = time.perf_counter()
            self._measure(scope, status, (answered or now) - began)
            self._note(scope, status, now - began, state)

    def _measure(self, scope: Scope, status: int, seconds: float) -> None:
        """A stream may last for days; how long it took to begin says how this process does."""
        route, method = _named(scope)
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.request_seconds.labels(route, method).observe(seconds)

    def _note(self, scope: Scope, status: int, seconds: float, state: dict[str, Any]) -> None:
        route, method = _named(scope)
        note = log.info if route.startswith(_V1) or status >= 500 else log.debug
        trace = {"trace_id": state["trace_id"]} if state["trace_id"] else {}
        note(
            "request.done",
            method=method,
            route=route,
            status=status,
            duration_ms=round(seconds * 1000, 1),
            request_id=state["request_id"],
            project=state.get("project"),
            **trace,
        )


def _named(scope: Scope) -> tuple[str, str]:
    """Route and method, as few as there are names for."""
    route: str = getattr(scope.get("route"), "path", "(none)")
    return route, scope["method"] if scope["method"] in _METHODS else "(other)"


def _protect(headers: MutableHeaders, *, is_private: bool) -> None:
    """Nobody guesses what an answer is, and nobody on the way keeps what one token was told."""
    headers["X-Content-Type-Options"] = "nosniff"
    if is_private:
        # What has an ETag may be kept by who asked, if it is asked about each time.
        headers.setdefault("Cache-Control", "private, no-cache" if "etag" in headers else "no-store")


def request_id_from(given: str | None) -> str:
    """The caller's own, if it can be one; a write with one that cannot is refused later on, under another."""
    return given if given is not None and is_request_id(given) else str(ids.new_id())
