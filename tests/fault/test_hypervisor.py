"""Rows 5, 6 and 7 of the fault table: a worker, its libvirtd, its guests or its whole host end or hang. Real guests."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from uuid import UUID

import pytest
from peers import eventually
from real_host import OBEDIENT, RealHost, guest, real_house, tell

from leveret.client import Leveret
from leveret.shared.documents import ImageByUrl
from leveret.shared.errors import Code
from leveret.shared.fault_points import Deed
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State

pytestmark = [
    pytest.mark.fault,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="a private libvirtd needs root"),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealHost]:
    settings = {"LEVERET_CALL_TIMEOUT_S": "5", "LEVERET_IMAGE_INNER_ALLOWED": '["127.0.0.0/8"]'}
    with real_house(tmp_path_factory.mktemp("images"), settings) as host:
        yield host


@pytest.fixture
async def client(host: RealHost) -> AsyncIterator[Leveret]:
    """Afterwards nothing is left of any VM, and every rule holds."""
    async with host.house.client() as client:
        yield client
        ids = [row["id"] for row in await host.house.query("SELECT id FROM vms WHERE state <> 'deleted'")]
        await asyncio.gather(*(client.delete(vm_id) for vm_id in ids))
    await host.all_are(State.DELETED, *ids)
    await host.agrees()
    assert host.domains() == {}
    assert host.files() == set()


async def running(host: RealHost, client: Leveret, count: int) -> list[UUID]:
    ids = [new_id() for _ in range(count)]
    await asyncio.gather(*(client.create(guest(), vm_id=vm_id) for vm_id in ids))
    await host.all_are(State.RUNNING, *ids)
    await eventually(lambda: all(host.ticks(vm_id) for vm_id in ids), within_s=60, what="guests that have booted")
    return ids


# Row 5: the worker is killed at a step.


@pytest.mark.parametrize(
    ("point", "deed"),
    [
        pytest.param("vm.image", Deed.KILL_BEFORE, marks=pytest.mark.slow),
        ("vm.image", Deed.KILL_AFTER),
        ("vm.disk", Deed.KILL_AFTER),
        ("vm.config_drive", Deed.KILL_AFTER),
        ("vm.define", Deed.KILL_AFTER),
        ("vm.start", Deed.KILL_AFTER),
        ("vm.mark", Deed.KILL_AFTER),
    ],
)
async def test_a_worker_killed_at_a_step_of_a_build_goes_on_with_it_when_it_is_back(
    point: str, deed: Deed, host: RealHost, client: Leveret, record_property: Callable[[str, object], None]
) -> None:
    vm_id = new_id()
    async with dying_at(host, point, deed):
        await client.create(guest(), vm_id=vm_id)
    began = time.monotonic()
    (vm,) = await host.all_are(State.RUNNING, vm_id)
    record_property("recovery_s", round(time.monotonic() - began, 1))
    assert vm.attempts == 1
    await eventually(lambda: host.ticks(vm_id), within_s=60, what="a guest that has booted")
    assert host.boots(vm_id) == 1
    assert host.domains() == {vm_id: "running"}
    assert host.files() == {str(vm_id)}
    assert {path.name for path in (host.pool / str(vm_id)).iterdir()} == FILES
    assert not list((host.pool / "images").glob(".*"))
    await host.agrees()


@pytest.mark.parametrize("deed", [pytest.param(Deed.KILL_BEFORE, marks=pytest.mark.slow), Deed.KILL_AFTER])
@pytest.mark.parametrize("verb", ["stop", "reboot", "remove"])
async def test_a_worker_killed_at_a_change_of_a_vm_has_it_made_when_it_is_back(
    verb: str, deed: Deed, host: RealHost, client: Leveret
) -> None:
    changed, other = await running(host, client, 2)
    pid = host.qemu(other).pid
    async with dying_at(host, f"vm.{verb}", deed):
        match verb:
            case "stop":
                await client.stop(changed, grace_s=0)
            case "reboot":
                await client.reboot(changed)
            case "remove":
                await client.delete(changed)
    state = {"stop": State.STOPPED, "reboot": State.RUNNING, "remove": State.DELETED}[verb]
    await host.all_are(state, changed)
    if verb == "reboot":
        # Told to reset it once, a worker that cannot know that it did may do it again; never less than once.
        await eventually(lambda: host.boots(changed) >= 2, within_s=60, what="a second boot")
        assert host.boots(changed) <= 3
    left = {} if verb == "remove" else {changed: str(state)}
    assert host.domains() == left | {other: "running"}
    assert host.files() == {str(vm_id) for vm_id in (*left, other)}
    assert host.qemu(other).pid == pid
    await host.agrees()


async def test_a_worker_killed_when_half_an_image_has_come_fetches_it_anew_and_leaves_no_half(
    host: RealHost, client: Leveret, half_served: "HalfServed"
) -> None:
    vm_id = new_id()
    image = ImageByUrl(url=half_served.url, sha256=half_served.sha256, format="raw")
    await client.create(guest().model_copy(update={"image": image}), vm_id=vm_id)
    cache = host.pool / "images"
    await eventually(lambda: sum(path.stat().st_size for path in cache.glob(".*")), within_s=60, what="half an image")
    await asyncio.to_thread(host.house.kill, "compute")
    half_served.gate.set()
    host.house.restart("compute")
    await host.all_are(State.RUNNING, vm_id)
    assert not list(cache.glob(".*"))
    assert host.domains() == {vm_id: "running"}
    await host.agrees()


@dataclass
class HalfServed:
    """An image of which only half is sent until the gate is open."""

    url: str
    sha256: str
    gate: asyncio.Event


@pytest.fixture
async def half_served() -> AsyncIterator[HalfServed]:
    content, gate = OBEDIENT.ljust(4 * 1024 * 1024, b"\0"), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content))
            writer.write(content[: len(content) // 2])
            await writer.drain()
            await gate.wait()
            writer.write(content[len(content) // 2 :])
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/image"
    yield HalfServed(url, hashlib.sha256(content).hexdigest(), gate)
    gate.set()
    server.close()


@asynccontextmanager
async def dying_at(host: RealHost, point: str, deed: Deed) -> AsyncIterator[None]:
    """What is asked for in this block kills the worker at that point; then another one is started."""
    plan, draft = host.faults / point, host.faults / "draft"
    draft.write_text(deed)
    draft.replace(plan)
    yield
    await eventually(lambda: not plan.exists(), within_s=60, what=f"a worker at {point}")
    daemon = host.house.runner.daemon("compute")
    await eventually(lambda: not daemon.is_running(), within_s=30, what="its death")
    host.house.restart("compute")


FILES = {"disk.qcow2", "config.iso", "console.log", "console.mark"}


# Row 6: libvirtd dies, is restarted, hangs.


@contextmanager
def killed(host: RealHost) -> Iterator[None]:
    host.libvirtd.kill()
    yield
    host.libvirtd.start()


@contextmanager
def stopped(host: RealHost) -> Iterator[None]:
    host.libvirtd.stop()
    yield
    host.libvirtd.start()


@contextmanager
def frozen(host: RealHost) -> Iterator[None]:
    host.freeze_libvirtd()
    try:
        yield
    finally:
        host.thaw_libvirtd()


@pytest.mark.parametrize("away", [killed, pytest.param(stopped, marks=pytest.mark.slow), frozen])
async def test_guests_outlive_their_libvirtd_and_what_came_meanwhile_is_done_afterwards(
    away: Callable[[RealHost], AbstractContextManager[None]],
    host: RealHost,
    client: Leveret,
    record_property: Callable[[str, object], None],
) -> None:
    untouched, stopping, starting, crashing, ending, leaving = await running(host, client, 6)
    await client.stop(starting, grace_s=0)
    await host.all_are(State.STOPPED, starting)
    before, pid = await host.heard_of(), host.qemu(untouched).pid
    terminal = host.terminal(ending)
    with away(host):
        await eventually(host.trouble, within_s=30, what="a heartbeat that says so")
        await asyncio.gather(client.stop(stopping, grace_s=0), client.start(starting), client.delete(leaving))
        host.qemu(crashing).kill()
        tell(terminal, "o")
        assert await host.longest_silence_s(beats=4) < 10
        ticks = host.ticks(untouched)
        await eventually(lambda: host.ticks(untouched) > ticks + 10, within_s=30, what="a guest that lives")
        assert await client.get(stopping)  # the front door is open all the time
    began = time.monotonic()

    await host.all_are(State.RUNNING, untouched, starting)
    stops = await host.all_are(State.STOPPED, stopping, crashing, ending)
    assert [vm.problem and vm.problem.code for vm in stops] == [None, Code.GUEST_CRASHED, Code.GUEST_SHUTDOWN]
    await host.all_are(State.DELETED, leaving)
    await eventually(host.is_well, within_s=30, what="a heartbeat without a problem")
    record_property("recovery_s", round(time.monotonic() - began, 1))
    assert host.qemu(untouched).pid == pid
    assert host.boots(untouched) == 1
    assert (await host.heard_of())["epoch"] == before["epoch"]  # it was one and the same worker

    began = time.monotonic()
    host.qemu(untouched).kill()
    await host.all_are(State.STOPPED, untouched)
    record_property("event_s", round(time.monotonic() - began, 1))
    await running(host, client, 1)
    await host.agrees()


# Row 7: guests end by themselves, and hosts with all that is on them.


def kill_qemu(host: RealHost, vm_id: UUID) -> None:
    host.qemu(vm_id).kill()


def switch_off(host: RealHost, vm_id: UUID) -> None:
    tell(host.terminal(vm_id), "o")


def panic(host: RealHost, vm_id: UUID) -> None:
    tell(host.terminal(vm_id), "p")


@pytest.mark.parametrize(
    ("end", "code"),
    [(kill_qemu, Code.GUEST_CRASHED), (switch_off, Code.GUEST_SHUTDOWN), (panic, Code.GUEST_CRASHED)],
)
async def test_a_guest_that_ends_by_itself_is_reported_with_the_reason_and_can_be_started_again(
    end: Callable[[RealHost, UUID], None], code: Code, host: RealHost, client: Leveret
) -> None:
    ended, other = await running(host, client, 2)
    pid = host.qemu(other).pid
    end(host, ended)
    (vm,) = await host.all_are(State.STOPPED, ended)
    assert vm.problem is not None
    assert vm.problem.code is code
    assert vm.desired == "running"
    stopped = await host.house.query("SELECT data FROM events WHERE vm_id = $1 AND type = 'stopped'", ended)
    assert [str(code) in row["data"] for row in stopped] == [True]
    await host.agrees()

    await client.start(ended)
    (vm,) = await host.all_are(State.RUNNING, ended)
    assert vm.problem is None
    await eventually(lambda: host.boots(ended) == 2, within_s=30, what="its second boot")
    assert host.qemu(other).pid == pid
    assert host.boots(other) == 1
    await host.agrees()


async def test_after_a_reboot_of_its_host_runs_what_should_run_and_nothing_else(
    host: RealHost, client: Leveret, record_property: Callable[[str, object], None]
) -> None:
    first, second, stopped, ended, stopping, leaving = await running(host, client, 6)
    await client.stop(stopped, grace_s=0)
    switch_off(host, ended)
    await host.all_are(State.STOPPED, stopped, ended)
    building = new_id()
    await client.create(guest(), vm_id=building)
    host.power_cut()
    await asyncio.gather(client.stop(stopping, grace_s=0), client.delete(leaving))
    host.boot()
    began = time.monotonic()

    await host.all_are(State.RUNNING, first, second, building)
    record_property("recovery_s", round(time.monotonic() - began, 1))
    await host.all_are(State.RUNNING, ended)  # its owner still wants it to run
    await host.all_are(State.STOPPED, stopped, stopping)
    await host.all_are(State.DELETED, leaving)
    await host.agrees()
    up = {first, second, ended, building}
    assert host.domains() == dict.fromkeys(up, "running") | dict.fromkeys((stopped, stopping), "stopped")
    assert host.files() == {str(vm_id) for vm_id in (*up, stopped, stopping)}
    await eventually(lambda: all(host.boots(vm_id) == 2 for vm_id in (first, second, ended)), within_s=30)
    assert [host.boots(vm_id) for vm_id in (stopped, stopping)] == [1, 1]
    told = await host.house.query("SELECT type, data FROM events WHERE vm_id = $1 ORDER BY id", first)
    assert [row["type"] for row in told][-3:] == ["stopped", "changed", "running"]
    assert Code.HOST_REBOOTED in told[-3]["data"]
