"""The closed list of reasons, and the one document in which every failure is told (law 6)."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Code(StrEnum):
    """Stable reason codes. Clients may branch on them; they are never renamed, only added to."""

    # A request that was not carried out.
    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED_CONTENT_TYPE = "unsupported_content_type"
    UNKNOWN_TYPE = "unknown_type"
    BODY_TOO_LARGE = "body_too_large"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    VM_NOT_FOUND = "vm_not_found"
    VM_DELETED = "vm_deleted"
    ID_CONFLICT = "id_conflict"
    NAME_TAKEN = "name_taken"
    STATE_CONFLICT = "state_conflict"
    IMAGE_UNKNOWN = "image_unknown"
    NETWORK_UNKNOWN = "network_unknown"
    GROUP_UNKNOWN = "group_unknown"
    GROUP_NOT_FOUND = "group_not_found"
    GROUP_IN_USE = "group_in_use"
    PRECONDITION_FAILED = "precondition_failed"
    PROJECT_NOT_FOUND = "project_not_found"
    PROJECT_IN_USE = "project_in_use"
    TOKEN_NOT_FOUND = "token_not_found"  # noqa: S105  (a code)
    HOST_NOT_FOUND = "host_not_found"
    HOST_CONFLICT = "host_conflict"
    AMQP_USER_NOT_FOUND = "amqp_user_not_found"
    QUOTA_EXCEEDED = "quota_exceeded"
    NO_CAPACITY = "no_capacity"
    NO_ADDRESS = "no_address"
    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    HANDLER_CRASHED = "handler_crashed"
    INTERNAL = "internal"
    # A VM that did not become, or did not stay, what was wanted.
    IMAGE_UNREACHABLE = "image_unreachable"
    IMAGE_FORBIDDEN = "image_forbidden"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_HASH_MISMATCH = "image_hash_mismatch"
    IMAGE_INVALID = "image_invalid"
    DISK_FULL = "disk_full"
    DISK_FAILED = "disk_failed"
    CONFIG_DRIVE_FAILED = "config_drive_failed"
    NETWORK_FAILED = "network_failed"
    DEFINE_FAILED = "define_failed"
    START_FAILED = "start_failed"
    STOP_FAILED = "stop_failed"
    DELETE_FAILED = "delete_failed"
    HYPERVISOR_UNAVAILABLE = "hypervisor_unavailable"
    HYPERVISOR_TIMEOUT = "hypervisor_timeout"
    BUILD_FAILED = "build_failed"
    BUILD_TIMEOUT = "build_timeout"
    STOP_TIMEOUT = "stop_timeout"
    DELETE_TIMEOUT = "delete_timeout"
    GUEST_SHUTDOWN = "guest_shutdown"
    GUEST_CRASHED = "guest_crashed"
    DOMAIN_MISSING = "domain_missing"
    HOST_SILENT = "host_silent"
    HOST_REBOOTED = "host_rebooted"
    HOST_FENCED = "host_fenced"
    HOST_RETIRED = "host_retired"


#: What a person can do about it. Every code has a line; a caller may give a more precise one.
HINTS: dict[Code, str] = {
    Code.INVALID_REQUEST: "Correct the fields named in `errors` and send the request again.",
    Code.UNSUPPORTED_CONTENT_TYPE: "Send one JSON document with content type application/json.",
    Code.UNKNOWN_TYPE: "Use one of the message types listed in docs/asyncapi.yaml.",
    Code.BODY_TOO_LARGE: "Make the document smaller; user-data may be up to 1 MiB.",
    Code.UNAUTHENTICATED: "Over REST send `Authorization: Bearer TOKEN`; over AMQP set user_id to your broker user.",
    Code.FORBIDDEN: "Use credentials that may do this.",
    Code.NOT_FOUND: "Look at GET / for what exists.",
    Code.METHOD_NOT_ALLOWED: "Look at /docs for the methods of this address.",
    Code.VM_NOT_FOUND: "List your VMs with `leveret list`. A request that is still queued has no VM yet.",
    Code.VM_DELETED: "It is gone for good, and its id is never used again: create another VM.",
    Code.ID_CONFLICT: "This id or key belongs to a request with another body: use a new one.",
    Code.NAME_TAKEN: "Choose another name, or delete the VM that has it and wait until it is gone.",
    Code.STATE_CONFLICT: "Look at the VM's present state with `leveret show`.",
    Code.IMAGE_UNKNOWN: "Name a registered image (`leveret images`), or give its url and sha256.",
    Code.NETWORK_UNKNOWN: "Leave `network` out to use the default one.",
    Code.GROUP_UNKNOWN: "Make it first: `leveret group create NAME`.",
    Code.GROUP_NOT_FOUND: "List groups with `leveret group list`.",
    Code.GROUP_IN_USE: "Delete its VMs first and wait until they are gone.",
    Code.PRECONDITION_FAILED: "Somebody changed it meanwhile: read it again, and decide anew.",
    Code.PROJECT_NOT_FOUND: "List projects with `leveret project list`.",
    Code.PROJECT_IN_USE: "Delete its VMs first and wait until they are gone.",
    Code.TOKEN_NOT_FOUND: "List tokens with `leveret token list`.",
    Code.HOST_NOT_FOUND: "List hosts with `leveret hosts`.",
    Code.HOST_CONFLICT: "Look at the host's present state with `leveret hosts`.",
    Code.AMQP_USER_NOT_FOUND: "List the project's broker users with `leveret project amqp-users`.",
    Code.QUOTA_EXCEEDED: "Delete VMs of this project, ask for less, or ask an administrator for more.",
    Code.NO_CAPACITY: "Ask for less, add a host, or delete a VM; `details` counts what refused each host.",
    Code.NO_ADDRESS: "Delete VMs of this network or use a larger one.",
    Code.RATE_LIMITED: "Wait for `retry_after_s` (over REST: Retry-After) and send the same request again.",
    Code.UNAVAILABLE: "Try again in a moment; the same id or Idempotency-Key makes that safe.",
    Code.HANDLER_CRASHED: "This is a defect in Leveret: report it with the message kept in leveret.dead.",
    Code.INTERNAL: "This is a defect in Leveret: report it with the request id.",
    Code.IMAGE_UNREACHABLE: "Check that the host can fetch the image's url.",
    Code.IMAGE_FORBIDDEN: "Serve it from elsewhere, or allow it on the hosts: LEVERET_IMAGE_INNER_ALLOWED lists inner "
    "networks, LEVERET_IMAGE_DIRS folders for file urls.",
    Code.IMAGE_TOO_LARGE: "Use a smaller image or a larger `disk_gib`.",
    Code.IMAGE_HASH_MISMATCH: "Check the image's sha256; the file may have changed or been cut short.",
    Code.IMAGE_INVALID: "Give a plain qcow2 or raw image of the declared format, without backing file.",
    Code.DISK_FULL: "Free space in the host's pool, or raise its disk reserve.",
    Code.DISK_FAILED: "Look at the host's log for what qemu-img said.",
    Code.CONFIG_DRIVE_FAILED: "Look at the host's log.",
    Code.NETWORK_FAILED: "Look at the libvirt network on the host.",
    Code.DEFINE_FAILED: "Look at the message: it is libvirt's own.",
    Code.START_FAILED: "Look at the message: it is libvirt's own.",
    Code.STOP_FAILED: "Stop again with `--force`.",
    Code.DELETE_FAILED: "Leveret goes on trying; look at the host's log.",
    Code.HYPERVISOR_UNAVAILABLE: "Start libvirtd on the host; Leveret goes on by itself.",
    Code.HYPERVISOR_TIMEOUT: "libvirtd or the host's storage hangs; look at the host.",
    Code.BUILD_FAILED: "`details.attempts` has the reason from every host that was tried.",
    Code.BUILD_TIMEOUT: "Look at the step it stood in; then delete it or retry it.",
    Code.STOP_TIMEOUT: "Stop again with `--force`.",
    Code.DELETE_TIMEOUT: "Leveret goes on trying; the host must confirm before its capacity is free again.",
    Code.GUEST_SHUTDOWN: "The guest switched itself off; start it again when you want it back.",
    Code.GUEST_CRASHED: "Look at `leveret console-log`; start it again when you want it back.",
    Code.DOMAIN_MISSING: "Somebody removed the domain on the host; delete the VM and create it anew.",
    Code.HOST_SILENT: "The host stopped reporting; nothing on it is touched until it comes back.",
    Code.HOST_REBOOTED: "A VM that should run is started again by itself.",
    Code.HOST_FENCED: "It comes back with its host. `leveret retry` makes it anew elsewhere, without its disk.",
    Code.HOST_RETIRED: "Its disk is gone with the host. `leveret retry` makes it anew elsewhere.",
}


class Problem(BaseModel):
    """Why something is not as asked. The same document in REST answers, verdicts, reports and events."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # A newer Leveret may know more codes than we do: what they say is passed on all the same.
    code: Annotated[Code | str, Field(union_mode="left_to_right")]
    message: str
    hint: str = ""
    step: str | None = None
    host: str | None = None
    details: dict[str, Any] = {}

    @classmethod
    def of(
        cls,
        code: Code,
        message: str,
        *,
        hint: str | None = None,
        step: str | None = None,
        host: str | None = None,
        **details: Any,
    ) -> "Problem":
        """A problem with the code's own hint unless a better one is given."""
        return cls(code=code, message=message, hint=hint or HINTS[code], step=step, host=host, details=details)


class LeveretError(Exception):
    """A failure with a reason that a user can read."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.code}: {problem.message}")
        self.problem = problem


def fail(code: Code, message: str, **more: Any) -> LeveretError:
    """The error to raise: `raise fail(Code.DISK_FULL, "...") from error`."""
    return LeveretError(Problem.of(code, message, **more))
