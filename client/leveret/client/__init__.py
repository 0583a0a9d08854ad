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
    from leveret.client.receipt import IfMatch, Receipt
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
    from leveret.shared.ids import id_for_key, new_id
    from leveret.shared.lifecycle import Desired, State
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
    "Config": "leveret.client.config",
    "Desired": "leveret.shared.lifecycle",
    "IfMatch": "leveret.client.receipt",
    "Leveret": "leveret.client.leveret",
    "LeveretAmqp": "leveret.client.amqp",
    "Receipt": "leveret.client.receipt",
    "State": "leveret.shared.lifecycle",
    "Target": "leveret.shared.waiting",
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
    "ClientError",
    "Config",
    "ConfigError",
    "Conflict",
    "CreateToken",
    "CreateVm",
    "Denied",
    "Desired",
    "EventGap",
    "EventView",
    "HostView",
    "IfMatch",
    "ImageByName",
    "ImageByUrl",
    "ImageView",
    "Invalid",
    "Leveret",
    "LeveretAmqp",
    "Missing",
    "NewTokenView",
    "NotFound",
    "Placement",
    "ProjectView",
    "QuotaView",
    "Receipt",
    "State",
    "Target",
    "TokenView",
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
