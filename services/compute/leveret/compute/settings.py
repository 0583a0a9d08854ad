"""Every setting of a compute worker, each an environment variable LEVERET_<NAME>."""

import socket
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal

from pydantic import Field

from leveret.compute.heart import Share
from leveret.shared.documents import Labels, ShortName
from leveret.shared.messages import Capacity
from leveret.shared.settings import ServiceSettings


class ComputeSettings(ServiceSettings):
    """What an operator decides about a host."""

    host_state_dir: Path = Field(
        default=Path("/var/lib/leveret/host"), description="Where the host's id, epoch and lock are kept."
    )
    host_name: str = Field(
        default_factory=socket.gethostname, description="What the host is called; it may change, the id file decides."
    )
    zone: ShortName = Field(default="default", description="The failure domain this host is in.")
    labels: Labels = Field(default={}, description='Labels that placements may ask for, as JSON: {"disk": "ssd"}.')
    taints: Labels = Field(
        default={}, description='Only VMs that tolerate all of these are placed here, as JSON: {"dedicated": "team-a"}.'
    )
    max_vms: int | None = Field(
        default=None, ge=0, le=1_000_000, description="How many VMs are placed here at most, whatever their size."
    )
    heartbeat_s: float = Field(default=5.0, gt=0, le=60, description="Time between heartbeats.")
    build_concurrency: int = Field(default=8, ge=1, le=1024, description="Builds that make disks and domains at once.")
    fetch_concurrency: int = Field(
        default=32, ge=1, le=256, description="Different images fetched at once, at most half of them for one project."
    )

    reserve_vcpus: int = Field(default=0, ge=0, description="CPUs kept for the host itself.")
    reserve_memory_mib: int = Field(default=512, ge=0, description="Memory kept for the host itself.")
    reserve_disk_gib: int = Field(default=5, ge=0, description="Space in the pool's file system kept free.")
    vcpu_ratio: float = Field(default=4.0, gt=0, description="Virtual CPUs placed for each real one.")
    memory_ratio: float = Field(default=1.0, gt=0, description="Memory placed for each MiB there is.")
    disk_ratio: float = Field(default=1.0, gt=0, description="Disk placed for each GiB there is; overlays grow late.")

    pool_dir: Path = Field(default=Path("/var/lib/leveret/pool"), description="Where disks and images are kept.")
    libvirt_uri: str = Field(default="qemu:///system", description="The hypervisor to drive.")
    virt_type: Literal["auto", "kvm", "qemu"] = Field(
        default="auto", description="How guests run; auto proves KVM by running one."
    )
    network_mode: Literal["auto", "nat", "user"] = Field(
        default="auto", description="A NAT bridge, or user-mode networking with forwarded SSH ports."
    )
    advertise_host: str = Field(default="127.0.0.1", description="Where users reach this host's forwarded ports.")
    image_dirs: tuple[Path, ...] = Field(
        default=(), description="Directories that file: images may come from, as JSON."
    )
    image_inner_allowed: tuple[IPv4Network | IPv6Network, ...] = Field(
        default=(),
        description="Networks that are not public and that images may be fetched from all the same, as JSON.",
    )
    image_max_bytes: int = Field(default=64 * 1024**3, gt=0, description="The largest image that is fetched.")
    image_timeout_s: float = Field(default=900.0, gt=0, description="Time for fetching an image.")
    call_timeout_s: float = Field(default=30.0, gt=0, description="Time for one call to the hypervisor.")
    file_timeout_s: float = Field(default=30.0, gt=0, description="Time for one call to the pool's file system.")

    pool_check_s: float = Field(
        default=15.0, gt=0, description="Time between tries of the pool: a small file is written, read and removed."
    )
    pool_slow_s: float = Field(
        default=10.0,
        gt=0,
        description="A pool that takes longer for a small file gets no new VM until it is quick again.",
    )

    simulate_vcpus: int = Field(default=64, ge=1, description="CPUs of each simulated host.")
    simulate_memory_mib: int = Field(default=262_144, ge=1, description="Memory of each simulated host.")
    simulate_disk_gib: int = Field(default=4096, ge=1, description="Disk of each simulated host.")
    simulate_zones: int = Field(default=1, ge=1, description="Zones that simulated hosts are spread over.")
    simulate_latency_s: dict[str, float | tuple[float, float]] = Field(
        default={}, description='What verbs take, fixed or a range, as JSON: {"start": [0.5, 1.5], "remove": 0.2}.'
    )
    simulate_failures: dict[str, float] = Field(
        default={}, description='How likely verbs fail, as JSON: {"start": 0.01}.'
    )
    simulate_shutdown_s: float = Field(default=0.0, ge=0, description="What a simulated guest takes to shut down.")
    simulate_ready_s: float = Field(default=0.0, ge=0, description="What a simulated guest takes until it is up.")
    simulate_persist: bool = Field(default=False, description="Keep simulated VMs over a restart of the worker.")
    simulate_seed: int | None = Field(default=None, description="Seed of the simulation's failures and latencies.")

    @property
    def share(self) -> Share:
        """What of the host may be placed."""
        reserve = Capacity(vcpus=self.reserve_vcpus, memory_mib=self.reserve_memory_mib, disk_gib=self.reserve_disk_gib)
        return Share(reserve, self.vcpu_ratio, self.memory_ratio, self.disk_ratio)
