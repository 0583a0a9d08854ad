"""Which processes make up an installation, and the settings of each: the one table of them."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from leveret.stack.errors import StackError
from leveret.stack.layout import Layout, Options
from leveret.stack.ports import free_port, is_free
from leveret.stack.process import Daemon
from leveret.stack.services import Check, Runner, Service

USUAL_API_PORT = 8420

#: The conductor is ready when it hears all that it must hear.
_CONSUMES = tuple(
    f'leveret_consuming{{queue="leveret.conductor.{queue}"}} 1.0' for queue in ("requests", "reports", "beats")
)


@dataclass(frozen=True, slots=True)
class Peers:
    """What the services connect to; every service has a broker user and a database role of its own."""

    amqp_urls: Mapping[str, str]
    database_urls: Mapping[str, str]
    libvirt_uri: str | None = None


@dataclass(frozen=True, slots=True)
class Composition:
    """What should run."""

    services: tuple[Service, ...]
    url: str
    expected_hosts: int


class Ports:
    """The ports of this installation: remembered, so that it is found where it was, unless they were lost."""

    def __init__(self, remembered: Mapping[str, int], runner: Runner) -> None:
        self.chosen: dict[str, int] = {}
        self._remembered = remembered
        self._runner = runner

    def of(self, name: str, *, usual: int = 0) -> int:
        """The port of a service: the one it runs with or had before, the usual one, or any that is free."""
        taken = {*self.chosen.values(), *self._remembered.values()}
        before = self._remembered.get(name, 0)
        if before and (self._runner.daemon(name).is_running() or is_free(before)):
            port = before
        elif usual and usual not in taken and is_free(usual):
            port = usual
        else:
            port = free_port(taken)
        self.chosen[name] = port
        return port

    def demand(self, name: str, port: int) -> int:
        """Just this port. Raises StackError when somebody else has it."""
        mine = self._remembered.get(name) == port and self._runner.daemon(name).is_running()
        if not mine and not is_free(port):
            raise StackError(f"port {port} of 127.0.0.1 is taken by another process: choose another --port")
        self.chosen[name] = port
        return port


def compose(layout: Layout, options: Options, peers: Peers, ports: Ports) -> Composition:
    """Everything that should run, in the order in which it is started."""
    names = [f"conductor-{number}" for number in range(1, options.conductors + 1)]
    services = [_conductor(name, peers, ports.of(name)) for name in names]
    api_port = ports.demand("api", options.api_port) if options.api_port else ports.of("api", usual=USUAL_API_PORT)
    services.append(_api("api", peers, api_port))
    services += [_api(name, peers, ports.of(name)) for name in _numbered("api", options.apis)[1:]]
    if peers.libvirt_uri is not None:
        services.append(_compute(layout, options, peers, peers.libvirt_uri))
    if options.fake_hosts:
        services += _fake_hosts(layout, options, peers)
    hosts = options.fake_hosts + (peers.libvirt_uri is not None)
    return Composition(tuple(services), f"http://127.0.0.1:{api_port}", hosts)


def _numbered(name: str, count: int) -> list[str]:
    """The names of processes of which there is usually one: that one has no number."""
    return [name, *(f"{name}-{number}" for number in range(2, count + 1))]


def _conductor(name: str, peers: Peers, metrics_port: int) -> Service:
    return Service(
        name,
        ("leveret.conductor.app",),
        {
            "LEVERET_AMQP_URL": peers.amqp_urls["leveret-conductor"],
            "LEVERET_DATABASE_URL": peers.database_urls["conductor"],
            "LEVERET_GATEWAY_USERS": "leveret-api",
            "LEVERET_METRICS_PORT": str(metrics_port),
        },
        Check(f"http://127.0.0.1:{metrics_port}/metrics", _CONSUMES),
    )


def _api(name: str, peers: Peers, port: int) -> Service:
    return Service(
        name,
        ("leveret.api.app",),
        {
            "LEVERET_AMQP_URL": peers.amqp_urls["leveret-api"],
            "LEVERET_DATABASE_URL": peers.database_urls["api"],
            "LEVERET_LISTEN_HOST": "127.0.0.1",
            "LEVERET_LISTEN_PORT": str(port),
        },
        Check(f"http://127.0.0.1:{port}/readyz"),
    )


def _compute(layout: Layout, options: Options, peers: Peers, libvirt_uri: str) -> Service:
    return Service(
        "compute",
        ("leveret.compute.app",),
        {
            "LEVERET_AMQP_URL": peers.amqp_urls["leveret-compute"],
            "LEVERET_HOST_STATE_DIR": str(layout.host),
            "LEVERET_POOL_DIR": str(layout.pool),
            "LEVERET_LIBVIRT_URI": libvirt_uri,
            "LEVERET_VIRT_TYPE": options.virt_type,
            # Small machines, idle guests: ten VMs should fit where somebody tries it out.
            "LEVERET_VCPU_RATIO": "16",
            **_session_environment(libvirt_uri),
            "LEVERET_IMAGE_DIRS": json.dumps([str(layout.image_dir(options))]),
        },
    )


def _session_environment(libvirt_uri: str) -> dict[str, str]:
    """A session's libvirtd is found, and started, by what the session's environment says."""
    if not libvirt_uri.endswith("/session"):
        return {}
    names = ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    return {name: os.environ[name] for name in names if name in os.environ}


def _fake_hosts(layout: Layout, options: Options, peers: Peers) -> list[Service]:
    """The workers, each with its share of the hosts, an identity and a name of its own."""
    services = []
    for index, name in enumerate(_numbered("fake-hosts", min(options.fake_workers, options.fake_hosts))):
        share = len(range(index, options.fake_hosts, options.fake_workers))
        env = {
            "LEVERET_AMQP_URL": peers.amqp_urls["leveret-compute"],
            "LEVERET_HOST_STATE_DIR": str(layout.fake_hosts / name if index else layout.fake_hosts),
            "LEVERET_SIMULATE_PERSIST": "true",
            "LEVERET_SIMULATE_ZONES": str(options.fake_zones),
        }
        if index:
            env["LEVERET_HOST_NAME"] = f"{socket.gethostname()}-{index + 1}"
        services.append(Service(name, ("leveret.compute.app", "--simulate", str(share)), env))
    return services


def host_daemons(composition: Composition, runner: Runner) -> list[Daemon]:
    """Who to ask when a host does not report."""
    return [runner.daemon(one.name) for one in composition.services if "leveret.compute.app" in one.argv]
