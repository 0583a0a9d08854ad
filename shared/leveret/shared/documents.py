"""The documents that users write and read. REST and AMQP carry the very same ones."""

import base64
import binascii
import re
from datetime import datetime
from ipaddress import IPv4Address
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from leveret.shared.errors import Problem
from leveret.shared.lifecycle import Desired, State

MAX_USER_DATA_BYTES = 1024 * 1024
#: A request with the largest user-data, in base64, and everything else at its limit.
MAX_REQUEST_BYTES = 2 * 1024 * 1024

VmName = Annotated[str, StringConstraints(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
LabelKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{0,63}$")]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
ShortName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SshKey = Annotated[str, StringConstraints(min_length=16, max_length=8192, strip_whitespace=True)]

_SSH_KEY = re.compile(r"(ssh-|ecdsa-|sk-)[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\x00-\x1f\x7f]*)?")
_PRINTABLE_URL = re.compile(r"[\x21-\x7e]+")


class Document(BaseModel):
    """Frozen, and strict about what it does not know: a misspelt field is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImageByName(Document):
    """An image that the installation has registered."""

    name: ShortName


class ImageByUrl(Document):
    """An image to fetch: what arrives must have this sha256, or the build fails and says so."""

    url: Annotated[str, StringConstraints(min_length=8, max_length=2048)]
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
    strategy: Literal["spread", "pack"] = "spread"


class CreateVm(Document):
    """Get me a VM."""

    name: VmName | None = None
    vcpus: Annotated[int, Field(ge=1, le=256, strict=True)] = 1
    memory_mib: Annotated[int, Field(ge=64, le=4 * 1024 * 1024, strict=True)] = 1024
    disk_gib: Annotated[int, Field(ge=1, le=64 * 1024, strict=True)] = 10
    image: ImageByName | ImageByUrl
    ssh_keys: Annotated[tuple[SshKey, ...], Field(max_length=64)] = ()
    user_data: Annotated[str | None, Field(max_length=MAX_USER_DATA_BYTES)] = None
    user_data_base64: Annotated[str | None, Field(max_length=4 * MAX_USER_DATA_BYTES // 3 + 4)] = None
    network: ShortName = "default"
    labels: Labels = {}
    placement: Placement = Placement()
    running: Annotated[bool, Field(strict=True)] = True

    @field_validator("ssh_keys")
    @classmethod
    def _look_like_public_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            if not _SSH_KEY.fullmatch(key):
                raise ValueError("must be OpenSSH public keys, one a string: 'ssh-ed25519 AAAA... comment'")
        return keys

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


class DeleteVm(Document):
    """Make it go away, whatever state it is in. May be asked as often as you like (law 7)."""


class StartVm(Document):
    """Let it run."""


class StopVm(Document):
    """Ask the guest to shut down; switch it off when it has not done so in time."""

    grace_s: Annotated[int, Field(ge=0, le=600, strict=True)] = 60


class RebootVm(Document):
    """Reset it, as the button on a machine does."""


class RetryVm(Document):
    """Try a VM in `error` again, on any host."""


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


class RequestView(Document):
    """What became of a request: `accepted` is committed (law 2); `queued` is safe with the broker, not yet judged."""

    model_config = ConfigDict(extra="ignore")

    request_id: str
    vm_id: UUID
    verdict: Literal["accepted", "queued"]
    vm: VmView | None


class EventView(Document):
    """One fact of a VM's life. `seq` counts every event of a project without a gap."""

    model_config = ConfigDict(extra="ignore")

    seq: int
    vm_id: UUID
    vm_name: str
    type: str
    state: State
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
    heartbeat_at: datetime


class ImageView(Document):
    """A registered image."""

    model_config = ConfigDict(extra="ignore")

    name: str
    url: str
    sha256: str
    format: str
