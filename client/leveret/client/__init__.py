"""The Python client of Leveret's REST API, and the `leveret` command.

    async with Leveret("http://127.0.0.1:8900", token) as leveret:
        receipt = await leveret.create(CreateVm(image=ImageByName(name="debian-12")))
        vm = await leveret.wait(receipt.vm_id, "ready", timeout_s=120)

Names are looked up on first use: the command line must answer `--help` without loading an HTTP client.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.client.config import Config
    from leveret.client.errors import (
        Ambiguous,
        ApiError,
        ClientError,
        ConfigError,
        NotFound,
        Unreachable,
        VmFailed,
        WaitTimedOut,
    )
    from leveret.client.leveret import Leveret, Receipt, Target

_HOMES = {
    "Ambiguous": "errors",
    "ApiError": "errors",
    "ClientError": "errors",
    "Config": "config",
    "ConfigError": "errors",
    "Leveret": "leveret",
    "NotFound": "errors",
    "Receipt": "leveret",
    "Target": "leveret",
    "Unreachable": "errors",
    "VmFailed": "errors",
    "WaitTimedOut": "errors",
}

__all__ = [
    "Ambiguous",
    "ApiError",
    "ClientError",
    "Config",
    "ConfigError",
    "Leveret",
    "NotFound",
    "Receipt",
    "Target",
    "Unreachable",
    "VmFailed",
    "WaitTimedOut",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
