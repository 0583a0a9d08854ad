"""Problems as HTTP tells them: problem+json (RFC 9457) for everything that is not success."""

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from leveret.shared.errors import Code, LeveretError, Problem
from leveret.shared.messages import shown, words_of

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2

#: Which status tells which code. A code that is not here is only ever read inside a VM or an event.
STATUS: dict[str, HTTPStatus] = {
    Code.INVALID_REQUEST: HTTPStatus.UNPROCESSABLE_ENTITY,
    Code.UNSUPPORTED_CONTENT_TYPE: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    Code.UNKNOWN_TYPE: HTTPStatus.UNPROCESSABLE_ENTITY,
    Code.BODY_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Code.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    Code.FORBIDDEN: HTTPStatus.FORBIDDEN,
    Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.METHOD_NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    Code.VM_NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.VM_DELETED: HTTPStatus.CONFLICT,
    Code.ID_CONFLICT: HTTPStatus.CONFLICT,
    Code.NAME_TAKEN: HTTPStatus.CONFLICT,
    Code.STATE_CONFLICT: HTTPStatus.CONFLICT,
    Code.IMAGE_UNKNOWN: HTTPStatus.UNPROCESSABLE_ENTITY,
    Code.NETWORK_UNKNOWN: HTTPStatus.UNPROCESSABLE_ENTITY,
    Code.GROUP_UNKNOWN: HTTPStatus.UNPROCESSABLE_ENTITY,
    Code.GROUP_NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.GROUP_IN_USE: HTTPStatus.CONFLICT,
    Code.PRECONDITION_FAILED: HTTPStatus.PRECONDITION_FAILED,
    Code.PROJECT_NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.PROJECT_IN_USE: HTTPStatus.CONFLICT,
    Code.TOKEN_NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.HOST_NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.HOST_CONFLICT: HTTPStatus.CONFLICT,
    Code.AMQP_USER_NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.QUOTA_EXCEEDED: HTTPStatus.CONFLICT,
    Code.NO_CAPACITY: HTTPStatus.CONFLICT,
    Code.NO_ADDRESS: HTTPStatus.CONFLICT,
    Code.RATE_LIMITED: HTTPStatus.TOO_MANY_REQUESTS,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.HANDLER_CRASHED: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    # What a host may answer when its console is asked for.
    Code.HOST_SILENT: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.HYPERVISOR_UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.HYPERVISOR_TIMEOUT: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.DOMAIN_MISSING: HTTPStatus.CONFLICT,
}


class FieldError(BaseModel):
    """One fault of a request. The faulty value is never repeated: it may be a secret."""

    field: str
    message: str


class ProblemView(BaseModel):
    """Why a request was not carried out. Branch on `code`; read `detail` and `hint`; report `request_id`."""

    type: str = Field(description="The page that explains the code.")
    title: str
    status: int
    code: Code
    detail: str
    hint: str
    errors: list[FieldError] | None = None
    details: dict[str, Any] | None = None
    request_id: str


def status_of(code: str) -> HTTPStatus:
    return STATUS.get(code, HTTPStatus.INTERNAL_SERVER_ERROR)


_SHORT = {"vm": "VM", "id": "ID", "amqp": "AMQP"}


def title_of(code: str) -> str:
    words = [_SHORT.get(word, word) for word in code.split("_")]
    return " ".join((words[0][0].upper() + words[0][1:], *words[1:]))


def view(problem: Problem, *, request_id: str, docs_url: str, status: int | None = None) -> ProblemView:
    """The document of a problem. Field errors that stand in its details come to the top, as `errors`."""
    details = dict(problem.details)
    errors = details.pop("errors", None)
    for name in ("step", "host"):
        if (value := getattr(problem, name)) is not None:
            details[name] = value
    return ProblemView(
        type=f"{docs_url}#{problem.code}",
        title=title_of(problem.code),
        status=status or status_of(problem.code),
        code=problem.code,
        detail=problem.message,
        hint=problem.hint,
        errors=errors,
        details=details or None,
        request_id=request_id,
    )


def response(problem: ProblemView, headers: dict[str, str] | None = None, **more: Any) -> Response:
    """The answer. `more` is added to the document as extension members."""
    document = problem.model_dump(mode="json", exclude_none=True) | more
    headers = dict(headers or {})
    if problem.status in {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS}:
        headers.setdefault("Retry-After", str(_retry_after_s(problem)))
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers.setdefault("WWW-Authenticate", 'Bearer realm="leveret"')
    if problem.code is Code.BODY_TOO_LARGE:
        headers["Connection"] = "close"  # the rest of the body is not worth reading
    return JSONResponse(document, status_code=problem.status, headers=headers, media_type=MEDIA_TYPE)


def _retry_after_s(problem: ProblemView) -> int:
    told = (problem.details or {}).get("retry_after_s")
    return max(1, math.ceil(told)) if isinstance(told, int | float) else RETRY_AFTER_S


class Refusal(LeveretError):
    """A problem that is told with another status than its code's, or with headers of its own."""

    def __init__(self, problem: Problem, *, status: int | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(problem)
        self.status = status
        self.headers = headers


def answer(
    request: Request, problem: Problem, *, status: int | None = None, headers: dict[str, str] | None = None
) -> Response:
    """This problem as the answer to this request."""
    document = view(
        problem,
        request_id=request.state.request_id,
        docs_url=request.app.state.service.settings.docs_url,
        status=status,
    )
    return response(document, headers)


async def _on_problem(request: Request, error: Exception) -> Response:
    if not isinstance(error, LeveretError):
        raise error
    if isinstance(error, Refusal):
        return answer(request, error.problem, status=error.status, headers=error.headers)
    return answer(request, error.problem)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Parameters of a path or a query that are not as described. Only places and reasons, never values."""
    faults = error.errors() if isinstance(error, RequestValidationError) else []
    errors = [
        {"field": ".".join(shown(part) for part in fault["loc"][1:]) or "(request)", "message": words_of(fault)}
        for fault in faults[:50]
    ]
    return answer(request, Problem.of(Code.INVALID_REQUEST, "The parameters are not valid.", errors=errors))


async def _on_http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: an address or a method that does not exist."""
    status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.INTERNAL_SERVER_ERROR
    match status:
        case HTTPStatus.NOT_FOUND:
            return answer(request, Problem.of(Code.NOT_FOUND, "There is nothing at this address."))
        case HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = ", ".join(_methods_here(request))
            problem = Problem.of(Code.METHOD_NOT_ALLOWED, f"This address answers to {allowed}.")
            return answer(request, problem, headers={"Allow": allowed})
        case _ if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return answer(request, Problem.of(Code.INVALID_REQUEST, "This request cannot be read."), status=status)
        case _:
            return answer(request, Problem.of(Code.INTERNAL, "Something went wrong here."))


def _methods_here(request: Request) -> list[str]:
    """The methods of every route with this path; the framework would only name those of the first."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods
    return sorted(methods)


def install(app: FastAPI) -> None:
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)


#: Who answers to which exception; anything else is a defect, which the rim answers with 500.
HANDLERS = {
    LeveretError: _on_problem,
    RequestValidationError: _on_invalid,
    HTTPException: _on_http,
}
