"""Why a VM stands where it does, and how many more there is room for: the documents that users write and read."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import ConfigDict, Field

from leveret.shared.documents import WHOLE, Document, Placement
from leveret.shared.errors import Problem

#: By what a host is chosen among those that can take a VM, in order of weight: JSON in a database keeps no order.
SCORES = ("group", "zone_balance", "room_class", "image", "room")


class TriedHost(Document):
    """One decision about where a VM goes.

    Of the hosts `looked_at`, `considered` could have taken it, and `refused` counts the others by the constraint that
    refused them. `score` says what the host was chosen by, in order of weight. `problem` is why it was not built there,
    or had to leave.
    """

    model_config = ConfigDict(extra="ignore")

    host: str
    host_id: UUID
    attempt: int
    at: datetime
    looked_at: int | None = None
    considered: int | None = None
    refused: dict[str, int] = Field(default_factory=dict)
    score: dict[str, float] = Field(default_factory=dict)
    seconds: float | None = None
    problem: Problem | None = None


class PlacementView(Document):
    """Where a VM stands and why; or why it stands nowhere."""

    model_config = ConfigDict(extra="ignore")

    vm_id: UUID
    name: str
    state: str
    host: str | None
    zone: str | None
    placement: Placement
    tried: tuple[TriedHost, ...]
    problem: Problem | None


class AskCapacity(Document):
    """How many VMs of this shape fit now?"""

    vcpus: Annotated[int, Field(ge=1, le=256, strict=True), WHOLE] = 1
    memory_mib: Annotated[int, Field(ge=64, le=4 * 1024 * 1024, strict=True), WHOLE] = 1024
    disk_gib: Annotated[int, Field(ge=1, le=64 * 1024, strict=True), WHOLE] = 10
    placement: Placement = Placement()


class CapacityReport(Document):
    """How many more VMs of the shape that was asked for there is room for, in each zone. The next moment may differ."""

    model_config = ConfigDict(extra="ignore")

    at: datetime
    hosts: int
    zones: dict[str, int]
    total: int
