"""The OpenAPI description: what FastAPI knows of parameters, and what the table of routes knows of everything else."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from leveret.api import examples, problems
from leveret.api.routes import ROUTES, Route
from leveret.api.vms import WAIT_HEADER
from leveret.shared.errors import Code

DESCRIPTION = """\
*Get me a VM.* Every write is a request that is first queued, so that it cannot be lost, then judged, then carried out:
the answer `202` says how far it came, and `?wait=` waits for the end. Asking again with the same id, or the same
`Idempotency-Key`, is always safe. Every failure is a problem document with a stable `code` and a `hint`.
"""
_TAGS = [
    {"name": "vms", "description": "Ask for VMs, change them, read them."},
    {"name": "events", "description": "What happened, in order, without gaps: resume after the last `seq` you saw."},
    {"name": "fleet", "description": "What VMs run on and are made from."},
    {"name": "system", "description": "About this process. No token is needed."},
]
_REF = "#/components/schemas/{model}"
_REQUEST_ID = {
    "description": "Names this request in logs and messages. Give your own in the header of the same name.",
    "schema": {"type": "string"},
}
_HEADERS: dict[str, dict[str, Any]] = {
    "Location": {"description": "Where the VM is, or will be.", "schema": {"type": "string"}},
    "ETag": {"description": "Changes with the document.", "schema": {"type": "string"}},
    WAIT_HEADER: {
        "description": "What became of `?wait=`.",
        "schema": {"type": "string", "enum": ["reached", "failed", "timed_out"]},
    },
}
_KEY_PARAMETER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Makes it safe to ask again: the same key in a project always means the same VM.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
_REQUEST_ID_PARAMETER = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "Makes it safe to ask again: a VM does not carry out a request that it has heard before.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"},
}


def describe(app: FastAPI, *, version: str, docs_url: str) -> dict[str, Any]:
    """The whole description, as /openapi.json shows it."""
    document = get_openapi(
        title="Leveret",
        version=version,
        summary="Get me a VM.",
        description=DESCRIPTION,
        routes=app.routes,
        tags=_TAGS,
    )
    names = _add_schemas(document)
    document["components"]["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "A token of a project."}
    }
    for route in ROUTES:
        _complete(document["paths"][route.path][route.method.lower()], route, names, docs_url)
    return document


def _add_schemas(document: dict[str, Any]) -> dict[Any, str]:
    """Put every document into the components, and say by which name. FastAPI's own error schemas go: ours are other."""
    given = {model for route in ROUTES if (model := route.gives) is not None} | {problems.ProblemView}
    taken = {model for route in ROUTES if (model := route.takes) is not None}
    wanted = [(model, "serialization") for model in given] + [(model, "validation") for model in taken]
    wanted.sort(key=lambda pair: pair[0].__name__)
    refs, schemas = models_json_schema(wanted, ref_template=_REF)  # type: ignore[arg-type]
    components = document.setdefault("components", {}).setdefault("schemas", {})
    components.update(schemas["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    return {model: schema["$ref"].rsplit("/", 1)[1] for (model, _), schema in refs.items()}


def _complete(operation: dict[str, Any], route: Route, names: dict[Any, str], docs_url: str) -> None:
    if route.needs_token:
        operation["security"] = [{"token": []}]
    if route.takes is not None:
        operation["requestBody"] = {
            "required": route.path.endswith("}") or route.path == "/v1/vms",
            "content": {"application/json": _shown(names[route.takes])},
        }
    headers = [_KEY_PARAMETER] if route.operation == "createVmByKey" else []
    if "/actions/" in route.path:
        headers.append(_REQUEST_ID_PARAMETER)
    if headers:
        operation["parameters"] = [*operation.get("parameters", []), *headers]
    success: dict[str, Any] = {"description": "Accepted or queued" if route.status == 202 else "Success"}
    if route.gives is not None:
        success["content"] = {"application/json": _shown(names[route.gives])}
    elif route.operation in _TEXTS:
        success["content"] = {_TEXTS[route.operation]: {"schema": {"type": "string"}}}
    else:
        success["content"] = {"application/json": {"schema": {"type": "object"}}}
    shown = (
        ("Location", WAIT_HEADER)
        if route.status == 202
        else ("ETag", WAIT_HEADER)
        if route.operation == "getVm"
        else ()
    )
    success["headers"] = {"X-Request-Id": _REQUEST_ID} | {name: _HEADERS[name] for name in shown}
    operation["responses"] = {str(route.status): success} | _problems(route, docs_url)
    if route.operation == "getVm":
        operation["responses"]["304"] = {"description": "Not changed since the ETag in If-None-Match"}


def _problems(route: Route, docs_url: str) -> dict[str, Any]:
    by_status: dict[str, list[Code]] = {}
    for code in route.problems:
        told = problems.status_of(code)
        if route.operation == "createVmByKey" and code is Code.ID_CONFLICT:
            told = HTTPStatus.UNPROCESSABLE_ENTITY
        by_status.setdefault(str(told.value), []).append(code)
    answers: dict[str, Any] = {}
    for status, codes in sorted(by_status.items()):
        shown = {
            code.value: {"value": examples.problem(code, int(status), problems.title_of(code), docs_url)}
            for code in codes
        }
        headers: dict[str, Any] = {"X-Request-Id": _REQUEST_ID}
        if status in {"429", "503"}:
            headers["Retry-After"] = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
        if status == "401":
            headers["WWW-Authenticate"] = {"schema": {"type": "string"}}
        answers[status] = {
            "description": ", ".join(f"`{code}`" for code in codes),
            "content": {problems.MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="ProblemView")}, "examples": shown}},
            "headers": headers,
        }
    return answers


def _shown(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(model=name)}, "example": examples.DOCUMENTS[name]}


_TEXTS = {
    "readConsole": "text/plain",
    "getMetrics": "text/plain",
    "getDocs": "text/html",
    "getErrorDocs": "text/html",
}
