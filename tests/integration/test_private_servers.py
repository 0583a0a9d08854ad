"""The servers that `leveret up` and the tests run: started, found again, killed, restarted, and gone."""

import asyncio
import dataclasses
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aio_pika
import aiormq
import psutil
import pytest

from leveret.stack import postgres as postgres_module
from leveret.stack.errors import NotReadyError, ProcessExitedError, StackError
from leveret.stack.libvirtd import Libvirtd, choose_libvirt, namespace_exists, virsh
from leveret.stack.ports import free_port, is_free, is_listening
from leveret.stack.postgres import Postgres
from leveret.stack.process import Daemon, ProcessIdentity
from leveret.stack.rabbitmq import Rabbit
from leveret.stack.servers import start_all

pytestmark = pytest.mark.integration

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

TINY_GUEST = """
<domain type='qemu'>
  <name>tiny</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <features><tcg><tb-cache unit='MiB'>32</tb-cache></tcg></features>
</domain>
"""


def is_alive(pid: int) -> bool:
    """A zombie is dead: process 1 may take its time to collect it."""
    return ProcessIdentity.of(pid) is not None


def family_of(server: Rabbit | Postgres) -> list[int]:
    assert server.pid is not None
    return [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]


@pytest.fixture(scope="module")
def two_brokers(run_dir: Path) -> Iterator[tuple[Rabbit, Rabbit]]:
    pair = Rabbit(run_dir / "rabbit-one"), Rabbit(run_dir / "rabbit-two")
    start_all(pair)
    yield pair
    for server in pair:
        server.destroy()


@pytest.fixture(scope="module")
def two_databases(run_dir: Path) -> Iterator[tuple[Postgres, Postgres]]:
    pair = Postgres(run_dir / "pg-one"), Postgres(run_dir / "pg-two", durable=False)
    start_all(pair)
    yield pair
    for server in pair:
        server.destroy()


async def put(url: str, queue: str, body: bytes) -> None:
    """Return when the broker has confirmed the message in a quorum queue."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        await channel.declare_queue(queue, durable=True, arguments={"x-queue-type": "quorum"})
        await channel.default_exchange.publish(aio_pika.Message(body), queue, mandatory=True)


async def take(url: str, queue: str) -> bytes:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        message = await (await channel.get_queue(queue, ensure=False)).get(timeout=20)
        await message.ack()
        return message.body


class TestRabbit:
    async def test_two_at_once_do_not_meet(self, two_brokers: tuple[Rabbit, Rabbit]) -> None:
        one, two = two_brokers
        await put(one.url, "only-here", b"one")
        async with await aio_pika.connect(two.url) as connection:
            channel = await connection.channel()
            with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
                await channel.declare_queue("only-here", passive=True)

    def test_another_object_finds_it_running_and_does_not_start_it_again(
        self, two_brokers: tuple[Rabbit, Rabbit]
    ) -> None:
        one, _ = two_brokers
        again = Rabbit(one.directory.path)
        pid = one.pid
        again.start()
        again.wait_ready()
        assert (again.pid, again.url) == (pid, one.url)

    async def test_nobody_gets_in_with_the_password_everybody_knows(self, two_brokers: tuple[Rabbit, Rabbit]) -> None:
        with pytest.raises(aiormq.exceptions.ProbableAuthenticationError):
            await aio_pika.connect(f"amqp://guest:guest@127.0.0.1:{two_brokers[0].port}/leveret")

    async def test_a_user_made_while_it_runs_may_do_what_it_was_given_and_no_more(
        self, two_brokers: tuple[Rabbit, Rabbit]
    ) -> None:
        one, _ = two_brokers
        url = await asyncio.to_thread(one.create_user, "some/client", configure="^client\\.", read="^client\\.")
        async with await aio_pika.connect(url) as connection:
            channel = await connection.channel()
            await channel.declare_queue("client.mine", exclusive=True)
            with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
                await channel.declare_queue("other")

    async def test_sigkill_leaves_no_process_and_loses_no_confirmed_message(
        self, two_brokers: tuple[Rabbit, Rabbit]
    ) -> None:
        one, two = two_brokers
        await put(one.url, "orders", b"kept")
        # A quorum queue is on disk, but that it exists may not be within the first second of its life.
        await asyncio.to_thread(one.ctl, "eval", "[dets:sync(Table) || Table <- dets:all()].")
        family, url = family_of(one), one.url
        await asyncio.to_thread(one.kill)
        assert not any(is_alive(pid) for pid in family)
        assert not one.is_running()
        await asyncio.to_thread(start_all, [one])
        assert one.url == url
        assert await take(url, "orders") == b"kept"
        assert two.is_running()

    def test_one_that_died_and_left_its_name_service_starts_again_where_it_was(
        self, two_brokers: tuple[Rabbit, Rabbit]
    ) -> None:
        one, _ = two_brokers
        url, broker = one.url, psutil.Process(one.pid)
        broker.kill()
        psutil.wait_procs([broker], timeout=10)
        one.start()
        one.wait_ready()
        assert one.url == url

    def test_stop_leaves_the_data_and_nothing_else(self, two_brokers: tuple[Rabbit, Rabbit]) -> None:
        _, two = two_brokers
        family, ports = family_of(two), two.directory.read()["ports"].values()
        two.stop()
        assert not any(is_alive(pid) for pid in family)
        assert not any(is_listening(port) for port in ports)
        assert two.directory.exists()
        two.destroy()
        assert not two.directory.path.exists()

    def test_a_command_to_a_stopped_broker_is_refused_at_once(self, run_dir: Path) -> None:
        with pytest.raises(StackError, match="not running"):
            Rabbit(run_dir / "never").ctl("status")


class TestPostgres:
    def test_a_committed_row_survives_a_crash_and_sigkill(self, two_databases: tuple[Postgres, Postgres]) -> None:
        one, two = two_databases
        for server in two_databases:
            server.create_role("owner")
            server.create_database("crash", owner="owner")
            server.psql("CREATE TABLE t (a int); INSERT INTO t VALUES (42)", database="crash", role="owner")
            dsn = server.dsn("owner", "crash")
            server.restart("immediate")
            assert server.psql("SELECT a FROM t", database="crash", role="owner") == "42"
            family = family_of(server)
            server.kill()
            assert not any(is_alive(pid) for pid in family)
            start_all([server])
            assert server.psql("SELECT a FROM t", database="crash", role="owner") == "42"
            assert server.dsn("owner", "crash") == dsn
        assert one.port != two.port

    def test_two_at_once_do_not_meet(self, two_databases: tuple[Postgres, Postgres]) -> None:
        one, two = two_databases
        one.create_database("only-here")
        assert "only-here" not in two.psql("SELECT datname FROM pg_database").splitlines()

    def test_another_object_finds_it_running_and_does_not_start_it_again(
        self, two_databases: tuple[Postgres, Postgres]
    ) -> None:
        one, _ = two_databases
        again = Postgres(one.directory.path)
        pid = one.pid
        again.start()
        again.wait_ready()
        assert (again.pid, again.dsn()) == (pid, one.dsn())

    def test_making_roles_and_databases_twice_changes_nothing(self, two_databases: tuple[Postgres, Postgres]) -> None:
        _, two = two_databases
        for _ in range(2):
            two.create_role("o'brien")
            two.create_database('a "b"', owner="o'brien")
        assert two.psql("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'a \"b\"'") == "o'brien"

    def test_one_that_loses_its_port_while_it_starts_takes_another(
        self, two_databases: tuple[Postgres, Postgres], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, two = two_databases
        two.stop()
        answers = iter([True])  # free when asked, and taken a moment later
        monkeypatch.setattr(postgres_module, "is_free", lambda port: next(answers, None) or is_free(port))
        with socket.create_server(("127.0.0.1", two.port)) as thief:
            start_all([two])
            assert two.port != thief.getsockname()[1]
        assert two.psql("SELECT 1") == "1"

    def test_an_error_in_sql_is_told(self, two_databases: tuple[Postgres, Postgres]) -> None:
        with pytest.raises(StackError, match="syntax error"):
            two_databases[1].psql("SELEC 1")

    def test_stop_leaves_the_data_and_nothing_else(self, two_databases: tuple[Postgres, Postgres]) -> None:
        _, two = two_databases
        family, port = family_of(two), two.port
        two.stop()
        assert not any(is_alive(pid) for pid in family)
        assert is_free(port)
        two.destroy()
        assert not two.directory.path.exists()

    def test_a_version_that_is_too_old_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "14/bin").mkdir(parents=True)
        (tmp_path / "14/bin/postgres").touch()
        monkeypatch.setattr(postgres_module, "PROGRAMS", tmp_path)
        with pytest.raises(StackError, match="15 or newer is needed; the newest here is 14"):
            postgres_module.programs()

    @needs_root
    def test_a_directory_its_account_cannot_reach_is_refused_and_left_alone(self, run_dir: Path) -> None:
        secret = run_dir / "secret"
        secret.mkdir(mode=0o700)
        with pytest.raises(StackError, match="cannot enter"):
            Postgres(secret / "postgres").start()
        assert list(secret.iterdir()) == []


@pytest.fixture(scope="module")
def two_hypervisors() -> Iterator[tuple[Libvirtd, Libvirtd]]:
    directory = Path(tempfile.mkdtemp(prefix="lv-"))
    namespace = f"lv-{os.getpid()}"
    pair = Libvirtd(directory / "one"), Libvirtd(directory / "two", namespace)
    start_all(pair)
    yield pair
    for server in pair:
        server.destroy()
    shutil.rmtree(directory)


@needs_root
class TestLibvirtd:
    def test_a_guest_survives_sigkill_of_libvirtd_and_is_found_again(
        self, two_hypervisors: tuple[Libvirtd, Libvirtd], run_dir: Path
    ) -> None:
        one, two = two_hypervisors
        document = run_dir / "tiny.xml"
        document.write_text(TINY_GUEST)
        virsh(one.uri, "define", str(document))
        virsh(one.uri, "start", "tiny")
        daemon, before = one.pid, set(one.processes())
        one.kill()
        assert before - set(one.processes()) == {daemon}
        start_all([one])
        assert virsh(one.uri, "domstate", "tiny").strip() == "running"
        assert virsh(two.uri, "list", "--all", "--name").split() == []

    def test_stopping_it_keeps_guests_and_their_consoles(self, two_hypervisors: tuple[Libvirtd, Libvirtd]) -> None:
        one, _ = two_hypervisors
        daemon, before = one.pid, set(one.processes())
        one.stop()
        assert before - set(one.processes()) == {daemon}
        start_all([one])

    def test_another_host_has_its_own_network_which_goes_with_it(
        self, two_hypervisors: tuple[Libvirtd, Libvirtd]
    ) -> None:
        one, two = two_hypervisors
        assert two.network_namespace is not None
        virsh(two.uri, "net-start", "default")
        assert len(two.processes()) == 4  # libvirtd, virtlogd, dnsmasq and its helper
        two.destroy()
        assert two.processes() == []
        assert not namespace_exists(two.network_namespace)
        assert one.is_running()

    def test_the_end_takes_guests_along(self, two_hypervisors: tuple[Libvirtd, Libvirtd]) -> None:
        one, _ = two_hypervisors
        assert len(one.processes()) == 3
        one.kill()
        one.stop(destroy_guests=True)
        assert one.processes() == []

    def test_one_that_was_used_is_chosen_again(self, two_hypervisors: tuple[Libvirtd, Libvirtd]) -> None:
        one, _ = two_hypervisors
        choice = choose_libvirt(one.directory.path)
        assert choice.uri == one.uri
        assert choice.server is not None


def test_the_environment_chooses_the_libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEVERET_LIBVIRT_URI", "test:///default")
    choice = choose_libvirt(tmp_path)
    assert (choice.uri, choice.server) == ("test:///default", None)


class TestDaemon:
    def test_one_that_ends_at_once_is_reported_with_its_log(self, tmp_path: Path) -> None:
        daemon = Daemon("failing", tmp_path)
        daemon.start(["/bin/sh", "-c", "echo no such luck; exit 3"])
        with pytest.raises(ProcessExitedError, match="no such luck"):
            daemon.wait_ready(lambda: False, timeout_s=10)

    def test_one_that_never_gets_ready_is_reported(self, tmp_path: Path) -> None:
        daemon = Daemon("slow", tmp_path)
        daemon.start(["/bin/sleep", "60"])
        with pytest.raises(NotReadyError, match=r"not ready after 0\.1 s"):
            daemon.wait_ready(lambda: False, timeout_s=0.1)
        daemon.kill()

    def test_one_that_ignores_sigterm_is_killed_with_its_children(self, tmp_path: Path) -> None:
        daemon = Daemon("stubborn", tmp_path)
        daemon.start(["/bin/sh", "-c", "trap '' TERM; sleep 60 & touch ready; wait; sleep 60"], cwd=tmp_path)
        daemon.wait_ready((tmp_path / "ready").exists, timeout_s=10)
        assert daemon.pid is not None
        family = [daemon.pid, *(child.pid for child in psutil.Process(daemon.pid).children())]
        assert not daemon.stop(drain_s=0.1)
        assert len(family) == 2
        assert not any(is_alive(pid) for pid in family)

    def test_another_process_under_the_same_pid_is_not_taken_for_it(self, tmp_path: Path) -> None:
        daemon = Daemon("ended", tmp_path)
        stranger = ProcessIdentity.of(os.getpid())
        assert stranger is not None
        noted = dataclasses.replace(stranger, start_ticks=stranger.start_ticks - 1)
        daemon.pid_file.write_text(json.dumps(dataclasses.asdict(noted)))
        assert not daemon.is_running()
        daemon.kill()
        assert not daemon.pid_file.exists()

    def test_starting_it_twice_starts_it_once(self, tmp_path: Path) -> None:
        daemon = Daemon("once", tmp_path)
        daemon.start(["/bin/sleep", "60"])
        pid = daemon.pid
        Daemon("once", tmp_path).start(["/bin/sleep", "60"])
        assert daemon.pid == pid
        assert daemon.stop(drain_s=5)


def test_a_port_on_which_somebody_listens_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        port = listener.getsockname()[1]
        assert not is_free(port)
        assert is_listening(port)
    assert is_free(port)
