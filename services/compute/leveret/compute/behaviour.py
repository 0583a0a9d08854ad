"""How a simulated host behaves: what it has, how long its verbs take, how often they fail."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from leveret.shared.errors import Code
from leveret.shared.messages import Capacity

#: Seconds, or a range of them to draw from.
Seconds = float | tuple[float, float]

#: How each verb fails.
FAILURES: dict[str, Code] = {
    "fetch_image": Code.IMAGE_UNREACHABLE,
    "make_disk": Code.DISK_FAILED,
    "make_config_drive": Code.CONFIG_DRIVE_FAILED,
    "define": Code.DEFINE_FAILED,
    "start": Code.START_FAILED,
    "stop": Code.STOP_FAILED,
    "reset": Code.START_FAILED,
    "mark": Code.HYPERVISOR_TIMEOUT,
    "remove": Code.DELETE_FAILED,
    "find": Code.HYPERVISOR_TIMEOUT,
    "inventory": Code.HYPERVISOR_TIMEOUT,
    "check_pool": Code.DISK_FAILED,
}


#: Verbs that change nothing: they fail before the deed or not at all.
READING = frozenset(
    {"capacity", "check_pool", "cached_images", "inventory", "find", "console_tail", "guest_ready", "files"}
)

CAPACITY = Capacity(vcpus=64, memory_mib=262_144, disk_gib=4096)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a simulated host behaves.

    `latency_s` and `failures` (probabilities, 0 to 1) are by verb; `failures_after` is the share of failures that come
    after the deed. `shutdown_s` is what a guest takes to switch itself
    off when asked, `ready_s` what it takes from its start to announce that it is up.
    """

    total: Capacity = CAPACITY
    latency_s: Mapping[str, Seconds] = field(default_factory=dict)
    failures: Mapping[str, float] = field(default_factory=dict)
    failures_after: float = 0.5
    shutdown_s: Seconds = 0.0
    ready_s: Seconds = 0.0
