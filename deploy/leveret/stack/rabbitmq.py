"""A private RabbitMQ on loopback, under a directory."""

import json
import re
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from leveret.stack.account import Account
from leveret.stack.broker_user import VHOST, BrokerUser, hash_password
from leveret.stack.client_permissions import (
    CLIENT_LIMITS,
    CLIENT_POLICY,
    CLIENT_POLICY_NAME,
    CLIENT_PREFIX,
    Role,
    check_client,
    client_permissions,
)
from leveret.stack.directory import ServerDirectory
from leveret.stack.errors import ProcessExitedError, StackError
from leveret.stack.ports import free_port, is_free, is_listening
from leveret.stack.process import BASE_ENV, Daemon

SCRIPTS = Path("/usr/lib/rabbitmq/bin")
ADMIN = "leveret"

#: What each of a broker's ports is for; the last two are only listened on when they are asked for.
PORTS = ("amqp", "dist", "epmd", "metrics", "management")

#: Twice the largest body that anybody of ours accepts (`MAX_REQUEST_BYTES`, which `decode` holds every message to): a
#: client that is a little over it still gets a verdict, and one that is far over it is stopped by the broker.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024

DELETE_QUEUE = """
{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{name}">>)),
{{ok, _}} = rabbit_amqqueue:delete(Q, false, false, <<"leveret">>),
ok.
"""

#: Deletes the queues and exchanges whose names begin as given, with all their bindings.
DELETE_OWNED = """
Prefix = <<"{prefix}">>,
Mine = fun({{resource, _, _, Name}}) -> binary:longest_common_prefix([Name, Prefix]) =:= byte_size(Prefix) end,
[rabbit_amqqueue:delete(Q, false, false, <<"leveret">>) ||
    Q <- rabbit_amqqueue:list(<<"{vhost}">>), Mine(amqqueue:get_name(Q))],
[rabbit_exchange:delete(element(2, X), false, <<"leveret">>) ||
    X <- rabbit_exchange:list(<<"{vhost}">>), Mine(element(2, X))],
ok.
"""

START_ATTEMPTS = 3
EPMD_READY_S = 10.0
DRAIN_S = 30.0
CTL_TIMEOUT_S = 60.0
PORT_TAKEN = re.compile(r"eaddrinuse|address already in use|port_in_use|already in use", re.IGNORECASE)

# Loopback only. The scheduler flags keep an idle broker from burning a core while it waits for work.
LOOPBACK = "-kernel inet_dist_use_interface {127,0,0,1}"
SERVER_ERL_ARGS = f"{LOOPBACK} -start_epmd false +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none"
CTL_ERL_ARGS = f"{LOOPBACK} -start_epmd false"
# A node that hangs is given up by the others after 6 to 10 s, and not after a minute: until then they can neither make
# nor remove a queue, since each must agree.
CLUSTER_ERL_ARGS = " -kernel net_ticktime 8"

# AMQP 0-9-1: what a client says first, and the start of what a broker answers: a method frame (1) on
# channel 0 that holds Connection.Start (class 10, method 10).
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"


@dataclass(frozen=True, slots=True)
class Membership:
    """A node's place in a cluster: its name, the names of all, and what they share.

    The name service is nobody's: whoever makes the cluster keeps it running.
    """

    node: str
    nodes: tuple[str, ...]
    cookie: str
    admin_password: str
    epmd_port: int

    def settings(self) -> dict[str, str]:
        """Return the node's own part of rabbitmq.conf.

        A node that sees none of the others lets go of its clients, who then find one of those. `pause_minority` alone
        would do that too, but a node that merely hung may see the others again before it has noticed that they had
        given it up: it would stay parted from them for good, with queues and bindings that only it knows of. Healing
        restarts it. What is lost is what is declared anew anyway: without a majority no quorum queue takes anything.
        """
        handling = "cluster_partition_handling"
        others = [node for node in self.nodes if node != self.node]
        return {
            "cluster_formation.peer_discovery_backend": "classic_config",
            handling: "pause_if_all_down",
            f"{handling}.pause_if_all_down.recover": "autoheal",
            **{f"{handling}.pause_if_all_down.nodes.{n}": f"{node}@localhost" for n, node in enumerate(others, 1)},
            **{
                f"cluster_formation.classic_config.nodes.{n}": f"{node}@localhost"
                for n, node in enumerate(self.nodes, 1)
            },
        }


class Rabbit:
    """A RabbitMQ server of its own: port, node, name service, users, data and logs in one directory.

    With a `membership` it is one node of a cluster, which the first of them to start begins and the others join.

    `heartbeat_s`, `metrics` and `management` (the HTTP API) take effect at the next start. The broker
    listens on 127.0.0.1 only, has no `guest`, one virtual host, and an administrator with a random
    password. `url` may change until `wait_ready` has returned for the first time (a port can be lost to
    another process); after that it stays the same over restarts unless somebody else took the port
    meanwhile.
    """

    def __init__(
        self,
        directory: Path,
        *,
        heartbeat_s: int = 10,
        metrics: bool = False,
        management: bool = False,
        membership: Membership | None = None,
    ) -> None:
        self.directory = ServerDirectory(directory, "rabbitmq")
        self.heartbeat_s = heartbeat_s
        self.metrics = metrics
        self.management = management
        self._membership = membership
        self._broker = Daemon("rabbitmq", self.directory.path)
        self._epmd = Daemon("epmd", self.directory.path)

    @property
    def port(self) -> int:
        """Return the AMQP port on 127.0.0.1."""
        return int(self.directory.read()["ports"]["amqp"])

    @property
    def url(self) -> str:
        """Return the administrator's AMQP URL."""
        return self.url_of(ADMIN)

    @property
    def metrics_url(self) -> str:
        """Return where Prometheus can read the broker's figures, when `metrics` is on."""
        return f"http://127.0.0.1:{self.directory.read()['ports']['metrics']}/metrics"

    @property
    def management_url(self) -> str:
        """Return where the HTTP API is, with the administrator's password, when `management` is on."""
        port = self.directory.read()["ports"]["management"]
        return f"http://{ADMIN}:{self._users()[ADMIN].password}@127.0.0.1:{port}/{VHOST}"

    @property
    def pid(self) -> int | None:
        """Return the broker's process id while it lives."""
        return self._broker.pid

    @property
    def log_file(self) -> Path:
        """Return the path of the broker's own log."""
        return self.directory.path / "log" / "rabbitmq.log"

    def url_of(self, user: str) -> str:
        """Return the AMQP URL of a user that was made here; raises StackError when it was not."""
        users = self._users()
        if user not in users:
            raise StackError(f"broker user '{user}' was not made by this server")
        return f"amqp://{quote(user, safe='')}:{users[user].password}@127.0.0.1:{self.port}/{VHOST}"

    def is_running(self) -> bool:
        """Tell whether the broker's process is alive; `wait_ready` tells whether it answers."""
        return self._broker.is_running()

    def start(self) -> None:
        """Start the broker, or do nothing when it runs; returns at once, see `wait_ready`.

        Raises StackError when RabbitMQ is not installed or its account cannot reach the directory.
        """
        with self.directory.locked():
            if not self.is_running():
                self._start()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the broker greets AMQP clients; its users and virtual host are there by then.

        Raises ProcessExitedError or NotReadyError with the tail of the log.
        """
        for attempt in range(START_ATTEMPTS):
            try:
                self._broker.wait_ready(lambda: greets(self.port), timeout_s)
            except ProcessExitedError as error:
                if attempt + 1 == START_ATTEMPTS or not PORT_TAKEN.search(str(error)):
                    raise
                self._restart_elsewhere()
            else:
                return

    def stop(self, drain_s: float = DRAIN_S) -> None:
        """Stop the broker in good order, and its name service; the data stays."""
        if self.directory.exists():
            with self.directory.locked():
                self._broker.stop(drain_s)
                self._epmd.stop(drain_s=2)

    def kill(self) -> None:
        """SIGKILL the broker with its children and its own name service, as a power cut would."""
        if self.directory.exists():
            with self.directory.locked():
                self._broker.kill()
                self._epmd.kill()

    def destroy(self) -> None:
        """Stop the broker at once and delete its directory."""
        if self.directory.exists():
            self.kill()
            self.directory.remove()

    def ctl(self, *args: str, stdin: str | None = None, timeout_s: float = CTL_TIMEOUT_S) -> str:
        """Run `rabbitmqctl` against this broker and return what it prints; costs about 0.5 s of CPU.

        Raises StackError when the broker is not running or the command fails.
        """
        if not self.is_running():
            raise StackError(f"RabbitMQ in {self.directory.path} is not running")
        argv = [script("rabbitmqctl"), "--quiet", *args]
        env = {**BASE_ENV, **self._env()}
        answer = Account.for_service("rabbitmq").run(argv, env=env, timeout_s=timeout_s, stdin=stdin)
        if answer.returncode != 0:
            raise StackError(f"rabbitmqctl {args[0]} failed:\n{answer.stderr.strip() or answer.stdout}")
        return answer.stdout

    def create_user(
        self,
        name: str,
        password: str | None = None,
        *,
        configure: str = "^$",
        write: str = "^$",
        read: str = "^$",
        tags: Sequence[str] = (),
        limits: Mapping[str, int] | None = None,
    ) -> str:
        """Make or change a broker user and return its AMQP URL; by default it may touch nothing.

        Without a password it keeps the one it has, or gets a random one. A stopped broker learns of it
        at its next start, which costs nothing; a running one at once, by one `ctl` call.
        """
        with self.directory.locked():
            self._furnish(Account.for_service("rabbitmq"))
            facts = self.directory.read()
            users = self._users()
            known = users.get(name)
            if known is not None and password in {None, known.password}:
                password, hashed = known.password, known.password_hash
            else:
                password = password or secrets.token_urlsafe(24)
                hashed = hash_password(password)
            users[name] = BrokerUser(password, hashed, configure, write, read, tuple(tags), dict(limits or {}))
            if users[name] != known:
                # The broker first: what is noted here is not told to it again.
                self._write_definitions(Account.for_service("rabbitmq"), users)
                if self.is_running():
                    self._broker.wait_ready(lambda: greets(self.port), CTL_TIMEOUT_S)
                    self.ctl("import_definitions", str(self._definitions))
                facts["users"] = {user: asdict(details) for user, details in users.items()}
                self.directory.write(facts)
        return self.url_of(name)

    def delete_user(self, name: str) -> None:
        """Forget a broker user; its connections are closed. Unknown users are fine."""
        with self.directory.locked():
            facts = self.directory.read()
            if facts["users"].pop(name, None) is None:
                return
            if self.is_running():
                self.ctl("delete_user", name)
            self.directory.write(facts)
            self._write_definitions(Account.for_service("rabbitmq"), self._users())

    def create_client(self, user: str, project: str, role: Role = "member", *, rotate: bool = False) -> str:
        """Make a broker user for an AMQP client of a project and return its AMQP URL.

        One that is there already stays as it is; with `rotate` it gets a new password. One whose project or
        role changes starts anew: its connections are closed and its queues are gone, since they may hold,
        and go on getting, the events of another project.
        Raises StackError when the name may not be a client's, or the broker does not run.
        """
        check_client(user, project)
        wanted = client_permissions(user, project, role)
        known = self._users().get(user)
        if known is not None and not known.configure.startswith(CLIENT_PREFIX):
            raise StackError(f"broker user '{user}' is there already, and is no client's: choose another name")
        if known is not None and (known.configure, known.write, known.read) == wanted.as_tuple():
            if not rotate:
                return self.url_of(user)
        else:
            self.delete_client(user)
        return self.create_user(
            user,
            known.password if known is not None and not rotate else secrets.token_urlsafe(24),
            configure=wanted.configure,
            write=wanted.write,
            read=wanted.read,
            limits=CLIENT_LIMITS,
        )

    def delete_client(self, user: str) -> None:
        """Forget a client's broker user, close its connections, delete its queues. Unknown users are fine.

        Raises StackError when the broker does not run: the queues would stay.
        """
        check_client(user)
        self.delete_user(user)
        self.ctl("eval", DELETE_OWNED.format(prefix=f"client.{user}.", vhost=VHOST))

    def delete_queue(self, name: str) -> None:
        """Delete a queue, one that belongs to a connection too. Raises StackError when there is none."""
        self.ctl("eval", DELETE_QUEUE.format(name=name, vhost=VHOST))

    def _start(self) -> None:
        account = Account.for_service("rabbitmq")
        server = script("rabbitmq-server")
        self._furnish(account)
        self._epmd.kill()  # it outlives a broker that was killed, and would keep its port
        self._choose_ports(keep_or_replace(self.directory.read()["ports"]))
        facts = self.directory.read()
        self._write_config(account)
        self._write_definitions(account, self._users())
        self._write_cookie(account, facts["cookie"])
        if self._membership is None:
            self._start_epmd(account, facts["ports"]["epmd"])
        self._broker.start([server], env=self._env(), account=account)

    def _furnish(self, account: Account) -> None:
        """Make the directory and its facts, unless they are there."""
        self.directory.give(account, "home", "mnesia", "log")
        if not self.directory.exists():
            self.directory.write(new_facts(self._membership))

    def _start_epmd(self, account: Account, port: int) -> None:
        """Start our own Erlang name service, and have it up before anything starts one by itself."""
        start_epmd(self._epmd, account, port)

    def _restart_elsewhere(self) -> None:
        with self.directory.locked():
            self._epmd.kill()
            self._choose_ports(new_ports())
            self._start()

    def _choose_ports(self, ports: dict[str, int]) -> None:
        facts = self.directory.read()
        facts["ports"] = ports if self._membership is None else {**ports, "epmd": self._membership.epmd_port}
        self.directory.write(facts)

    @property
    def _definitions(self) -> Path:
        return self.directory.path / "definitions.json"

    def _users(self) -> dict[str, BrokerUser]:
        stored: Mapping[str, Mapping[str, Any]] = self.directory.read()["users"]
        return {name: BrokerUser(**{**details, "tags": tuple(details["tags"])}) for name, details in stored.items()}

    def _env(self) -> dict[str, str]:
        facts = self.directory.read()
        path = self.directory.path
        return {
            "HOME": str(path / "home"),
            "RABBITMQ_NODENAME": f"{facts['node']}@localhost",
            "RABBITMQ_CONFIG_FILE": str(path / "rabbitmq.conf"),
            # Files that are not there, so that those in /etc/rabbitmq are not read.
            "RABBITMQ_CONF_ENV_FILE": str(path / "no-env.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(path / "no-advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(path / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(path / "mnesia"),
            "RABBITMQ_LOG_BASE": str(path / "log"),
            "RABBITMQ_LOGS": str(self.log_file),
            "RABBITMQ_DIST_PORT": str(facts["ports"]["dist"]),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": SERVER_ERL_ARGS + (CLUSTER_ERL_ARGS if self._membership else ""),
            "RABBITMQ_CTL_ERL_ARGS": CTL_ERL_ARGS,
            "RABBITMQ_CTL_DIST_PORT_MIN": "0",
            "RABBITMQ_CTL_DIST_PORT_MAX": "0",
            # Makes the start script become the broker instead of waiting beside it.
            "RUNNING_UNDER_SYSTEMD": "true",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(facts["ports"]["epmd"]),
            "ERL_CRASH_DUMP_SECONDS": "0",
        }

    def _write_config(self, account: Account) -> None:
        ports = self.directory.read()["ports"]
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{ports['amqp']}",
            "definitions.import_backend": "local_filesystem",
            "definitions.local.path": str(self._definitions),
            "definitions.skip_if_unchanged": "true",
            "default_vhost": VHOST,
            "heartbeat": str(self.heartbeat_s),
            "max_message_size": str(MAX_MESSAGE_BYTES),
            "disk_free_limit.absolute": "50MB",
            "vm_memory_high_watermark.relative": "0.4",
            # The default of 512 MB is kept in memory as well until it is full.
            "raft.wal_max_size_bytes": "64000000",
            "log.console": "false",
            "log.file.level": "info",
            "log.file.rotation.size": "10485760",
            "log.file.rotation.count": "2",
        }
        if self._membership is not None:
            settings |= self._membership.settings()
        if self.metrics:
            settings |= {"prometheus.tcp.ip": "127.0.0.1", "prometheus.tcp.port": str(ports["metrics"])}
        if self.management:
            settings |= {"management.tcp.ip": "127.0.0.1", "management.tcp.port": str(ports["management"])}
        lines = [f"{key} = {value}\n" for key, value in settings.items()]
        self.directory.share("rabbitmq.conf", "".join(lines), account)
        chosen = {"rabbitmq_prometheus": self.metrics, "rabbitmq_management": self.management}
        plugins = ",".join(plugin for plugin, is_on in chosen.items() if is_on)
        self.directory.share("enabled_plugins", f"[{plugins}].\n", account)

    def _write_definitions(self, account: Account, users: Mapping[str, BrokerUser]) -> None:
        """Users, permissions and the virtual host are read at boot: no command has to be run for them."""
        definitions = {
            "vhosts": [{"name": VHOST}],
            "users": [user.definition(name) for name, user in users.items()],
            "permissions": [user.permission(name) for name, user in users.items()],
            "policies": [{"vhost": VHOST, "name": CLIENT_POLICY_NAME, **CLIENT_POLICY}],
        }
        self.directory.share(self._definitions.name, json.dumps(definitions, indent=1), account)

    def _write_cookie(self, account: Account, cookie: str) -> None:
        path = self.directory.path / "home" / ".erlang.cookie"
        if not path.exists():
            made = self.directory.share("cookie", cookie, account)
            made.chmod(0o600)
            shutil.chown(made, account.uid, account.gid)
            made.replace(path)


def script(name: str) -> str:
    """Return the path of one of RabbitMQ's own scripts; those in PATH insist on root or `rabbitmq`."""
    path = SCRIPTS / name
    if not path.exists():
        raise StackError(f"{path} is missing: RabbitMQ is not installed, try script/setup")
    return str(path)


def start_epmd(epmd: Daemon, account: Account, port: int) -> None:
    """Have an Erlang name service running on this port of 127.0.0.1."""
    program = shutil.which("epmd", path=BASE_ENV["PATH"])
    if program is None:
        raise StackError("epmd is not installed: try script/setup")
    epmd.start([program, "-address", "127.0.0.1", "-port", str(port)], account=account)
    epmd.wait_ready(lambda: is_listening(port), EPMD_READY_S)


def new_facts(membership: Membership | None = None) -> dict[str, Any]:
    """Return the facts of a server that was never started."""
    password = membership.admin_password if membership else secrets.token_urlsafe(24)
    admin = BrokerUser(password, hash_password(password), ".*", ".*", ".*", ("administrator",))
    return {
        "node": membership.node if membership else "leveret",
        "cookie": membership.cookie if membership else secrets.token_hex(16),
        "ports": new_ports(),
        "users": {ADMIN: asdict(admin)},
    }


def new_ports() -> dict[str, int]:
    """Choose the ports for AMQP, the Erlang distribution, the name service, the metrics and the HTTP API."""
    ports: dict[str, int] = {}
    for purpose in PORTS:
        ports[purpose] = free_port(taken=ports.values())
    return ports


def keep_or_replace(ports: Mapping[str, int]) -> dict[str, int]:
    """Return the same ports, with another one for each that somebody else holds now, or that is missing."""
    kept: dict[str, int] = {}
    for purpose in PORTS:
        port = ports.get(purpose)
        if port is None or not is_free(port):
            port = free_port(taken=[*ports.values(), *kept.values()])
        kept[purpose] = port
    return kept


def greets(port: int, timeout_s: float = 2.0) -> bool:
    """Tell whether an AMQP 0-9-1 broker answers on this port of 127.0.0.1."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
            connection.sendall(PROTOCOL_HEADER)
            with connection.makefile("rb") as answer:
                frame = answer.read(11)
    except OSError:
        return False
    return frame[:3] == b"\x01\x00\x00" and frame[7:11] == b"\x00\x0a\x00\x0a"
