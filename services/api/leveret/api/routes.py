"""Every address of the API, in one table. docs/ and /openapi.json follow it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from fastapi import Depends, FastAPI, params
from pydantic import BaseModel
from starlette.responses import Response

from leveret.api import (
    amqp_users,
    checks,
    events,
    fleet,
    groups,
    hosts,
    placements,
    projects,
    sse,
    system,
    tokens,
    vms,
    whoami,
)
from leveret.api.auth import may_read
from leveret.api.strictness import strictness
from leveret.api.views import (
    AmqpUserPage,
    EventPage,
    GroupPage,
    HostPage,
    ImagePage,
    ProjectPage,
    TokenPage,
    VmPage,
    WhoamiView,
)
from leveret.shared import documents as d
from leveret.shared.checks import CheckReport, RunCheck
from leveret.shared.errors import Code
from leveret.shared.groups import CreateGroup, GroupView
from leveret.shared.placements import CapacityReport, PlacementView

_READ = (Code.UNAUTHENTICATED, Code.UNAVAILABLE, Code.INTERNAL)
_LIST = (*_READ, Code.INVALID_REQUEST)
_BODY = (Code.BODY_TOO_LARGE, Code.UNSUPPORTED_CONTENT_TYPE)

_WRITE = (*_LIST, Code.FORBIDDEN, Code.RATE_LIMITED, Code.PROJECT_NOT_FOUND)
#: Why a create may be refused for good: who looks for its VM is told the same.
_REFUSED = (
    Code.NAME_TAKEN,
    Code.IMAGE_UNKNOWN,
    Code.NETWORK_UNKNOWN,
    Code.GROUP_UNKNOWN,
    Code.QUOTA_EXCEEDED,
    Code.NO_CAPACITY,
    Code.NO_ADDRESS,
)
_CREATE = (*_WRITE, *_BODY, *_REFUSED, Code.ID_CONFLICT, Code.VM_DELETED)
_DELETE = (*_WRITE, Code.VM_NOT_FOUND, Code.PRECONDITION_FAILED)
_UPDATE = (*_DELETE, *_BODY, Code.VM_DELETED, Code.NAME_TAKEN)
_ACT = (*_DELETE, *_BODY, Code.VM_DELETED, Code.STATE_CONFLICT, Code.NO_CAPACITY)
_GET = (*_LIST, Code.VM_NOT_FOUND, *_REFUSED)
_FOLLOW = (*_LIST, Code.RATE_LIMITED, Code.STATE_CONFLICT)
_CONSOLE = (
    *_LIST,
    Code.VM_NOT_FOUND,
    Code.STATE_CONFLICT,
    Code.HOST_SILENT,
    Code.HYPERVISOR_UNAVAILABLE,
    Code.DOMAIN_MISSING,
)
_HOSTS = (*_LIST, Code.FORBIDDEN)
_CAPACITY = (*_LIST, Code.PROJECT_NOT_FOUND, Code.RATE_LIMITED)
_GROUP = (*_LIST, Code.GROUP_NOT_FOUND)
_HOST = (*_HOSTS, Code.HOST_NOT_FOUND, Code.HOST_CONFLICT)
_ORDER_HOST = (*_HOST, *_BODY, Code.PROJECT_NOT_FOUND)

_GET_PROJECT = (*_LIST, Code.PROJECT_NOT_FOUND)
_LOOK = (*_GET_PROJECT, Code.FORBIDDEN)
_ORDER = (*_WRITE, *_BODY)


@dataclass(frozen=True, slots=True)
class Route:
    """One address and method. `problems` are the codes it may answer with; no `problems`: no token either.

    `also` are other answers that are no problem, with what they say; `reads` and `tells` are headers of the request and
    of the answer beside those that all have; `media` is the content type of what is not a document, and `stream` that
    of what is told for as long as somebody listens.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Response]]
    operation: str
    summary: str
    tag: str
    gives: type[BaseModel] | None = None
    status: int = 200
    takes: type[d.Document] | None = None
    problems: tuple[Code, ...] = ()
    also: tuple[tuple[int, str], ...] = ()
    reads: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()
    media: str = "application/json"
    stream: str | None = None

    @property
    def needs_token(self) -> bool:
        return Code.UNAUTHENTICATED in self.problems


_VM = "/v1/vms/{vm_id}"
_DO = f"{_VM}/actions"
_HOST_PATH = "/v1/hosts/{host}"
_DO_HOST = f"{_HOST_PATH}/actions"
_PROJECT = "/v1/projects/{project}"
_GROUP_PATH = "/v1/groups/{group}"
_TOKENS = f"{_PROJECT}/tokens"
_USERS = f"{_PROJECT}/amqp-users"

_JUDGED = ((200, "The answer to a dry run: it would be accepted"),)
_THERE = ((200, "It was there already"),)
_SAME = ((304, "Not changed since the ETag in If-None-Match"),)

# What rows of the table below have in common.
_ask = partial(Route, tag="vms", gives=d.RequestView, status=202, tells=("Location", "ETag", "Leveret-Wait"))
_create = partial(_ask, takes=d.CreateVm, problems=_CREATE, also=_JUDGED)
_change = partial(_ask, reads=("If-Match",))
_act = partial(_change, problems=_ACT)
_vms = partial(Route, tag="vms", problems=_GET)
_events = partial(Route, tag="events", gives=EventPage, reads=("Last-Event-ID",), stream=sse.MEDIA_TYPE)
_fleet = partial(Route, tag="fleet", problems=_HOSTS)
_host = partial(Route, tag="fleet", gives=d.HostView, problems=_ORDER_HOST)
_groups = partial(Route, tag="groups", problems=_GROUP)
_projects = partial(Route, tag="projects", problems=_GET_PROJECT)
_admin = partial(Route, tag="projects", problems=_ORDER)
_system = partial(Route, tag="system")

ROUTES: tuple[Route, ...] = (
    _create("PUT", _VM, vms.put_vm, "createVm", "Get me a VM, with an id of my own"),
    _create("POST", "/v1/vms", vms.post_vm, "createVmByKey", "Get me a VM", reads=("Idempotency-Key",)),
    _change("PATCH", _VM, vms.patch_vm, "updateVm", "Rename or label it", takes=d.UpdateVm, problems=_UPDATE),
    _change("DELETE", _VM, vms.delete_vm, "deleteVm", "Make it go away", problems=_DELETE),
    _act("POST", f"{_DO}/start", vms.action(d.StartVm), "startVm", "Let it run", takes=d.StartVm),
    _act("POST", f"{_DO}/stop", vms.action(d.StopVm), "stopVm", "Shut it down", takes=d.StopVm),
    _act("POST", f"{_DO}/reboot", vms.action(d.RebootVm), "rebootVm", "Reset it", takes=d.RebootVm),
    _act("POST", f"{_DO}/retry", vms.action(d.RetryVm), "retryVm", "Try again after an error", takes=d.RetryVm),
    _vms("GET", "/v1/vms", vms.list_vms, "listVms", "List VMs", gives=VmPage, problems=_LIST),
    _vms("GET", _VM, vms.get_vm, "getVm", "Show a VM, or wait for it", gives=d.VmView, also=_SAME,
         reads=("If-None-Match",), tells=("ETag", "Leveret-Wait")),
    _vms("GET", f"{_VM}/placement", placements.get_placement, "getPlacement", "Say why it stands where it does",
         gives=PlacementView),
    _vms("GET", f"{_VM}/console-log", fleet.read_console, "readConsole", "Read its console", problems=_CONSOLE,
         media="text/plain", tells=("Leveret-Truncated",)),
    _events("GET", f"{_VM}/events", events.list_vm_events, "listVmEvents", "Follow a VM",
            problems=(*_GET, Code.RATE_LIMITED, Code.STATE_CONFLICT)),
    _events("GET", "/v1/events", events.list_events, "listEvents", "Follow everything", problems=_FOLLOW),
    _events("GET", f"{_PROJECT}/events", events.list_project_events, "listProjectEvents", "Follow a project",
            problems=(*_FOLLOW, Code.PROJECT_NOT_FOUND)),
    _projects("GET", "/v1/whoami", whoami.whoami, "whoami", "Who holds this token", gives=WhoamiView, problems=_LIST),
    _fleet("GET", "/v1/hosts", hosts.list_hosts, "listHosts", "List hosts", gives=HostPage),
    _fleet("GET", _HOST_PATH, hosts.get_host, "getHost", "Show a host", gives=d.HostView, problems=_HOST),
    _host("POST", f"{_DO_HOST}/cordon", hosts.action(d.CordonHost), "cordonHost", "Give it no new VMs",
          takes=d.CordonHost),
    _host("POST", f"{_DO_HOST}/uncordon", hosts.action(d.UncordonHost), "uncordonHost", "Let it take VMs again",
          takes=d.UncordonHost),
    _host("POST", f"{_DO_HOST}/fence", hosts.action(d.FenceHost), "fenceHost", "Declare that it is off, with proof",
          takes=d.FenceHost),
    _host("POST", f"{_DO_HOST}/retire", hosts.action(d.RetireHost), "retireHost", "Give it up for good",
          takes=d.RetireHost),
    _groups("GET", "/v1/groups", groups.list_groups, "listGroups", "List groups", gives=GroupPage, problems=_LIST),
    _groups("POST", "/v1/groups", groups.post_group, "createGroup", "Make a group", status=201, also=_THERE,
            takes=CreateGroup, gives=GroupView, problems=(*_WRITE, *_BODY, Code.NAME_TAKEN), tells=("Location",)),
    _groups("GET", _GROUP_PATH, groups.get_group, "getGroup", "Show a group", gives=GroupView),
    _groups("DELETE", _GROUP_PATH, groups.delete_group, "deleteGroup", "Forget a group without VMs", status=204,
            problems=(*_WRITE, Code.GROUP_NOT_FOUND, Code.GROUP_IN_USE)),
    _fleet("GET", "/v1/capacity", placements.get_capacity, "getCapacity", "Say how many more VMs there is room for",
           gives=CapacityReport, problems=_CAPACITY),
    _fleet("GET", "/v1/images", fleet.list_images, "listImages", "List images", gives=ImagePage, problems=_LIST),
    _fleet("POST", "/v1/checks", checks.post_check, "runCheck", "Check every invariant", takes=RunCheck,
           gives=CheckReport, problems=(*_HOSTS, *_BODY), tells=("Cache-Control",)),
    _projects("GET", "/v1/projects", projects.list_projects, "listProjects", "List projects", gives=ProjectPage,
              problems=_LIST),
    _admin("PUT", _PROJECT, projects.put_project, "createProject", "Make a project", status=201, also=_THERE,
           takes=d.CreateProject, gives=d.ProjectView, problems=(*_ORDER, Code.ID_CONFLICT), tells=("Location",)),
    _projects("GET", _PROJECT, projects.get_project, "getProject", "Show a project", gives=d.ProjectView),
    _admin("PATCH", f"{_PROJECT}/quota", projects.patch_quota, "updateQuota", "Change its limits",
           takes=d.UpdateQuota, gives=d.ProjectView, problems=(*_ORDER, Code.QUOTA_EXCEEDED)),
    _admin("DELETE", _PROJECT, projects.delete_project, "deleteProject", "Close a project", status=204,
           problems=(*_WRITE, Code.PROJECT_IN_USE)),
    _projects("GET", _TOKENS, tokens.list_tokens, "listTokens", "List tokens", gives=TokenPage, problems=_LOOK),
    _admin("POST", _TOKENS, tokens.post_token, "createToken", "Make a token", status=201, takes=d.CreateToken,
           gives=d.NewTokenView, problems=(*_ORDER, Code.NAME_TAKEN), tells=("Cache-Control",)),
    _admin("DELETE", f"{_TOKENS}/{{token_id}}", tokens.delete_token, "revokeToken", "End a token", status=204,
           problems=(*_WRITE, Code.TOKEN_NOT_FOUND)),
    _projects("GET", _USERS, amqp_users.list_amqp_users, "listAmqpUsers", "List broker users", gives=AmqpUserPage,
              problems=_LOOK),
    _admin("PUT", f"{_USERS}/{{user}}", amqp_users.put_amqp_user, "addAmqpUser", "Let a broker user speak for it",
           status=201, also=_THERE, takes=d.AddAmqpUser, gives=d.AmqpUserView, problems=(*_ORDER, Code.ID_CONFLICT)),
    _admin("DELETE", f"{_USERS}/{{user}}", amqp_users.delete_amqp_user, "removeAmqpUser", "Let it speak no more",
           status=204, problems=(*_WRITE, Code.AMQP_USER_NOT_FOUND)),
    _system("GET", "/", system.index, "getIndex", "Who this is and what it can do"),
    _system("GET", "/version", system.version, "getVersion", "Which version runs"),
    _system("GET", "/livez", system.livez, "getLive", "Whether this process lives"),
    _system("GET", "/readyz", system.readyz, "getReady", "Whether it can serve", problems=(Code.UNAVAILABLE,)),
    _system("GET", "/metrics", system.metrics, "getMetrics", "Metrics for Prometheus", media="text/plain"),
    _system("GET", "/openapi.json", system.openapi, "getOpenapi", "This description"),
    _system("GET", "/docs", system.docs, "getDocs", "This description, for people", media="text/html"),
    _system("GET", "/docs/errors", system.error_docs, "getErrorDocs", "Every error code, explained", media="text/html"),
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
            dependencies=_first(route),
        )
        if route.method == "GET" and route.stream is None:
            app.add_api_route(
                route.path,
                route.handler,
                methods=["HEAD"],
                response_model=None,
                include_in_schema=False,
                dependencies=_first(route),
            )


def _first(route: Route) -> list[params.Depends]:
    """What is looked at before anything else of a request; who is asking comes first of all."""
    strict = Depends(strictness(writes=route.method not in {"GET", "HEAD"}, conditional="If-Match" in route.reads))
    return [Depends(may_read), strict] if route.needs_token else [strict]
