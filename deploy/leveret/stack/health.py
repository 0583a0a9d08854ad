"""`leveret doctor` on a machine that is meant for `leveret up`: what it has, what it lacks, what to do."""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from leveret.client.finding import Finding, fail, ok, warn
from leveret.stack.account import Account
from leveret.stack.bootstrap import images_in
from leveret.stack.errors import StackError
from leveret.stack.layout import Layout, Options
from leveret.stack.libvirtd import choose_libvirt
from leveret.stack.ports import is_free
from leveret.stack.postgres import programs as postgres_programs
from leveret.stack.process import BASE_ENV
from leveret.stack.rabbitmq import SCRIPTS
from leveret.stack.standing import standing

_GIB = 1 << 30
_MIB = 1 << 20
_SETUP = "script/setup installs what is missing."
_API_PORT = 8420


@dataclass(frozen=True, slots=True)
class Program:
    """`path` is where it must lie, if not in PATH. What is not `needed` is only missed by some."""

    name: str
    package: str
    purpose: str
    path: Path | None = None
    needed: bool = True

    def is_there(self) -> bool:
        if self.path is not None:
            return self.path.exists()
        return shutil.which(self.name, path=BASE_ENV["PATH"]) is not None


EMULATOR = {"aarch64": "qemu-system-aarch64"}.get(platform.machine(), "qemu-system-x86_64")

#: What runs everywhere, and what only runs where guests do.
SERVERS = (
    Program("rabbitmq-server", "rabbitmq-server", "the message broker", SCRIPTS / "rabbitmq-server"),
    Program("epmd", "erlang-base", "the message broker"),
)
HYPERVISOR = (
    Program(EMULATOR, "qemu-system-x86", "guests"),
    Program("qemu-img", "qemu-utils", "disks of guests"),
    Program("libvirtd", "libvirt-daemon-system", "guests"),
    Program("virsh", "libvirt-clients", "guests"),
    Program("dnsmasq", "dnsmasq-base", "addresses of guests"),
    Program("iptables", "iptables", "the network of guests"),
    Program("ip", "iproute2", "the network of guests"),
)
COMFORT = (
    Program("ssh", "openssh-client", "`leveret ssh`", needed=False),
    Program("ssh-keygen", "openssh-client", "a key to log in with", needed=False),
    Program("mmdebstrap", "mmdebstrap", "building guest images", needed=False),
    Program("mcopy", "mtools", "building guest images", needed=False),
    Program("cpio", "cpio", "building guest images", needed=False),
)
#: Modules of Python by the extra that brings them.
MODULES = {"asyncpg": "api", "aio_pika": "service", "fastapi": "api"}


def findings(layout: Layout) -> Iterator[Finding]:
    """One after the other, each within some seconds. Nothing is changed, and no guest is started."""
    options = layout.options()
    yield from _modules(options)
    yield from _programs(options)
    yield _postgres()
    if options.libvirt:
        yield _kvm(layout, options)
        yield _libvirt(layout)
    yield _memory()
    yield _disk(layout)
    yield from _accounts(layout)
    yield _port(layout, options)
    yield from _processes(layout)
    yield _images(layout, options)


def _modules(options: Options) -> Iterator[Finding]:
    wanted = MODULES | ({"libvirt": "compute"} if options.libvirt else {})
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        yield fail("modules", f"Python modules are missing: {', '.join(missing)}.", "pip install 'leveret[stack]'")
    else:
        yield ok("modules", "everything that the services import is there")


def _programs(options: Options) -> Iterator[Finding]:
    wanted = (*SERVERS, *(HYPERVISOR if options.libvirt else ()), *COMFORT)
    missing = [program for program in wanted if not program.is_there()]
    for program in missing:
        text = f"{program.name} is missing, for {program.purpose}."
        advice = f"apt-get install {program.package}, or script/setup."
        yield (fail if program.needed else warn)("programs", text, advice)
    if not missing:
        yield ok("programs", ", ".join(program.name for program in wanted))


def _postgres() -> Finding:
    try:
        directory = postgres_programs()
    except StackError as error:
        return fail("postgres", f"{error}.", _SETUP)
    return ok("postgres", f"version {directory.parent.name} in {directory}")


def _kvm(layout: Layout, options: Options) -> Finding:
    """What can be said without a guest: the device, and what a guest of this boot once showed."""
    slower = "guests are emulated, which is many times slower"
    device = Path("/dev/kvm")
    if options.virt_type == "qemu":
        return ok("kvm", "not asked for: guests are emulated (--virt-type qemu)")
    level = fail if options.virt_type == "kvm" else warn
    if not device.exists():
        advice = "switch virtualisation on in the firmware, or nesting in the outer hypervisor; modprobe kvm."
        return level("kvm", f"/dev/kvm is not there: {slower}.", advice)
    if not os.access(device, os.R_OK | os.W_OK):
        return level("kvm", f"/dev/kvm may not be opened by this account: {slower}.", "add it to the group kvm.")
    shown = _shown_kvm(layout)
    if shown is None:
        return ok("kvm", "/dev/kvm can be opened; `leveret up` proves it by running a guest")
    usable, reason = shown
    if usable:
        return ok("kvm", "a guest has run under it since this machine was started")
    return level("kvm", f"/dev/kvm is there, but a guest did not run: {reason} So {slower}.", "look at dmesg for kvm.")


def _shown_kvm(layout: Layout) -> tuple[bool, str] | None:
    """What the probe remembered in this boot."""
    try:
        note = json.loads((layout.pool / "kvm-probe.json").read_text())
        if note["boot_id"] != Path("/proc/sys/kernel/random/boot_id").read_text().strip():
            return None
        return bool(note["usable"]), str(note["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _libvirt(layout: Layout) -> Finding:
    choice = choose_libvirt(layout.libvirt)
    if choice.server is not None and not choice.server.directory.exists():
        return ok("libvirt", f"{choice.why}: `leveret up` starts one of its own")
    return ok("libvirt", f"{choice.uri}: {choice.why}")


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    text = f"{free / _GIB:.1f} GiB of memory are free"
    if free < 256 * _MIB:
        return fail("memory", f"{text}: too little for the servers.", "stop something, or use a larger machine.")
    if free < _GIB:
        return warn("memory", f"{text}: little for guests.", "use small guests, or a larger machine.")
    return ok("memory", text)


def _existing(path: Path) -> Path:
    """The directory itself, or the nearest above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def _disk(layout: Layout) -> Finding:
    free = shutil.disk_usage(_existing(layout.root)).free
    text = f"{free / _GIB:.1f} GiB are free for {layout.root}"
    if free < _GIB:
        return fail("disk", f"{text}: too little for servers and images.", "free some, or choose another --state-dir.")
    if free < 5 * _GIB:
        return warn("disk", f"{text}: little for disks of guests.", "free some, or choose another --state-dir.")
    return ok("disk", text)


def _accounts(layout: Layout) -> Iterator[Finding]:
    """The servers' own accounts must be able to enter what is theirs."""
    above = _existing(layout.root)
    if not os.access(above, os.W_OK):
        yield fail("state dir", f"{above} may not be written by this account.", "choose another one with --state-dir.")
        return
    for name in ("rabbitmq", "postgres"):
        try:
            account = Account.for_service(name)
            reaches = account.can_reach(above)
        except StackError as error:
            yield fail("state dir", f"{error}.", _SETUP)
            continue
        if not reaches:
            text = f"user '{account.name}', under which a server runs, cannot enter {above}."
            yield fail("state dir", text, "choose one that everybody may pass through, such as /var/lib/leveret.")
            return
    yield ok("state dir", f"{layout.root} can be reached by the servers' accounts")


def _port(layout: Layout, options: Options) -> Finding:
    port = layout.ports().get("api") or options.api_port or _API_PORT
    if is_free(port):
        return ok("port", f"{port} is free for the API")
    if layout.exists() and any(one.name == "api" and one.pid for one in standing(layout)):
        return ok("port", f"{port} is the API's")
    if options.api_port == port:
        return fail("port", f"{port} is taken by another program.", "choose another one: leveret up --port.")
    return ok("port", f"{port} is taken by another program: `leveret up` chooses another one")


def _processes(layout: Layout) -> Iterator[Finding]:
    if not layout.exists():
        yield ok("processes", f"there is no installation in {layout.root} yet: `leveret up` makes one")
        return
    for one in standing(layout):
        if one.state == "ready":
            yield ok("processes", f"{one.name} is ready, process {one.pid}")
        else:
            yield fail("processes", f"{one.name} is {one.state}.", f"`leveret up` starts it; its log is {one.log}.")


def _images(layout: Layout, options: Options) -> Finding:
    directory = layout.image_dir(options)
    try:
        found = images_in(directory)
    except StackError as error:
        return warn("images", f"{error}.", "correct its permissions.")
    if not found:
        return warn("images", f"no guest image in {directory}.", "script/guest-images builds one.")
    return ok("images", ", ".join(image.name for image in found))
