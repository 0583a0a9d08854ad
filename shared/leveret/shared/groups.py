"""Groups of VMs that are placed with regard to each other: the documents that users write and read."""

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict

from leveret.shared.documents import Document, VmName

Policy = Literal["spread", "pack"]
Enforcement = Literal["hard", "soft"]
Topology = Literal["host", "zone"]


class CreateGroup(Document):
    """VMs that belong together, and how they are to stand.

    `spread` keeps its VMs apart and `pack` together, on hosts or in zones (`topology`). `hard` places nothing that
    would break it; `soft` comes as near to it as there is room. VMs join it when they are made (`placement.group`).
    """

    name: VmName
    policy: Policy = "spread"
    enforcement: Enforcement = "hard"
    topology: Topology = "host"


class DeleteGroup(Document):
    """Forget a group that has no VMs any more."""

    name: VmName


class GroupView(Document):
    """A group as its project sees it. `vms` counts its VMs that are not deleted."""

    model_config = ConfigDict(extra="ignore")

    name: str
    policy: Policy
    enforcement: Enforcement
    topology: Topology
    vms: int
    created_at: datetime
