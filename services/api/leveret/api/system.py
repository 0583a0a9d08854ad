"""What needs no token: who this is, whether it lives, whether it is ready, and how to use it."""

import asyncio
import platform

from fastapi import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from leveret.api import queries
from leveret.api.pages import errors_page, operations_page
from leveret.api.params import Nothing
from leveret.api.problems import response, view
from leveret.api.service import Service, service_of
from leveret.shared.errors import Code, LeveretError, Problem

READY_TIMEOUT_S = 2.0

#: What a client may rely on without trying. Only added to.
FEATURES = (
    "capacity",
    "conditional-requests",
    "console-log",
    "count",
    "dry-run",
    "event-feed",
    "event-long-poll",
    "event-stream",
    "groups",
    "idempotency-key",
    "label-filter",
    "label-selectors",
    "long-lists",
    "placement",
    "projects",
    "quotas",
    "vm-update",
    "wait",
    "wait-for-capacity",
    "whoami",
)

#: The pages that /docs serves have neither scripts nor anything from elsewhere.
_PAGE_POLICY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
}


async def index(request: Request, _params: Nothing) -> Response:
    return JSONResponse(
        {
            "name": "leveret",
            "version": service_of(request).version,
            "api_versions": ["v1"],
            "features": FEATURES,
            "docs": "/docs",
            "openapi": "/openapi.json",
        }
    )


async def version(request: Request, _params: Nothing) -> Response:
    return JSONResponse(
        {"name": "leveret-api", "version": service_of(request).version, "python": platform.python_version()}
    )


async def livez(_params: Nothing) -> Response:
    """This process runs. Says nothing about others, so that their trouble never restarts it."""
    return JSONResponse({"alive": True})


async def readyz(request: Request, _params: Nothing) -> Response:
    """Requests can be queued and rows be read. A silent event feed only makes waits slower: told, but no reason."""
    service = service_of(request)
    broker = None if service.link.is_up else "The link to the message broker is down."
    postgres = await _postgres_trouble(service)
    feed = None if service.feed.is_listening else "Postgres does not tell of new events; they are looked for instead."
    closing = "This process is stopping." if service.feed.is_closed else None
    parts = {"broker": broker, "postgres": postgres, "event_feed": feed}
    dependencies = {
        name: {"ok": trouble is None} | ({"why": trouble} if trouble else {}) for name, trouble in parts.items()
    }
    troubles = [trouble for trouble in (broker, postgres, closing) if trouble]
    if not troubles:
        return JSONResponse({"ready": True, "dependencies": dependencies})
    problem = view(
        Problem.of(Code.UNAVAILABLE, " ".join(troubles)),
        request_id=request.state.request_id,
        docs_url=service.settings.docs_url,
    )
    return response(problem, ready=False, dependencies=dependencies)


async def _postgres_trouble(service: Service) -> str | None:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await service.database.row(None, queries.CHECK)
    except LeveretError as error:
        return error.problem.message
    except TimeoutError:
        return f"The database did not answer within {READY_TIMEOUT_S:.0f} seconds."
    return None


async def metrics(request: Request, _params: Nothing) -> Response:
    service = service_of(request)
    service.metrics.broker_up.set(service.link.is_up)
    service.metrics.feed_up.set(service.feed.is_listening)
    service.metrics.watches.set(service.feed.watching)
    service.metrics.streams.set(service.streams.count)
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(request: Request, _params: Nothing) -> Response:
    return JSONResponse(request.app.openapi())


async def docs(request: Request, _params: Nothing) -> Response:
    return HTMLResponse(operations_page(request.app.openapi()), headers=_PAGE_POLICY)


async def error_docs(_params: Nothing) -> Response:
    return HTMLResponse(errors_page(), headers=_PAGE_POLICY)
