"""Leveret's client library, and the `leveret` command.

    async with Leveret("http://127.0.0.1:8420", token) as leveret:
        receipt = await leveret.create(CreateVm(image=ImageByName(name="appliance")))
        vm = await leveret.wait(receipt, "ready", timeout_s=120)

`Leveret` speaks REST. `LeveretAmqp` (extra `leveret[amqp]`) has the same writes, `watch` and `wait`, and speaks to the
broker itself; the rest is read over REST.

Names are looked up on first use: the command line must answer `--help` without loading an HTTP client, and nobody
needs a broker's library who does not speak to one.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.client.amqp import LeveretAmqp
    from leveret.client.config import Config
    from leveret.client.errors import (
        Ambiguous,
        ApiError,
        ClientError,
        ConfigError,
        Conflict,
        Denied,
        EventGap,
        Invalid,
        Missing,
        NotFound,
        Unavailable,
        Unreachable,
        VmFailed,
        WaitTimedOut,
    )
    from leveret.client.leveret import Leveret
    from leveret.client.receipt import IfMatch, MadeVm, Receipt
    from leveret.client.sights import VmSight
    from leveret.shared.documents import (
        AmqpUserView,
        CreateToken,
        CreateVm,
        EventView,
        HostView,
        ImageByName,
        ImageByUrl,
        ImageView,
        NewTokenView,
        Placement,
        ProjectView,
        QuotaView,
        TokenView,
        UpdateQuota,
        UpdateVm,
        Usage,
        VmView,
    )
    from leveret.shared.groups import CreateGroup, GroupView
    from leveret.shared.ids import id_for_key, new_id
    from leveret.shared.lifecycle import Desired, State
    from leveret.shared.placements import AskCapacity, CapacityReport, PlacementView, TriedHost
    from leveret.shared.waiting import Target

_ERRORS = (
    "Ambiguous ApiError ClientError ConfigError Conflict Denied EventGap Invalid Missing NotFound Unavailable "
    "Unreachable VmFailed WaitTimedOut"
)
_DOCUMENTS = (
    "AmqpUserView CreateToken CreateVm EventView HostView ImageByName ImageByUrl ImageView NewTokenView Placement "
    "ProjectView QuotaView TokenView UpdateQuota UpdateVm Usage VmView"
)
_HOMES = {
    "AskCapacity": "leveret.shared.placements",
    "CapacityReport": "leveret.shared.placements",
    "Config": "leveret.client.config",
    "CreateGroup": "leveret.shared.groups",
    "Desired": "leveret.shared.lifecycle",
    "GroupView": "leveret.shared.groups",
    "IfMatch": "leveret.client.receipt",
    "Leveret": "leveret.client.leveret",
    "LeveretAmqp": "leveret.client.amqp",
    "MadeVm": "leveret.client.receipt",
    "PlacementView": "leveret.shared.placements",
    "Receipt": "leveret.client.receipt",
    "State": "leveret.shared.lifecycle",
    "Target": "leveret.shared.waiting",
    "TriedHost": "leveret.shared.placements",
    "VmSight": "leveret.client.sights",
    "id_for_key": "leveret.shared.ids",
    "new_id": "leveret.shared.ids",
    **dict.fromkeys(_ERRORS.split(), "leveret.client.errors"),
    **dict.fromkeys(_DOCUMENTS.split(), "leveret.shared.documents"),
}

__all__ = [
    "Ambiguous",
    "AmqpUserView",
    "ApiError",
    "AskCapacity",
    "CapacityReport",
    "ClientError",
    "Config",
    "ConfigError",
    "Conflict",
    "CreateGroup",
    "CreateToken",
    "CreateVm",
    "Denied",
    "Desired",
    "EventGap",
    "EventView",
    "GroupView",
    "HostView",
    "IfMatch",
    "ImageByName",
    "ImageByUrl",
    "ImageView",
    "Invalid",
    "Leveret",
    "LeveretAmqp",
    "MadeVm",
    "Missing",
    "NewTokenView",
    "NotFound",
    "Placement",
    "PlacementView",
    "ProjectView",
    "QuotaView",
    "Receipt",
    "State",
    "Target",
    "TokenView",
    "TriedHost",
    "Unavailable",
    "Unreachable",
    "UpdateQuota",
    "UpdateVm",
    "Usage",
    "VmFailed",
    "VmSight",
    "VmView",
    "WaitTimedOut",
    "id_for_key",
    "new_id",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
