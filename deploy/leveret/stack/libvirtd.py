"""A private libvirtd for one host of Leveret, and the choice of a libvirt on a machine we do not know."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from leveret.stack.account import Account
from leveret.stack.directory import ServerDirectory
from leveret.stack.errors import StackError
from leveret.stack.process import BASE_ENV, Daemon, end_processes

# Our directory -> where libvirt looks for it.
MOUNTS = {
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "etc": "/etc/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}
SOCKET_PATH_MAX = 107  # bytes in sockaddr_un.sun_path, less the final zero
DRAIN_S = 15.0
GUEST_DRAIN_S = 2.0
VIRTLOGD_DRAIN_S = 1.0  # libvirt 11's does not always end by SIGTERM, and has nothing to save
COMMAND_TIMEOUT_S = 30.0
SYSTEM_TIMEOUT_S = 15.0

# Runs inside a fresh mount namespace. Every daemon gets a namespace of its own with the same mounts: the
# paths lead to the same files, and nothing has to be unmounted when the last process is gone. The mask over
# /dev/kvm is mounted read-only: libvirt asks whether QEMU's user could write there, root could, and libvirt
# would probe QEMU again for every call because "KVM should work now" (20 s for one definition).
ENTER = """
set -eu
directory=$1 kvm=$2
shift 2
for mount in {mounts}; do mount --bind "$directory/${{mount%%:*}}" "${{mount#*:}}"; done
if [ "$kvm" = masked ] && [ -e /dev/kvm ]; then
    mount --bind -o ro "$directory/no-kvm" /dev/kvm
fi
exec "$@"
""".format(mounts=" ".join(f"{ours}:{theirs}" for ours, theirs in MOUNTS.items()))

# QEMU runs as root and libvirt changes no owners: disks lie wherever the worker's pool is, which may be
# a directory that no other account can enter, and base images are shared by guests. On a machine of one
# operator that is the arrangement that always works; where guests are strangers, Leveret uses the
# system's libvirtd, which runs them as another account. Without cgroups and namespaces, guests of two
# private daemons cannot meet there, and containers that offer neither will do.
QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "logd"
"""

# Consoles are written by the guest: at most 1 MiB and one older file of each are kept.
VIRTLOGD_CONF = """\
max_size = 1048576
max_backups = 1
log_outputs = "3:stderr"
"""

LIBVIRTD_CONF = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_ro_perms = "0700"
unix_sock_rw_perms = "0700"
unix_sock_admin_perms = "0700"
log_outputs = "3:stderr"
host_uuid = "{host_uuid}"
"""


class Libvirtd:
    """A libvirtd with its virtlogd that share nothing with the system's, in one directory; needs root.

    With `network_namespace` it has a network of its own too, as another host would: the namespace is made
    when it is missing, and then deleted at the end. `mask_kvm` hides /dev/kvm, for machines where the
    device is there and guests hang under it.
    """

    def __init__(self, directory: Path, network_namespace: str | None = None, *, mask_kvm: bool = True) -> None:
        self.directory = ServerDirectory(directory, "libvirtd")
        self.network_namespace = network_namespace
        self.mask_kvm = mask_kvm
        self._libvirtd = Daemon("libvirtd", self.directory.path)
        self._virtlogd = Daemon("virtlogd", self.directory.path)

    @property
    def uri(self) -> str:
        """Return the connection URI; it never changes."""
        return f"qemu+unix:///system?socket={self._socket}"

    @property
    def pid(self) -> int | None:
        """Return libvirtd's process id while it lives."""
        return self._libvirtd.pid

    @property
    def log_file(self) -> Path:
        """Return the path of libvirtd's log; those of guests are in `log/qemu` beside it."""
        return self._libvirtd.log_file

    def is_running(self) -> bool:
        """Tell whether libvirtd is alive; `wait_ready` tells whether it answers."""
        return self._libvirtd.is_running()

    def start(self) -> None:
        """Start libvirtd, or do nothing when it runs; guests of an earlier one are found again.

        Returns at once, see `wait_ready`. Raises StackError without root or when libvirt is not installed.
        """
        self._refuse_what_cannot_work()
        with self.directory.locked():
            if not self.is_running():
                self._start()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when libvirtd answers; raises StackError with the tail of its log when it does not."""
        self._libvirtd.wait_ready(self._answers, timeout_s)

    def stop(self, *, destroy_guests: bool = False, drain_s: float = DRAIN_S) -> None:
        """Stop libvirtd in good order; guests and their networks live on, unless told otherwise.

        With `destroy_guests`, everything this libvirtd ever started ends, found by what it sees as
        /var/lib/libvirt; its networks and its network namespace go too.
        """
        if not self.directory.exists():
            return
        try:
            if destroy_guests:
                self._take_networks_down()
        finally:
            with self.directory.locked():
                self._libvirtd.stop(drain_s, children=False)
                if destroy_guests:
                    end_processes(self._others(), GUEST_DRAIN_S)
                if not self._others():
                    # It holds the consoles of live guests, and could not get them back.
                    self._virtlogd.stop(VIRTLOGD_DRAIN_S)
                if destroy_guests:
                    self._delete_namespace()

    def restart(self, timeout_s: float = 60.0) -> None:
        """Stop libvirtd, start it and wait until it answers; guests live."""
        self.stop()
        self.start()
        self.wait_ready(timeout_s)

    def kill(self) -> None:
        """SIGKILL libvirtd and nothing else; guests live."""
        if self.directory.exists():
            with self.directory.locked():
                self._libvirtd.kill(children=False)

    def destroy(self) -> None:
        """End libvirtd with all its guests and networks, and delete its directory."""
        if self.directory.exists():
            self.stop(destroy_guests=True)
            self.directory.remove()

    def processes(self) -> list[int]:
        """Return the pids of all that lives in this libvirtd's file system: guests, dnsmasq, the daemons.

        A process belongs to us if its /var/lib/libvirt is our directory: that holds for children of a
        libvirtd that is long dead, and for nobody else's.
        """
        try:
            ours = (self.directory.path / "lib").stat()
        except FileNotFoundError:
            return []
        return [pid for pid, theirs in _views("/var/lib/libvirt") if os.path.samestat(theirs, ours)]

    def _others(self) -> list[int]:
        """Return the pids of what our daemons started."""
        return [pid for pid in self.processes() if pid not in {self._virtlogd.pid, self._libvirtd.pid}]

    @property
    def _socket(self) -> Path:
        return self.directory.path / "run" / "libvirt-sock"

    def _refuse_what_cannot_work(self) -> None:
        if os.geteuid() != 0:
            raise StackError("a private libvirtd needs root; without, use qemu:///session")
        if len(str(self._socket)) > SOCKET_PATH_MAX:
            raise StackError(f"the path of the socket {self._socket} is longer than {SOCKET_PATH_MAX} bytes")

    def _start(self) -> None:
        self._write_files()
        self._forget_unborn_guests()
        if self.network_namespace is not None:
            self._make_namespace(self.network_namespace)
        for daemon, config in ((self._virtlogd, "virtlogd.conf"), (self._libvirtd, "libvirtd.conf")):
            argv = [
                program(daemon.name),
                f"--config=/etc/libvirt/{config}",
                f"--pid-file=/run/libvirt/{daemon.name}.pid",
            ]
            daemon.start([*self._entrance(), *argv])

    def _entrance(self) -> list[str]:
        """Return the command that puts the rest of the line into our file system and network."""
        # `ip netns exec` also mounts the /sys of that network, where libvirt looks for bridges.
        network = ["ip", "netns", "exec", self.network_namespace] if self.network_namespace else []
        mounts = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", ENTER, "enter"]
        return [*network, *mounts, str(self.directory.path), "masked" if self.mask_kvm else "open"]

    def _write_files(self) -> None:
        path = self.directory.path
        if not self.directory.exists():
            self.directory.write({"host_uuid": str(uuid.uuid4()), "namespace": None})
        for name in (*MOUNTS, "log/qemu", "etc/qemu/networks"):
            (path / name).mkdir(parents=True, exist_ok=True)
        for target in MOUNTS.values():
            Path(target).mkdir(parents=True, exist_ok=True)
        (path / "no-kvm").touch()
        (path / "etc/qemu.conf").write_text(QEMU_CONF)
        (path / "etc/virtlogd.conf").write_text(VIRTLOGD_CONF)
        (path / "etc/libvirtd.conf").write_text(LIBVIRTD_CONF.format(host_uuid=self.directory.read()["host_uuid"]))
        for name in ("nwfilter", "qemu/networks/default.xml"):
            _copy_missing(Path("/etc/libvirt") / name, path / "etc" / name)

    def _forget_unborn_guests(self) -> None:
        """Remove what an earlier libvirtd noted of guests it was about to make when it was killed.

        libvirt 9.0 takes such a guest, which has no process, for one that is starting up, and waits for it for ever:
        it can be neither started nor destroyed. Without the note it is off.
        """
        for status in (self.directory.path / "run" / "qemu").glob("*.xml"):
            if re.search(r"<domstatus [^>]*\bpid='0'", status.read_text()):
                status.unlink()

    def _answers(self) -> bool:
        return self._socket.exists() and answers(self.uri, timeout_s=COMMAND_TIMEOUT_S)

    def _take_networks_down(self) -> None:
        """Let libvirt remove the bridges and firewall rules it made, which nobody else knows.

        In a network namespace they vanish with it.
        """
        left = list((self.directory.path / "run" / "network").glob("*.xml"))
        if self.network_namespace is not None or not left:
            return
        self.start()
        self.wait_ready()
        for name in virsh(self.uri, "net-list", "--name").split():
            virsh(self.uri, "net-destroy", name)

    def _make_namespace(self, name: str) -> None:
        facts = self.directory.read()
        if not namespace_exists(name):
            self.directory.write({**facts, "namespace": name})
            command("ip", "netns", "add", name)
        command("ip", "-n", name, "link", "set", "lo", "up")

    def _delete_namespace(self) -> None:
        facts = self.directory.read()
        if facts["namespace"] is not None:
            if namespace_exists(facts["namespace"]):
                command("ip", "netns", "delete", facts["namespace"])
            self.directory.write({**facts, "namespace": None})


@dataclass(frozen=True, slots=True)
class LibvirtChoice:
    """Which libvirt to use and why; `server` is what has to be started first, if anything."""

    uri: str
    why: str
    server: Libvirtd | None = None


def choose_libvirt(directory: Path, *, mask_kvm: bool = True) -> LibvirtChoice:
    """Choose the libvirt of this machine; `directory` is where a private one would live, see `Libvirtd`.

    `$LEVERET_LIBVIRT_URI` wins. Everybody but root gets the session's, which libvirt starts by itself. Root
    keeps the private one that was used here before, or else gets the system's libvirtd if it answers, or
    else a private one: guests do not change their libvirt because a service was enabled meanwhile.
    """
    if chosen := os.environ.get("LEVERET_LIBVIRT_URI"):
        return LibvirtChoice(chosen, "LEVERET_LIBVIRT_URI says so")
    if os.geteuid() != 0:
        return LibvirtChoice("qemu:///session", "we are not root")
    server = Libvirtd(directory, mask_kvm=mask_kvm)
    if server.directory.exists():
        return LibvirtChoice(server.uri, "it was used here before", server)
    if answers("qemu:///system", timeout_s=SYSTEM_TIMEOUT_S):
        return LibvirtChoice("qemu:///system", "the system's libvirtd answers")
    return LibvirtChoice(server.uri, "no libvirtd answers on this system", server)


def answers(uri: str, timeout_s: float) -> bool:
    """Tell whether a libvirt daemon answers at this URI within the time."""
    try:
        virsh(uri, "version", "--daemon", timeout_s=timeout_s)
    except StackError:
        return False
    return True


def virsh(uri: str, *args: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run one virsh command and return its output; raises StackError when it fails."""
    home = {name: os.environ[name] for name in ("HOME", "XDG_RUNTIME_DIR") if name in os.environ}
    return command("virsh", "--quiet", f"--connect={uri}", *args, timeout_s=timeout_s, env=home)


def namespace_exists(name: str) -> bool:
    """Tell whether there is a network namespace of this name."""
    return Path("/run/netns", name).exists()


def program(name: str) -> str:
    """Return the path of an installed program; raises StackError when there is none."""
    path = shutil.which(name, path=BASE_ENV["PATH"])
    if path is None:
        raise StackError(f"{name} is not installed: try script/setup")
    return path


def command(name: str, *args: str, timeout_s: float = COMMAND_TIMEOUT_S, env: dict[str, str] | None = None) -> str:
    """Run a program and return its output; raises StackError with what it said when it fails."""
    answer = Account.current().run([program(name), *args], env={**BASE_ENV, **(env or {})}, timeout_s=timeout_s)
    if answer.returncode != 0:
        raise StackError(f"{name} {' '.join(args)} failed: {answer.stderr.strip()}")
    return answer.stdout


def _views(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """Yield for every process what it finds at this path."""
    for pid in psutil.pids():
        try:
            yield pid, Path(f"/proc/{pid}/root{path}").stat()
        except OSError:  # kernel threads, and processes that just ended
            continue


def _copy_missing(source: Path, target: Path) -> None:
    if source.is_dir() and not target.exists():
        shutil.copytree(source, target)
    elif source.is_file() and not target.exists():
        shutil.copy2(source, target)
