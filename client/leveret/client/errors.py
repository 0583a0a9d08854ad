"""What a caller of the client may have to handle. Light: the command line imports it before anything else."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.client.sights import VmSight
    from leveret.shared.documents import VmView


class ClientError(Exception):
    """Every error that the client raises on purpose."""


@dataclass(eq=False)
class ApiError(ClientError):
    """Leveret refused a request. Branch on `code`, which is stable; the subclasses tell the kinds apart.

    Over AMQP a refusal has the `status` that REST would have answered with.
    """

    status: int
    code: str
    message: str
    hint: str = ""
    request_id: str | None = None
    errors: list[dict[str, str]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class NotFound(ClientError):
    """There is no such thing, under this name or at all."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"there is no {kind} named {name!r}")
        self.kind = kind
        self.name = name


class Missing(ApiError, NotFound):
    """What a request is about is not there, or belongs to another project."""


class Invalid(ApiError):
    """The request cannot be understood; `errors` has the faults, each with `field` and `message`."""


class Denied(ApiError):
    """Nobody knows this token or broker user, or it may not do this."""


class Conflict(ApiError):
    """Things stand otherwise than the request needs: a name is taken, a quota used up, an ETag stale, no host free."""


class Unavailable(ApiError):
    """Not now: a part of Leveret is away, or too much was asked; `retry_after_s` says when, if that is known."""


_KINDS: dict[int, type[ApiError]] = {
    400: Invalid,
    401: Denied,
    403: Denied,
    404: Missing,
    409: Conflict,
    412: Conflict,
    413: Invalid,
    415: Invalid,
    422: Invalid,
    429: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}

#: The status with which REST tells a code, for those who hear the code alone. What is not here is 409 as a verdict.
_STATUS = {
    "invalid_request": 422,
    "unsupported_content_type": 415,
    "unknown_type": 422,
    "body_too_large": 413,
    "unauthenticated": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "vm_not_found": 404,
    "project_not_found": 404,
    "token_not_found": 404,
    "amqp_user_not_found": 404,
    "host_not_found": 404,
    "image_unknown": 422,
    "network_unknown": 422,
    "group_unknown": 422,
    "group_not_found": 404,
    "precondition_failed": 412,
    "rate_limited": 429,
    "unavailable": 503,
    "handler_crashed": 500,
    "internal": 500,
}


def refusal(code: str, message: str, *, status: int | None = None, **more: Any) -> ApiError:
    """The error of the right kind; `more` are fields of ApiError."""
    status = _STATUS.get(code, 409) if status is None else status
    return _KINDS.get(status, ApiError)(status=status, code=code, message=message, **more)


class Unreachable(ClientError):
    """No answer came, however often it was asked. Whether a request was carried out is not known: ask again with
    the same ids, and it is carried out once.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} does not answer: {reason}")
        self.url = url
        self.reason = reason


class Ambiguous(ClientError):
    """A name means more than one thing; `ids` are the ones it may mean."""

    def __init__(self, name: str, ids: list[str]) -> None:
        super().__init__(f"{name!r} is the name of {len(ids)} VMs: {', '.join(ids)}")
        self.name = name
        self.ids = ids


class VmFailed(ClientError):
    """A VM will not come to be what was waited for; `vm.problem` says why when Leveret knows."""

    def __init__(self, vm: "VmView | VmSight", waited_for: str) -> None:
        wanted = getattr(vm, "desired", None)
        reason = vm.problem.message if vm.problem else f"it is {vm.state}" + (f" and wanted {wanted}" if wanted else "")
        super().__init__(f"{vm.name} will not be {waited_for}: {reason}")
        self.vm = vm
        self.waited_for = waited_for


class WaitTimedOut(ClientError):
    """The time given for a wait is over. The VM is kept, and goes on; `vm` is None while the request is queued."""

    def __init__(self, vm: "VmView | VmSight | None", waited_for: str, timeout_s: float) -> None:
        state = vm.state if vm else "queued"
        super().__init__(f"not {waited_for} after {timeout_s:.4g} s: still {state}")
        self.vm = vm
        self.waited_for = waited_for
        self.timeout_s = timeout_s


class EventGap(ClientError):
    """The events after the `after`th up to and including the `until`th are lost to this watcher.

    They were forgotten by the API, or dropped from a broker queue that was full. When `until` is the smaller one, the
    log itself went back: it ends with the `until`th event, since an older copy of it was restored, and what was heard
    after that may not be so any more. In either case look at the VMs anew, then watch on with `after=until`.
    """

    def __init__(self, after: int, until: int) -> None:
        lost = f"the events {after + 1} to {until} are lost to this watcher"
        went_back = f"the log went back to event {until}, and this watcher was at {after}: an older one was restored"
        super().__init__(went_back if until < after else lost)
        self.after = after
        self.until = until


class ConfigError(ClientError):
    """Where the API is, or the token for it, is not known or cannot be read."""
