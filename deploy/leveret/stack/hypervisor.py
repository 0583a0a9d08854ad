"""The libvirt of this machine's installation: which one, whether it runs, and what becomes of its guests."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from leveret.stack.errors import StackError
from leveret.stack.layout import Layout, Options
from leveret.stack.libvirtd import Libvirtd, choose_libvirt, virsh

READY_S = 90.0
#: Time for guests to shut down before they are switched off.
SHUTDOWN_S = 20.0
_LOOK_S = 0.2
_DOMAIN_PREFIX = "lv-"


@dataclass(frozen=True, slots=True)
class Libvirt:
    """A libvirt that answers. `started` says that it did not before."""

    uri: str
    why: str
    started: bool


def ready_libvirt(layout: Layout, options: Options) -> Libvirt:
    """Choose the libvirt and start it if it is ours. A private one that was used once is used from then on: the guests
    are there. Raises StackError with what to try.
    """
    private = Libvirtd(layout.libvirt)
    if private.directory.exists():
        return _start(layout, options, "private, as before")
    choice = choose_libvirt(layout.libvirt)
    if choice.server is not None:
        return _start(layout, options, "private")
    return Libvirt(choice.uri, choice.why, started=False)


def _start(layout: Layout, options: Options, why: str) -> Libvirt:
    usable = options.virt_type == "kvm" or (options.virt_type == "auto" and _kvm_works(layout))
    server = Libvirtd(layout.libvirt, mask_kvm=not usable)
    was_running = server.is_running()
    server.start()
    server.wait_ready(READY_S)
    return Libvirt(server.uri, why, started=not was_running)


def _kvm_works(layout: Layout) -> bool:
    """Shown by a guest that runs. A /dev/kvm under which guests hang is best not seen by libvirtd at all."""
    from leveret.compute.libvirt_driver import kvm_probe  # an installation of fake hosts may have no libvirt

    layout.pool.mkdir(mode=0o711, exist_ok=True)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return asyncio.run(kvm_probe.find_out(layout.pool, boot_id)).usable


def stop_private(layout: Layout) -> int:
    """Shut the guests of a private libvirtd down, switch off those that take too long, and stop it.

    The number of guests that ran. They and their disks are kept: a later start finds them.
    """
    server = Libvirtd(layout.libvirt)
    if not server.directory.exists():
        return 0
    guests = _guests(server.uri) if server.is_running() else []
    for guest in guests:
        with suppress(StackError):  # it may have ended by itself meanwhile
            virsh(server.uri, "shutdown", guest)
    deadline = time.monotonic() + SHUTDOWN_S
    while guests and _guests(server.uri) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    server.stop(destroy_guests=True)
    return len(guests)


def is_private(layout: Layout) -> bool:
    return Libvirtd(layout.libvirt).directory.exists()


def shared_guests(layout: Layout) -> list[str]:
    """This installation's domains in a libvirt that is not its own, running or not: it cannot be stopped with us.

    Other installations may have domains there too; ours are those with files in our pool.
    """
    if is_private(layout):
        return []
    try:
        names = _guests(choose_libvirt(layout.libvirt).uri, "--all")
    except StackError:
        return []  # nobody answers: nothing was ever built there
    return [name for name in names if any(name.endswith(file.name) for file in layout.pool.glob("*-*-*-*-*"))]


def _guests(uri: str, *options: str) -> list[str]:
    names = virsh(uri, "list", *options, "--name").split()
    return [name for name in names if name.startswith(_DOMAIN_PREFIX)]
