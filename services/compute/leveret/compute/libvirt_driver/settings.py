"""What a host's operator decides about its hypervisor."""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class LibvirtSettings:
    """Every limit of the driver.

    `image_dirs` are the only directories that `file:` urls may name files in. `image_inner_allowed` are the
    networks that are not public and that images may be fetched from all the same. `ports` are the TCP ports of the
    host that user-mode networking forwards to guests' ssh; they should lie below the kernel's ephemeral range.
    A pool that takes longer than `pool_slow_s` for a small file gets no new VM.
    `emulated_cpu` is the processor of a guest without KVM, a libvirt model or `maximum`. `calls_at_once` is also
    the number of connections to libvirtd, beside the one that listens.
    """

    pool_dir: Path
    uri: str = "qemu:///system"
    virt_type: Literal["kvm", "qemu", "auto"] = "auto"
    emulated_cpu: str = "Nehalem"

    network_mode: Literal["nat", "user", "auto"] = "auto"
    advertise_host: str = "127.0.0.1"
    forward_bind: str | None = None
    ports: range = range(20000, 30000)

    image_dirs: tuple[Path, ...] = ()
    image_inner_allowed: tuple[IPv4Network | IPv6Network, ...] = ()
    image_max_bytes: int = 64 * 1024**3
    image_timeout_s: float = 900.0
    image_idle_s: float = 20.0

    image_keep_s: float = 7 * 24 * 3600.0

    disk_reserve_gib: float = 5.0
    look_again_s: float = 20.0
    resume_every_s: float = 15.0
    resume_free_bytes: int = 256 * 1024**2

    call_timeout_s: float = 30.0
    start_timeout_s: float = 90.0
    button_timeout_s: float = 10.0
    qemu_img_timeout_s: float = 60.0
    file_timeout_s: float = 30.0
    pool_slow_s: float = 10.0
    calls_at_once: int = 8
    keepalive_interval_s: int = 5
    keepalive_count: int = 3

    console_max_bytes: int = 1024 * 1024
    press_again_s: float = 5.0

    boot_id_path: Path = Path("/proc/sys/kernel/random/boot_id")

    @property
    def bind_address(self) -> str:
        """Where forwarded ports listen: where the operator says, else as far as they are advertised."""
        if self.forward_bind is not None:
            return self.forward_bind
        inward = self.advertise_host == "localhost" or self.advertise_host.startswith("127.")
        return "127.0.0.1" if inward else "0.0.0.0"  # noqa: S104  (it is what is being asked for)
