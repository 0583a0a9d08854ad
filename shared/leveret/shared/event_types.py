"""Every type of event, and what its `data` says. Whoever reads events ignores fields and types it does not know."""

from typing import Annotated
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from leveret.shared import documents
from leveret.shared.errors import Problem
from leveret.shared.lifecycle import State, Step


class EventData(BaseModel):
    """What an event says beside its envelope. Additive: there may be more than is described here."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    request_id: str | None = None
    """The request that led to it; absent when none did, as when a guest switches itself off."""
    by: str | None = None
    """Who asked: `broker user shop`, `token ops of default`."""


Steps = Annotated[
    tuple[documents.StepTime, ...],
    Field(description="The build's steps so far, in order, with their times by the host's own clock."),
]


class OfVm(EventData):
    """About a VM, as it stands after the event."""

    vm_id: UUID
    name: str
    """The VM's name."""
    state: State
    """The VM's state after the event."""


class Accepted(OfVm):
    """A create, or a retry, was accepted: it is committed, and will end in `running`, `stopped` or `error`."""

    requested_at: AwareDatetime | None = None
    """When it was asked for, by the asker's clock (header `requested_at`)."""
    verb: str | None = None
    """`retry` when it is accepted anew; absent for a create."""


class Pending(OfVm):
    """Another host will be chosen: one failed to build it and has cleaned up, or its own is proven to be off."""

    attempt: int
    """How many hosts have tried."""
    problem: Problem | None = None
    """Why it has to be made anew: `host_fenced`. Absent when a build failed: that was told by `build_failed`."""


class Scheduled(OfVm):
    """A host was chosen, and builds it now."""

    host: str
    """The host's name."""
    host_id: UUID
    attempt: int
    """Which try this is; 1 is the first."""
    looked_at: int | None = None
    """How many hosts were looked at until enough could take it."""
    considered: int | None = None
    """How many of those could take it."""
    refused: dict[str, int] | None = None
    """How many of the others each constraint refused."""
    score: dict[str, float] | None = None
    """What the host was chosen by: `group`, `zone_balance`, `room_class`, `image` and `room` count in this order."""
    seconds: float | None = None
    """What the decision took."""


class Waiting(OfVm):
    """There is no room for it now, and it waits until there is, as it was asked for (`wait_for_capacity`)."""

    problem: Problem
    """Why no host takes it, and what would fit."""


class Progress(OfVm):
    """The host has come to another step of the build."""

    step: Step
    """What the host is doing now."""
    steps: Steps = ()


class Came(OfVm):
    """A host confirmed a state."""

    steps: Steps = ()
    problem: Problem | None = None
    """Why, when nobody had asked for it: `guest_shutdown`, `guest_crashed`, `host_rebooted`."""


class Running(Came):
    """The VM runs: built, started, or put back."""


class Stopped(Came):
    """The VM is stopped: as asked, or by itself (`problem` says why)."""


class GuestReady(OfVm):
    """The guest said that it has come up. Not every image says so; `running` does not wait for it."""


class Changed(OfVm):
    """A change was accepted. After a start, stop or reboot, a move or `settled` follows when it came true."""

    verb: str
    """What was asked: `start`, `stop`, `reboot`, `update`, or `restored` (the wish is repeated to the host)."""
    labels: dict[str, str] | None = None
    """After an `update`: all of its labels."""


class Settled(OfVm):
    """A change came true without a change of state, such as a reboot."""

    restarts: int = 0
    """How often it has been rebooted, ever."""


class BuildFailed(OfVm):
    """One host could not build it. What follows is `pending` (another try) or `error`."""

    problem: Problem
    attempt: int
    """Which try this was."""


class Late(OfVm):
    """Something takes longer than it should. Leveret goes on trying."""

    problem: Problem


class Failed(OfVm):
    """The VM is in `error`, and `problem` says why. A retry or a delete leads out of it."""

    problem: Problem


class Deleting(OfVm):
    """The delete was accepted; the host is removing the VM."""


class Deleted(OfVm):
    """The host confirmed that nothing is left of it. The id is never used again."""


class Rejected(EventData):
    """A create was refused, or any request that asked for no verdict. Nothing was made or changed."""

    vm_id: UUID
    """The VM that the request was about; the project may have none of this id."""
    name: None = None
    """Always null."""
    state: None = None
    """Always null: this is about the request, not about a VM."""
    problem: Problem
    """Why: the same document as in the verdict."""


class Unreadable(EventData):
    """A request that asked for no verdict was refused, and it cannot be told which VM it was about."""

    problem: Problem
    """Why."""


class ProjectCreated(EventData):
    """The project was made."""

    quota: dict[str, int | None] = {}
    """Its limits; null is none."""


class QuotaChanged(EventData):
    """The project has other limits."""

    quota: dict[str, int | None]
    """Those that changed; null is none."""


class ProjectDeleted(EventData):
    """The project was closed: this is its last event."""


class TokenCreated(EventData):
    """The project has a new token."""

    token_id: UUID
    """The token's id; its secret is nowhere."""
    name: str
    """What the token is called."""
    role: str
    """What it may do: `admin`, `member` or `reader`."""
    expires_at: AwareDatetime | None = None
    """When it ends by itself."""


class TokenRevoked(EventData):
    """A token of the project works no more."""

    token_id: UUID
    """The token's id."""
    name: str
    """What the token was called."""


class AmqpUserAdded(EventData):
    """A broker user speaks for the project."""

    user: str
    """The broker user."""
    role: str
    """`member` or `reader`."""


class AmqpUserChanged(AmqpUserAdded):
    """A broker user has another role."""


class AmqpUserRemoved(EventData):
    """A broker user speaks for the project no more."""

    user: str
    """The broker user."""


class OfHost(EventData):
    """About a host, ordered by an administrator of this project."""

    host: str
    """The host's name."""
    host_id: UUID
    """The host's id."""


class HostCordoned(OfHost):
    """The host gets no new VMs."""

    reason: str
    """Why."""


class HostUncordoned(OfHost):
    """The host takes VMs again."""


class HostFenced(OfHost):
    """The host was declared to be off: its VMs may be made anew elsewhere."""

    proof: str
    """How that was made sure."""


class HostRetired(OfHost):
    """The host was given up for good."""


class GroupCreated(EventData):
    """A group was made."""

    name: str
    """What it is called."""
    policy: str
    """`spread` or `pack`."""
    enforcement: str
    """`hard` or `soft`."""
    topology: str
    """`host` or `zone`."""


class GroupDeleted(EventData):
    """A group was deleted."""

    name: str
    """What it was called."""


#: By their type in the event log, where REST shows them.
OF_VMS: dict[str, type[EventData]] = {
    "accepted": Accepted,
    "pending": Pending,
    "waiting": Waiting,
    "scheduled": Scheduled,
    "progress": Progress,
    "build_failed": BuildFailed,
    "running": Running,
    "stopped": Stopped,
    "guest_ready": GuestReady,
    "changed": Changed,
    "settled": Settled,
    "late": Late,
    "error": Failed,
    "deleting": Deleting,
    "deleted": Deleted,
    "rejected": Rejected,
}
OF_PROJECTS: dict[str, type[EventData]] = {
    "project.created": ProjectCreated,
    "project.deleted": ProjectDeleted,
    "quota.changed": QuotaChanged,
    "token.created": TokenCreated,
    "token.revoked": TokenRevoked,
    "amqp_user.added": AmqpUserAdded,
    "amqp_user.changed": AmqpUserChanged,
    "amqp_user.removed": AmqpUserRemoved,
    # What is ordered of hosts stands in the log of the project whose administrator ordered it.
    "host.cordoned": HostCordoned,
    "host.uncordoned": HostUncordoned,
    "host.fenced": HostFenced,
    "host.retired": HostRetired,
    "group.created": GroupCreated,
    "group.deleted": GroupDeleted,
}
OF_NOTHING: dict[str, type[EventData]] = {"rejected": Unreadable}


def cloud_type(event: str, *, of_vm: bool) -> str:
    """The CloudEvents type of an event: `leveret.vm.running.v1`, `leveret.token.created.v1`."""
    return f"leveret.{'vm.' if of_vm else ''}{event}.v1"


#: By their CloudEvents type, as AMQP clients hear them.
EVENTS: dict[str, type[EventData]] = {cloud_type(name, of_vm=True): model for name, model in OF_VMS.items()} | {
    cloud_type(name, of_vm=False): model for name, model in (OF_PROJECTS | OF_NOTHING).items()
}
