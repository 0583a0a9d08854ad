"""Every address of the API, in one table. docs/ and /openapi.json follow it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import Response

from leveret.api import events, fleet, system, vms
from leveret.api.views import EventPage, HostPage, ImagePage, VmPage
from leveret.shared import documents as d
from leveret.shared.errors import Code

_READ = (Code.UNAUTHENTICATED, Code.UNAVAILABLE, Code.INTERNAL)
_LIST = (*_READ, Code.INVALID_REQUEST)
_READ_HOST = (*_READ, Code.NOT_FOUND)
_WRITE = (
    *_READ,
    Code.FORBIDDEN,
    Code.INVALID_REQUEST,
    Code.BODY_TOO_LARGE,
    Code.UNSUPPORTED_CONTENT_TYPE,
    Code.RATE_LIMITED,
)
_CREATE = (
    *_WRITE,
    Code.ID_CONFLICT,
    Code.VM_DELETED,
    Code.NAME_TAKEN,
    Code.IMAGE_UNKNOWN,
    Code.NETWORK_UNKNOWN,
    Code.NO_CAPACITY,
    Code.NO_ADDRESS,
)
_DELETE = (*_READ, Code.FORBIDDEN, Code.INVALID_REQUEST, Code.RATE_LIMITED, Code.VM_NOT_FOUND)
_ACT = (*_WRITE, Code.VM_NOT_FOUND, Code.VM_DELETED, Code.STATE_CONFLICT, Code.NO_CAPACITY)
_GET = (*_READ, Code.VM_NOT_FOUND, Code.INVALID_REQUEST)
_CONSOLE = (*_GET, Code.STATE_CONFLICT, Code.HOST_SILENT, Code.HYPERVISOR_UNAVAILABLE, Code.DOMAIN_MISSING)


@dataclass(frozen=True, slots=True)
class Route:
    """One address and method. `problems` are the codes it may answer with; no `problems`: no token either."""

    method: str
    path: str
    handler: Callable[..., Awaitable[Response]]
    operation: str
    tag: str
    summary: str
    gives: type[BaseModel] | None = None
    status: int = 200
    takes: type[d.Document] | None = None
    problems: tuple[Code, ...] = ()

    @property
    def needs_token(self) -> bool:
        return Code.UNAUTHENTICATED in self.problems


def _change(  # the rows of the table below that ask for something
    method: str,
    path: str,
    handler: Callable[..., Awaitable[Response]],
    operation: str,
    summary: str,
    takes: type[d.Document] | None,
    problems: tuple[Code, ...],
) -> Route:
    return Route(method, path, handler, operation, "vms", summary, d.RequestView, 202, takes, problems)


_VM = "/v1/vms/{vm_id}"
_ACTIONS = f"{_VM}/actions"

ROUTES: tuple[Route, ...] = (
    _change("PUT", _VM, vms.put_vm, "createVm", "Get me a VM, with an id of my own", d.CreateVm, _CREATE),
    _change("POST", "/v1/vms", vms.post_vm, "createVmByKey", "Get me a VM", d.CreateVm, _CREATE),
    _change("DELETE", _VM, vms.delete_vm, "deleteVm", "Make it go away", None, _DELETE),
    _change("POST", f"{_ACTIONS}/start", vms.action(d.StartVm), "startVm", "Let it run", d.StartVm, _ACT),
    _change("POST", f"{_ACTIONS}/stop", vms.action(d.StopVm), "stopVm", "Shut it down", d.StopVm, _ACT),
    _change("POST", f"{_ACTIONS}/reboot", vms.action(d.RebootVm), "rebootVm", "Reset it", d.RebootVm, _ACT),
    _change("POST", f"{_ACTIONS}/retry", vms.action(d.RetryVm), "retryVm", "Try again after an error", d.RetryVm, _ACT),
    Route("GET", "/v1/vms", vms.list_vms, "listVms", "vms", "List VMs", VmPage, problems=_LIST),
    Route("GET", _VM, vms.get_vm, "getVm", "vms", "Show a VM, or wait for it", d.VmView, problems=_GET),
    Route("GET", f"{_VM}/console-log", fleet.read_console, "readConsole", "vms", "Read its console", problems=_CONSOLE),
    Route("GET", f"{_VM}/events", events.list_vm_events, "listVmEvents", "events", "Follow", EventPage, problems=_GET),
    Route("GET", "/v1/events", events.list_events, "listEvents", "events", "Follow all VMs", EventPage, problems=_LIST),
    Route("GET", "/v1/hosts", fleet.list_hosts, "listHosts", "fleet", "List hosts", HostPage, problems=_READ),
    Route("GET", "/v1/hosts/{host}", fleet.get_host, "getHost", "fleet", "Show one", d.HostView, problems=_READ_HOST),
    Route("GET", "/v1/images", fleet.list_images, "listImages", "fleet", "List images", ImagePage, problems=_READ),
    Route("GET", "/", system.index, "getIndex", "system", "Who this is and what it can do"),
    Route("GET", "/version", system.version, "getVersion", "system", "Which version runs"),
    Route("GET", "/livez", system.livez, "getLive", "system", "Whether this process lives"),
    Route("GET", "/readyz", system.readyz, "getReady", "system", "Whether it can serve", problems=(Code.UNAVAILABLE,)),
    Route("GET", "/metrics", system.metrics, "getMetrics", "system", "Metrics for Prometheus"),
    Route("GET", "/openapi.json", system.openapi, "getOpenapi", "system", "This description"),
    Route("GET", "/docs", system.docs, "getDocs", "system", "This description, for people"),
    Route("GET", "/docs/errors", system.error_docs, "getErrorDocs", "system", "Every error code, explained"),
)  # fmt: skip


def install(app: FastAPI) -> None:
    for route in ROUTES:
        app.add_api_route(
            route.path,
            route.handler,
            methods=[route.method],
            status_code=route.status,
            response_model=None,
            operation_id=route.operation,
            tags=[route.tag],
            summary=route.summary,
        )
