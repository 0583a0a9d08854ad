"""The life of a VM: its states, what may be wanted of it, and the one table of moves.

The same table stands as a trigger in the database (a test compares the two) and as the drawing in
docs/architecture.md.
"""

from enum import StrEnum


class State(StrEnum):
    """Where a VM is, as last seen. One column, nothing beside it."""

    PENDING = "pending"
    BUILDING = "building"
    RUNNING = "running"
    STOPPED = "stopped"
    DELETING = "deleting"
    DELETED = "deleted"
    ERROR = "error"


class Desired(StrEnum):
    """What its owner wants of a VM."""

    RUNNING = "running"
    STOPPED = "stopped"
    DELETED = "deleted"


class Wanted(StrEnum):
    """What a host is told to make true of a VM: `absent` leaves neither domain nor file."""

    RUNNING = "running"
    STOPPED = "stopped"
    ABSENT = "absent"


class Observed(StrEnum):
    """What a host sees of a VM. `building` means: defined, or being made, and never yet started."""

    ABSENT = "absent"
    BUILDING = "building"
    RUNNING = "running"
    STOPPED = "stopped"


class Step(StrEnum):
    """What is being done right now. Hosts report those from `image` to `start`, in this order, while they build."""

    SCHEDULING = "scheduling"
    DISPATCHED = "dispatched"
    IMAGE = "image"
    DISK = "disk"
    CONFIG_DRIVE = "config_drive"
    DEFINE = "define"
    START = "start"
    STOP = "stop"
    REBOOT = "reboot"
    CLEANUP = "cleanup"
    REMOVE = "remove"


#: What a pending VM does for which there is no room yet. No host ever says so.
WAITING = "waiting_for_capacity"

BUILD_STEPS = (Step.IMAGE, Step.DISK, Step.CONFIG_DRIVE, Step.DEFINE, Step.START)

#: Every legal move. Nothing leaves `deleted`.
MOVES: dict[State, frozenset[State]] = {
    State.PENDING: frozenset({State.BUILDING, State.DELETING, State.DELETED, State.ERROR}),
    State.BUILDING: frozenset({State.PENDING, State.RUNNING, State.STOPPED, State.DELETING, State.ERROR}),
    State.RUNNING: frozenset({State.PENDING, State.STOPPED, State.DELETING, State.ERROR}),
    State.STOPPED: frozenset({State.PENDING, State.RUNNING, State.DELETING, State.ERROR}),
    State.ERROR: frozenset({State.PENDING, State.RUNNING, State.STOPPED, State.DELETING, State.DELETED}),
    State.DELETING: frozenset({State.DELETED}),
    State.DELETED: frozenset(),
}
