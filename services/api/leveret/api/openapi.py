"""The OpenAPI description: what FastAPI knows of parameters, and what the table of routes knows of everything else."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from leveret.api import examples, problems
from leveret.api.bodies import media_types
from leveret.api.fleet import TRUNCATED_HEADER
from leveret.api.headers import IF_MATCH_PATTERN, KEY_MAX_CHARS, LAST_EVENT_ID_PATTERN
from leveret.api.hosts import says_something
from leveret.api.routes import ROUTES, Route
from leveret.api.vms import WAIT_HEADER
from leveret.shared.errors import Code
from leveret.shared.headers import REQUEST_ID_PATTERN

DESCRIPTION = """\
*Get me a VM.* Every write is a request that is first queued, so that it cannot be lost, then judged, then carried out:
the answer `202` says how far it came, and `?wait=` waits for the end. Asking again with the same id, or the same
`Idempotency-Key`, is always safe. Every failure is a problem document with a stable `code` and a `hint`.
"""
_TAGS = [
    {"name": "vms", "description": "Ask for VMs, change them, read them."},
    {"name": "events", "description": "What happened, in order, without gaps: resume after the last `seq` you saw."},
    {"name": "groups", "description": "VMs that are placed with regard to each other: apart, or together."},
    {"name": "fleet", "description": "What VMs run on and are made from."},
    {
        "name": "projects",
        "description": "Projects, their limits, and who may speak for them. Administrators change them.",
    },
    {"name": "system", "description": "About this process. No token is needed."},
]
_REF = "#/components/schemas/{model}"
_TEXT = {"type": "string"}

#: What may stand in the head of a request, by the names in the table of routes; a header of two kinds has two.
PARAMETERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Request-Id": ("Names this request in logs; what cannot be a name is replaced.", _TEXT),
    "X-Request-Id.write": (
        "Names this request in logs, messages and events: 1 to 128 printable ASCII characters without spaces. "
        "A VM does not carry out a request it has heard before: with the same name it is safe "
        "to ask again.",
        {"type": "string", "pattern": REQUEST_ID_PATTERN},
    ),
    "traceparent": (
        "The trace that this request belongs to (W3C Trace Context); it is passed on with messages.",
        _TEXT,
    ),
    "Idempotency-Key": (
        "Makes it safe to ask again: the same key in a project always means the same VM.",
        {"type": "string", "minLength": 1, "maxLength": KEY_MAX_CHARS, "pattern": "^[ -~]+$"},
    ),
    "If-Match": (
        "The ETag that the VM must still have, or only the generation in it; `*` for any.",
        {"type": "string", "pattern": IF_MATCH_PATTERN},
    ),
    "If-None-Match": ("Answer 304 when the VM still has this ETag.", _TEXT),
    "Last-Event-ID": (
        "The `seq` of the last event that was seen: a browser sends it when it comes back. It goes before `after`.",
        {"type": "string", "pattern": LAST_EVENT_ID_PATTERN},
    ),
}
#: What may stand in the head of an answer.
HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Request-Id": ("The name of this request in logs, messages and events.", _TEXT),
    "Location": ("Where it is, or will be.", _TEXT),
    "ETag": ("Changes with the document.", _TEXT),
    WAIT_HEADER: ("What became of `?wait=`.", {"type": "string", "enum": ["reached", "failed", "timed_out"]}),
    TRUNCATED_HEADER: ("Whether there was more.", {"type": "string", "enum": ["true", "false"]}),
    "Cache-Control": ("It is not to be kept on its way.", {"type": "string", "enum": ["no-store"]}),
    "Retry-After": ("Seconds to wait.", {"type": "integer", "minimum": 1}),
    "WWW-Authenticate": ("How to say who is asking.", _TEXT),
}

_OF_VM = ("getVm getPlacement updateVm deleteVm startVm stopVm rebootVm retryVm listVmEvents readConsole").split()
_OF_PROJECT = (
    "getProject updateQuota deleteProject listProjectEvents listTokens createToken listAmqpUsers addAmqpUser"
).split()
#: What can be done with what was just made: operations, and where their parameters stand in the answer.
LINKS: dict[str, tuple[list[str], dict[str, str]]] = {
    "createVm": (_OF_VM, {"vm_id": "$response.body#/vm_id"}),
    "createVmByKey": (_OF_VM, {"vm_id": "$response.body#/vm_id"}),
    "createGroup": (["getGroup", "deleteGroup"], {"group": "$response.body#/name"}),
    "createProject": (_OF_PROJECT, {"project": "$response.body#/id"}),
    "createToken": (["revokeToken"], {"project": "$response.body#/project", "token_id": "$response.body#/id"}),
    "addAmqpUser": (["removeAmqpUser"], {"project": "$response.body#/project", "user": "$response.body#/name"}),
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
    document["components"]["parameters"] = {
        name: {"name": name.partition(".")[0], "in": "header", "required": False, "description": text, "schema": schema}
        for name, (text, schema) in PARAMETERS.items()
    }
    document["components"]["headers"] = {
        name: {"description": text, "schema": schema} for name, (text, schema) in HEADERS.items()
    }
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
            "required": says_something(route.takes)
            or ("/actions/" not in route.path and route.operation != "runCheck"),
            "content": dict.fromkeys(media_types(route.takes), _shown(names[route.takes])),
        }
    named = (*(("X-Request-Id",) if route.method == "GET" else ("X-Request-Id.write", "traceparent")), *route.reads)
    operation["parameters"] = [
        *operation.get("parameters", []),
        *({"$ref": f"#/components/parameters/{name}"} for name in named),
    ]
    answers = {str(status): _success(route, status, names, text) for status, text in _successes(route)}
    operation["responses"] = answers | _problems(route, docs_url)


def _successes(route: Route) -> tuple[tuple[int, str], ...]:
    usual = {202: "Accepted or queued", 201: "Made", 204: "Done"}.get(route.status, "Success")
    return ((route.status, usual), *route.also)


def _success(route: Route, status: int, names: dict[Any, str], text: str) -> dict[str, Any]:
    told = (
        route.tells if status == route.status else tuple(name for name in route.tells if name in {"Location", "ETag"})
    )
    answer: dict[str, Any] = {"description": text, "headers": _headers("X-Request-Id", *told)}
    if status not in {204, 304}:
        answer["content"] = _content(route, names)
    if route.operation in LINKS:
        operations, parameters = LINKS[route.operation]
        answer["links"] = {name: {"operationId": name, "parameters": parameters} for name in operations}
    return answer


def _content(route: Route, names: dict[Any, str]) -> dict[str, Any]:
    if route.gives is not None:
        content = {route.media: _shown(names[route.gives])}
    else:
        content = {route.media: {"schema": _TEXT if route.media.startswith("text/") else {"type": "object"}}}
    if route.stream is not None:
        content[route.stream] = {"schema": _TEXT, "example": examples.STREAM}
    return content


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


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
        more = {"429": ("Retry-After",), "503": ("Retry-After",), "401": ("WWW-Authenticate",)}.get(status, ())
        answers[status] = {
            "description": ", ".join(f"`{code}`" for code in codes),
            "content": {problems.MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="ProblemView")}, "examples": shown}},
            "headers": _headers("X-Request-Id", *more),
        }
    return answers


def _shown(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(model=name)}, "example": examples.DOCUMENTS[name]}
