"""The documents that users write and read. REST and AMQP carry the very same ones."""

import base64
import binascii
import re
from datetime import datetime
from ipaddress import IPv4Address
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from leveret.shared.errors import Problem
from leveret.shared.lifecycle import Desired, State

MAX_USER_DATA_BYTES = 1024 * 1024
#: A request with the largest user-data, in base64, and everything else at its limit.
MAX_REQUEST_BYTES = 2 * 1024 * 1024

MAX_NAME = 63
VmName = Annotated[str, StringConstraints(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
LabelKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{0,63}$")]
MAX_LABELS = 32


def _names_have_a_pattern(schema: dict[str, Any]) -> None:
    """Say that names that do not match are refused: `patternProperties` alone lets them pass."""
    ((pattern, value),) = schema.pop("patternProperties").items()
    schema |= {"propertyNames": {"pattern": pattern}, "additionalProperties": value}


def _without_default(schema: dict[str, Any]) -> None:
    """Say nothing of what stands for "not given"."""
    schema.pop("default", None)


def _whole(value: object) -> object:
    """JSON has one kind of number: 4096.0 and 4.096e3 are integers as much as 4096 is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=MAX_LABELS, json_schema_extra=_names_have_a_pattern)]
ShortName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SshKey = Annotated[
    str,
    StringConstraints(min_length=16, max_length=8192, strip_whitespace=True),
    Field(
        json_schema_extra={
            "pattern": r"^(ssh-|ecdsa-|sk-)[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\x00-\x1f\x7f]*[!-~])?$",
        }
    ),
]

Base64 = Annotated[
    str,
    Field(
        json_schema_extra={
            "contentEncoding": "base64",
            "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
        }
    ),
]

_SSH_KEY = re.compile(r"(ssh-|ecdsa-|sk-)[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\x00-\x1f\x7f]*)?")
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d")
_PRINTABLE_URL = re.compile(r"[\x21-\x7e]+")


class Document(BaseModel):
    """Frozen, and strict about what it does not know: a misspelt field is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImageByName(Document):
    """An image that the installation has registered."""

    name: ShortName


class ImageByUrl(Document):
    """An image to fetch: what arrives must have this sha256, or the build fails and says so."""

    url: Annotated[
        str,
        StringConstraints(min_length=8, max_length=2048),
        Field(
            json_schema_extra={
                "pattern": r"^(https?://[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?([/?#][!-~]*)?|file:///[!-~]*)$"
            }
        ),
    ]
    sha256: Sha256
    format: Literal["qcow2", "raw"] = "qcow2"

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if not _PRINTABLE_URL.fullmatch(url):
            raise ValueError("must be printable ASCII without spaces: encode the rest with %")
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https", "file"}:
            raise ValueError("must be an http, https or file url")
        if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
            raise ValueError("a file url has no host and an absolute path: file:///path/to/image.qcow2")
        if parts.scheme != "file" and not parts.hostname:
            raise ValueError("must name a host")
        if parts.username or parts.password:
            raise ValueError("must not carry credentials")
        return url


class Placement(Document):
    """Where a VM may go. Empty means: anywhere."""

    zones: Annotated[tuple[ShortName, ...], Field(max_length=32)] = ()
    require_labels: Labels = {}
    forbid_labels: Labels = {}
    #: Hosts that are kept for somebody (`taints`) are meant, too, when all their taints are named here.
    tolerate: Labels = {}
    #: On one of these, by name or id. Only for administrators.
    hosts: Annotated[tuple[ShortName, ...], Field(max_length=32)] = ()
    #: With regard to the others of this group of the project.
    group: VmName | None = None
    strategy: Literal["spread", "pack"] = "spread"


OnHostFailure = Literal["none", "restart"]
#: VMs that one request may ask for.
MAX_COUNT = 100


class CreateVm(Document):
    """Get me a VM."""

    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "required": ["user_data", "user_data_base64"],
                "properties": {"user_data": {"type": "string"}, "user_data_base64": {"type": "string"}},
            }
        }
    )

    name: VmName | None = None
    vcpus: Annotated[int, Field(ge=1, le=256, strict=True), WHOLE] = 1
    memory_mib: Annotated[int, Field(ge=64, le=4 * 1024 * 1024, strict=True), WHOLE] = 1024
    disk_gib: Annotated[int, Field(ge=1, le=64 * 1024, strict=True), WHOLE] = 10
    image: ImageByName | ImageByUrl
    ssh_keys: Annotated[tuple[SshKey, ...], Field(max_length=64)] = ()
    user_data: Annotated[str | None, Field(max_length=MAX_USER_DATA_BYTES)] = None
    user_data_base64: Annotated[Base64 | None, Field(max_length=4 * MAX_USER_DATA_BYTES // 3 + 4)] = None
    network: ShortName = "default"
    labels: Labels = {}
    placement: Placement = Placement()
    running: Annotated[bool, Field(strict=True)] = True
    #: `restart` makes it anew on another host, without its disk, once its own is proven to be off.
    on_host_failure: OnHostFailure = "none"
    #: So many at once, all or none. With a `name` they are called name-1, name-2, and so on.
    count: Annotated[int, Field(ge=1, le=MAX_COUNT, strict=True), WHOLE] = 1
    #: When there is no room, stay `pending` until there is some, for at most an hour; else it is refused.
    wait_for_capacity: Annotated[bool, Field(strict=True)] = False

    @field_validator("ssh_keys")
    @classmethod
    def _look_like_public_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            if not _SSH_KEY.fullmatch(key):
                raise ValueError("must be OpenSSH public keys, one a string: 'ssh-ed25519 AAAA... comment'")
        return keys

    @model_validator(mode="after")
    def _names_fit(self) -> "CreateVm":
        if self.name is not None and self.count > 1 and len(f"{self.name}-{self.count}") > MAX_NAME:
            raise ValueError(
                f"name is too long to be numbered: with -{self.count} it has more than {MAX_NAME} characters"
            )
        return self

    @model_validator(mode="after")
    def _one_user_data(self) -> "CreateVm":
        if self.user_data is not None and self.user_data_base64 is not None:
            raise ValueError("give user_data (text) or user_data_base64 (any bytes), not both")
        if len(self.user_data_bytes() or b"") > MAX_USER_DATA_BYTES:
            raise ValueError(f"user-data is larger than {MAX_USER_DATA_BYTES} bytes")
        return self

    def user_data_bytes(self) -> bytes | None:
        """The user-data as the guest will read it, or None."""
        if self.user_data is not None:
            return self.user_data.encode()
        if self.user_data_base64 is None:
            return None
        try:
            return base64.b64decode(self.user_data_base64, validate=True)
        except binascii.Error as error:
            raise ValueError(f"user_data_base64 is not base64: {error}") from error


class Patch(Document):
    """A document in which a field that is not given stays as it is."""


class UpdateVm(Patch):
    """Call it otherwise, or label it anew. Neither touches the guest; its hostname stays what it was made with.

    A label whose value is null goes; labels that are not named stay. A VM always has a name: it may be left out here,
    and cannot be null.
    """

    name: Annotated[VmName | SkipJsonSchema[None], Field(json_schema_extra=_without_default)] = None
    labels: Annotated[
        dict[LabelKey, LabelValue | None],
        Field(max_length=2 * MAX_LABELS, json_schema_extra=_names_have_a_pattern),
    ] = {}

    @field_validator("name", mode="before")
    @classmethod
    def _named(cls, name: object) -> object:
        if name is None:
            raise ValueError("give a name, or leave it out to keep the one it has")
        return name


class DeleteVm(Document):
    """Make it go away, whatever state it is in. May be asked as often as you like (law 7)."""


class StartVm(Document):
    """Let it run."""


class StopVm(Document):
    """Ask the guest to shut down; switch it off when it has not done so in time."""

    grace_s: Annotated[int, Field(ge=0, le=600, strict=True), WHOLE] = 60


class RebootVm(Document):
    """Reset it, as the button on a machine does."""


class RetryVm(Document):
    """Try a VM in `error` again, on any host."""


# Projects, and who may do what in them. Only administrators send these, and only over REST.

#: `admin` administers the whole installation, `member` changes the VMs of its project, `reader` only looks at them.
Role = Literal["admin", "member", "reader"]
AmqpRole = Literal["member", "reader"]

ProjectId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,61}$")]


def _not_our_own(name: str) -> str:
    if name.startswith("leveret"):
        raise ValueError("names that begin with leveret belong to Leveret's own processes")
    return name


#: Without a dot, since a client owns the queues `client.<user>.*`.
AmqpUserName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,61}$"), AfterValidator(_not_our_own)]
Amount = Annotated[int, Field(ge=0, le=2**53, strict=True), WHOLE]
VmAmount = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True), WHOLE]
Reason = Annotated[str, StringConstraints(min_length=4, max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
Rate = Annotated[int, Field(ge=1, le=1_000_000, strict=True), WHOLE]


class UpdateQuota(Patch):
    """Other limits for a project; null is none. Requests over REST and AMQP draw on one allowance."""

    vms: VmAmount | None = None
    vcpus: VmAmount | None = None
    memory_mib: Amount | None = None
    disk_gib: Amount | None = None
    requests_per_s: Rate = 500
    request_burst: Rate = 5000


class CreateProject(Document):
    """A project: VMs, tokens and events of its own. Its id is in the address."""

    quota: UpdateQuota = UpdateQuota()


class DeleteProject(Document):
    """Close a project that has no VMs any more. Its tokens and broker users end; its id is never used again."""


def _written_out(value: object) -> object:
    """Pydantic would take a number, or a text of digits, for seconds since the epoch."""
    if isinstance(value, int | float) or (isinstance(value, str) and not _DATE.match(value)):
        raise ValueError("must be a time with its zone, such as 2027-01-31T12:00:00Z")
    return value


def _representable(value: datetime) -> datetime:
    if not 2000 <= value.year <= 9000:
        raise ValueError("must be between the years 2000 and 9000")
    return value


#: A moment that every clock, time zone and database here can hold.
Moment = Annotated[AwareDatetime, BeforeValidator(_written_out), AfterValidator(_representable)]


class CreateToken(Document):
    """A token to ask with. Its name says who or what holds it."""

    name: ShortName
    role: Role = "member"
    expires_at: Moment | None = None


class RevokeToken(Document):
    """End a token. It works nowhere five seconds later."""


class AddAmqpUser(Document):
    """Let this broker user speak for a project. A `reader` only follows events."""

    role: AmqpRole = "member"


class RemoveAmqpUser(Document):
    """Let this broker user speak for nobody."""


# Hosts. Only administrators send these, and only over REST.


class CordonHost(Document):
    """Give it no new VMs. Those it has stay."""

    reason: Reason = "cordoned by an administrator"


class UncordonHost(Document):
    """Let it take VMs again. A fenced host must have come back, and have nothing left of what is over."""


class FenceHost(Document):
    """Declare that it is off and stays off: its VMs may be made anew elsewhere.

    `proof` says how that was made sure, such as "power cut at the PDU, outlet 7". A host that is said to be off and is
    not may run a second copy of a VM: nothing here can find that out.
    """

    proof: Reason


class RetireHost(Document):
    """It is gone for good: fenced, or empty. What it had is lost."""


class Endpoint(Document):
    """Where a TCP port can be reached from outside the guest's network."""

    host: str
    port: int


class StepTime(Document):
    """How long one step took on its host, by the host's monotonic clock."""

    model_config = ConfigDict(extra="ignore")

    step: str
    seconds: float


class VmView(Document):
    """A VM as its owner sees it."""

    model_config = ConfigDict(extra="ignore")

    id: UUID
    project: str
    name: str
    state: State
    step: str | None
    desired: Desired
    generation: int
    observed_generation: int
    vcpus: int
    memory_mib: int
    disk_gib: int
    image: str
    network: str
    address: IPv4Address | None
    mac: str | None
    ssh: Endpoint | None
    host: str | None
    zone: str | None
    labels: dict[str, str]
    guest_ready: bool
    problem: Problem | None
    attempts: int
    created_at: datetime
    updated_at: datetime
    on_host_failure: OnHostFailure = "none"
    #: When its host was last heard of, if that is too long ago: what is told of the VM is what was seen by then.
    host_silent_since: datetime | None = None
    #: The group that it is placed with.
    group: str | None = None


def revision_of(generation: int, updated_at: datetime) -> str:
    """What changes whenever a VM's document does: its ETag over REST, and what `if_match` is held against."""
    return f"{generation}.{int(updated_at.timestamp() * 1_000_000)}"


class RequestView(Document):
    """What became of a request: `accepted` is committed (law 2); `queued` is safe with the broker, not yet judged.

    `would_be_accepted` answers a dry run: nothing was claimed, and the next moment may decide otherwise.
    """

    model_config = ConfigDict(extra="ignore")

    request_id: str
    vm_id: UUID
    verdict: Literal["accepted", "queued", "would_be_accepted"]
    vm: VmView | None
    #: Those of a request for several, in order; then `vm_id` is no VM, but what the request was called by.
    vms: tuple[VmView, ...] = ()


class EventView(Document):
    """One fact: of a VM's life, of a request that was refused, or about the project itself.

    `seq` counts every event of a project without a gap. What is not about a VM has neither id nor name nor state; a
    refused request (`rejected`) has no state.
    """

    model_config = ConfigDict(extra="ignore")

    seq: int
    vm_id: UUID | None
    vm_name: str | None
    type: str
    state: State | None
    at: datetime
    data: dict[str, Any]


class HostView(Document):
    """A host as operators see it. Capacity is what may be placed: (total - reserve) x ratio."""

    model_config = ConfigDict(extra="ignore")

    id: UUID
    name: str
    zone: str
    state: str
    state_reason: str | None
    labels: dict[str, str]
    virt_type: str
    vcpus: int
    vcpus_used: int
    memory_mib: int
    memory_mib_used: int
    disk_gib: int
    disk_gib_used: int
    vms: int
    #: How many of its VMs are made anew elsewhere once it is fenced.
    vms_to_restart: int = 0
    heartbeat_at: datetime
    #: Of a fenced host: whether it has come back and shown that nothing of what is over is left on it.
    clean: bool | None = None
    #: What a VM must tolerate to be placed there.
    taints: dict[str, str] = {}
    #: How many VMs it takes, whatever their size; null is as many as fit.
    vms_max: int | None = None
    #: What is wrong with its hypervisor or its storage: meanwhile it gets no new VMs.
    problem: Problem | None = None


class ImageView(Document):
    """A registered image."""

    model_config = ConfigDict(extra="ignore")

    name: str
    url: str
    sha256: str
    format: str


class Usage(Document):
    """What a project has: every VM counts until it is deleted."""

    model_config = ConfigDict(extra="ignore")

    vms: int
    vcpus: int
    memory_mib: int
    disk_gib: int


class QuotaView(Document):
    """A project's limits; null is none."""

    model_config = ConfigDict(extra="ignore")

    vms: int | None
    vcpus: int | None
    memory_mib: int | None
    disk_gib: int | None
    requests_per_s: int
    request_burst: int


class ProjectView(Document):
    """A project with its limits and what it uses of them."""

    model_config = ConfigDict(extra="ignore")

    id: str
    quota: QuotaView
    usage: Usage
    created_at: datetime


class TokenView(Document):
    """A token without its secret. `last_used_at` is accurate to a minute."""

    model_config = ConfigDict(extra="ignore")

    id: UUID
    project: str
    name: str
    role: Role
    created_at: datetime
    created_by: str | None
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class NewTokenView(TokenView):
    """A new token. `token` is told this once, and stored nowhere."""

    token: str


class AmqpUserView(Document):
    """A broker user that speaks for a project."""

    model_config = ConfigDict(extra="ignore")

    name: str
    project: str
    role: AmqpRole
    created_at: datetime
    created_by: str | None
