"""What a caller of the client may have to handle. Light: the command line imports it before anything else."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.shared.documents import VmView


class ClientError(Exception):
    """Every error that the client raises on purpose."""


@dataclass(eq=False)
class ApiError(ClientError):
    """The API answered with a problem document (RFC 9457)."""

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


class Unreachable(ClientError):
    """No answer came from the API, however often it was asked. Whether a request was carried out is not known."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} does not answer: {reason}")
        self.url = url
        self.reason = reason


class NotFound(ClientError):
    """There is no such thing under this name."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"there is no {kind} named {name!r}")
        self.kind = kind
        self.name = name


class Ambiguous(ClientError):
    """A name means more than one thing; `ids` are the ones it may mean."""

    def __init__(self, name: str, ids: list[str]) -> None:
        super().__init__(f"{name!r} is the name of {len(ids)} VMs: {', '.join(ids)}")
        self.name = name
        self.ids = ids


class VmFailed(ClientError):
    """A VM will not come to be what was waited for; `vm.problem` says why when Leveret knows."""

    def __init__(self, vm: "VmView", waited_for: str) -> None:
        reason = vm.problem.message if vm.problem else f"it is {vm.state} and wanted {vm.desired}"
        super().__init__(f"{vm.name} will not be {waited_for}: {reason}")
        self.vm = vm
        self.waited_for = waited_for


class WaitTimedOut(ClientError):
    """The time given for a wait is over. The VM is kept, and goes on; `vm` is None while the request is queued."""

    def __init__(self, vm: "VmView | None", waited_for: str, timeout_s: float) -> None:
        state = vm.state if vm else "queued"
        super().__init__(f"not {waited_for} after {timeout_s:g} s: still {state}")
        self.vm = vm
        self.waited_for = waited_for
        self.timeout_s = timeout_s


class ConfigError(ClientError):
    """Where the API is, or the token for it, is not known or cannot be read."""
