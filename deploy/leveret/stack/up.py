"""`leveret up`: everything on this machine, from nothing or from whatever is left of it."""

import asyncio
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2

from leveret.conductor.migrate import migrate
from leveret.shared.documents import HostView
from leveret.stack import bootstrap
from leveret.stack.composition import Composition, Peers, Ports, compose, host_daemons
from leveret.stack.errors import NotReadyError, StackError
from leveret.stack.hypervisor import Libvirt, ready_libvirt
from leveret.stack.layout import Layout, Options
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit
from leveret.stack.resuming import resume
from leveret.stack.services import Runner
from leveret.stack.stopping import stop_everything
from leveret.stack.turns import Progress, alone

DATABASE = bootstrap.DATABASE
OWNER = bootstrap.OWNER
SERVER_READY_S = 90.0
SERVICE_READY_S = 45.0
HOSTS_READY_S = 60.0
#: A heartbeat comes every few seconds: an older one is from before.
_FRESH_S = 15.0
_LOOK_S = 0.1

#: What conductors and APIs declare, so that a broker that lost everything is furnished by whoever comes first.
_CORE = r"^leveret\.(requests|hosts|reports|heartbeats|dead|conductor\.(requests|reports|beats))$"
#: Broker users: what each may configure, write and read. The default exchange is where replies go.
BROKER_USERS = {
    "leveret-api": (_CORE, _CORE, _CORE),
    "leveret-conductor": (r"^leveret\.", r"^(leveret\.|amq\.default$)", r"^leveret\."),
    "leveret-compute": (
        r"^leveret\.(requests|hosts|reports|heartbeats|dead|host\..*)$",
        r"^(leveret\.(reports|heartbeats|dead|host\..*)|amq\.default)$",
        r"^leveret\.(hosts|host\..*)$",
    ),
}
#: Database roles that log in, and the group of which each is a member (the migrations grant to groups).
DATABASE_ROLES = {"conductor": "leveret_conductor", "api": "leveret_api"}


@dataclass(frozen=True, slots=True)
class Summary:
    """What stands now. `started` is empty when everything ran already."""

    url: str
    token: str
    hosts: tuple[HostView, ...]
    images: tuple[str, ...]
    started: tuple[str, ...]


def up(layout: Layout, options: Options, progress: Progress) -> Summary:
    """Start what is missing and wait until it is of use. Run again, it does only what is left to do.

    Raises StackError with what to try.
    """
    layout.make()
    with alone(layout, progress):
        if layout.stopping.exists():
            # What was told to end may still be there for a moment: it is of no use any more.
            stop_everything(layout, progress)
        rabbit, postgres, runner = Rabbit(layout.rabbitmq), Postgres(layout.postgres), Runner(layout.services)
        started, libvirt = _start_servers(layout, options, rabbit, postgres, progress)
        token = bootstrap.token_in(layout)
        furnished = _furnish(postgres, layout, options, token, progress)
        make_ssh_key(layout.ssh_key)
        peers = Peers(
            amqp_urls={user: rabbit.url_of(user) for user in BROKER_USERS},
            database_urls={role: postgres.dsn(role, DATABASE) for role in DATABASE_ROLES},
            libvirt_uri=libvirt.uri if libvirt else None,
        )
        ports = Ports(layout.ports(), runner)
        composition = compose(layout, options, peers, ports)
        layout.remember(options, ports.chosen)
        started_at = time.time()
        started += _start_services(runner, composition, progress)
        # What a host said before its worker was restarted tells nothing about the new one.
        restarted = {daemon.name for daemon in host_daemons(composition, runner)} & set(started)
        heard_after = started_at if restarted else started_at - _FRESH_S
        hosts = _wait_for_hosts(runner, composition, token, heard_after, progress)
        if layout.resume.exists():
            progress.doing("starting the guests again that `leveret down` shut down")
            resumed = asyncio.run(resume(layout, peers.amqp_urls["leveret-api"]))
            progress.done("guests", f"started again: {', '.join(resumed.started) or 'none'}")
            if resumed.left:
                progress.done("guests", f"not yet, try `leveret up` once more: {', '.join(resumed.left)}")
    return Summary(composition.url, token, hosts, furnished.images, tuple(started))


def _start_servers(
    layout: Layout, options: Options, rabbit: Rabbit, postgres: Postgres, progress: Progress
) -> tuple[list[str], Libvirt | None]:
    """All at once: the broker takes its time."""

    def start_rabbit() -> bool:
        was_running = rabbit.is_running()
        for name, (configure, write, read) in BROKER_USERS.items():
            rabbit.create_user(name, configure=configure, write=write, read=read)
        rabbit.start()
        rabbit.wait_ready(SERVER_READY_S)
        return not was_running

    def start_postgres() -> bool:
        was_running = postgres.is_running()
        postgres.start()
        postgres.wait_ready(SERVER_READY_S)
        return not was_running

    progress.doing("starting the servers")
    started = []
    libvirt: Libvirt | None = None
    with ThreadPoolExecutor(max_workers=3) as pool:
        broker, database = pool.submit(start_rabbit), pool.submit(start_postgres)
        hypervisor = pool.submit(ready_libvirt, layout, options) if options.libvirt else None
        if database.result():
            progress.done("postgres", f"127.0.0.1:{postgres.port}")
            started.append("postgres")
        if hypervisor is not None:
            libvirt = hypervisor.result()
            if libvirt.started:
                progress.done("libvirtd", libvirt.why)
                started.append("libvirtd")
        if broker.result():
            progress.done("rabbitmq", f"127.0.0.1:{rabbit.port}")
            started.append("rabbitmq")
    return started, libvirt


def _furnish(
    postgres: Postgres, layout: Layout, options: Options, token: str, progress: Progress
) -> bootstrap.Furnished:
    """Roles, database, migrations, and what must be in it."""
    progress.doing("preparing the database")
    postgres.create_role(OWNER)
    for role in DATABASE_ROLES:
        postgres.create_role(role)
    postgres.create_database(DATABASE, owner=OWNER)
    # The groups are made here and not by the migration, so that the owner of the schema need not make roles.
    for role, group in DATABASE_ROLES.items():
        postgres.psql(
            f"SELECT 'CREATE ROLE {group} NOLOGIN' WHERE NOT EXISTS"  # noqa: S608  (both are constants)
            f" (SELECT FROM pg_roles WHERE rolname = '{group}') \\gexec\n"
            f"SELECT 'GRANT {group} TO {role}' WHERE NOT pg_has_role('{role}', '{group}', 'member') \\gexec"
        )
    dsn = postgres.dsn(OWNER, DATABASE)
    applied = asyncio.run(migrate(dsn))
    images = bootstrap.images_in(layout.image_dir(options))
    furnished = asyncio.run(bootstrap.furnish(dsn, token, images))
    if applied:
        progress.done("database", f"{len(applied)} migrations, network {furnished.network}")
    return furnished


def make_ssh_key(path: Path) -> None:
    """A key of the installation's own, so that who has none can log in to guests too."""
    if path.exists():
        return
    program = shutil.which("ssh-keygen")
    if program is None:
        return  # `leveret ssh` says what to install
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    argv = [program, "-q", "-t", "ed25519", "-N", "", "-C", "leveret", "-f", str(draft)]
    subprocess.run(argv, check=True, timeout=30, stdin=subprocess.DEVNULL)
    draft.with_name(f"{draft.name}.pub").replace(path.with_name(f"{path.name}.pub"))
    draft.replace(path)


def _start_services(runner: Runner, composition: Composition, progress: Progress) -> list[str]:
    progress.doing("starting Leveret")
    unwanted = sorted(set(runner.known()) - {service.name for service in composition.services})
    runner.stop(unwanted, lambda name: progress.done(name, "stopped: not wanted any more"))
    for name in unwanted:
        runner.forget(name)
    started = [service.name for service in composition.services if runner.ensure(service)]
    for service in composition.services:
        progress.doing(f"waiting for {service.name}")
        runner.wait_ready(service, SERVICE_READY_S)
        if service.name in started:
            progress.done(service.name, composition.url if service.name == "api" else "")
    return started


def _wait_for_hosts(
    runner: Runner, composition: Composition, token: str, heard_after: float, progress: Progress
) -> tuple[HostView, ...]:
    """The hosts that were heard of after this time, in seconds since the epoch, once there are enough of them."""
    progress.doing("waiting for the hosts")
    deadline = time.monotonic() + HOSTS_READY_S
    while True:
        hosts = hosts_of(composition.url, token)
        alive = tuple(host for host in hosts if host.heartbeat_at.timestamp() > heard_after)
        if len(alive) >= composition.expected_hosts:
            return alive
        if time.monotonic() > deadline:
            counts = f"{len(alive)} of {composition.expected_hosts} hosts"
            tails = "\n".join(daemon.log_tail() for daemon in host_daemons(composition, runner))
            raise NotReadyError(f"only {counts} reported within {HOSTS_READY_S:.0f} s:\n{tails}")
        time.sleep(_LOOK_S)


def hosts_of(url: str, token: str) -> tuple[HostView, ...]:
    """What the API says of its hosts; none while it cannot say."""
    headers = {"Authorization": f"Bearer {token}"}
    try:
        answer = httpx2.get(f"{url}/v1/hosts", headers=headers, timeout=5.0, trust_env=False, verify=False)
    except httpx2.TransportError:
        return ()
    if not answer.is_success:
        return ()
    return tuple(HostView.model_validate(item) for item in answer.json()["items"])


def local_database_url(layout: Layout | None = None) -> str:
    """The database of the installation on this machine, as its owner. Raises StackError when there is none."""
    layout = layout or Layout()
    if not layout.exists():
        raise StackError(f"there is no installation in {layout.root}: run `leveret up`, or give --database-url")
    return Postgres(layout.postgres).dsn(OWNER, DATABASE)
