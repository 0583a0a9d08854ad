"""The compute process on a real broker, with the conductor played by the test."""

import asyncio
import os
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import aio_pika
import pytest
from agent_world import VM_ID, wish
from peers import eventually
from pydantic import BaseModel

from leveret.compute.app import ComputeProcess
from leveret.compute.identity import Identity, IdentityError, take_identity
from leveret.compute.settings import ComputeSettings
from leveret.shared import topology
from leveret.shared.bus import DONE, Caller, Consumer, Delivery, Furniture, Link, Outcome
from leveret.shared.lifecycle import Observed, Wanted
from leveret.shared.messages import (
    AskInventory,
    ConsoleTail,
    Heartbeat,
    HostInventory,
    HostReport,
    ListVms,
    ReadConsole,
    VmReport,
)
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration


class Desk:
    """Hears everything that hosts say, and tells them what is wanted."""

    def __init__(self, rabbit: Rabbit) -> None:
        self.beats: dict[UUID, list[Heartbeat]] = defaultdict(list)
        self.reports: list[HostReport] = []
        self.caller = Caller("leveret-conductor")
        self.link = Link(rabbit.url_of("leveret-conductor"), "test-desk")
        self.link.add(Furniture())
        self.link.add(self.caller)
        self._consumers = [
            Consumer(self.link, queue, self._hear, self.caller.publisher)
            for queue in (topology.REPORTS_QUEUE, topology.HEARTBEATS_QUEUE)
        ]

    async def _hear(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        for delivery in batch:
            message = delivery.decoded()
            if isinstance(message, Heartbeat):
                self.beats[message.host_id].append(message)
            else:
                assert isinstance(message, HostReport)
                self.reports.append(message)
        return [DONE] * len(batch)

    async def tell(self, host_id: UUID, message: BaseModel) -> None:
        await self.caller.publisher.post(topology.HOSTS.name, str(host_id), message)

    def said(self, vm_id: UUID = VM_ID) -> list[tuple[HostReport, VmReport]]:
        return [(report, vm) for report in self.reports for vm in report.vms if vm.vm_id == vm_id]

    async def settled(self, observed: Observed, *, epoch: int, vm_id: UUID = VM_ID) -> VmReport:
        """The first report of a worker's incarnation that says so."""

        def found() -> VmReport | None:
            for report, vm in self.said(vm_id):
                if report.epoch == epoch and vm.settled and vm.observed is observed:
                    return vm
            return None

        report: VmReport = await eventually(found, what=f"{vm_id} {observed}")
        return report

    async def hosts(self, count: int, *, epoch: int = 1) -> list[UUID]:
        """The hosts that have registered in this epoch, once there are so many."""

        def found() -> list[UUID]:
            return [host_id for host_id, beats in self.beats.items() if beats[-1].epoch == epoch]

        await eventually(lambda: len(found()) == count, within_s=20, what=f"{count} hosts in epoch {epoch}")
        return found()

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Desk"]:
        self.link.start()
        for consumer in self._consumers:
            consumer.start()
        try:
            assert await self.link.wait_up(20)
            yield self
        finally:
            for consumer in self._consumers:
                await consumer.stop(1)
            await self.link.stop()


@pytest.fixture
async def desk(broker: Rabbit) -> AsyncIterator[Desk]:
    async with Desk(broker).open() as desk:
        yield desk


def environment(rabbit: Rabbit, state_dir: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "LEVERET_AMQP_URL": rabbit.url_of("leveret-compute"),
        "LEVERET_HOST_STATE_DIR": str(state_dir),
        "LEVERET_HOST_NAME": "lab",
        "LEVERET_HEARTBEAT_S": "0.5",
        **more,
    }


async def launch(env: dict[str, str], *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "leveret.compute.app", *arguments, env=env)


@asynccontextmanager
async def in_process(rabbit: Rabbit, state_dir: Path, hosts: int = 1) -> AsyncIterator[tuple[ComputeProcess, Identity]]:
    """A compute process inside the test."""
    identity = take_identity(state_dir)
    settings = ComputeSettings(
        amqp_url=rabbit.url_of("leveret-compute"), host_state_dir=state_dir, host_name="lab", heartbeat_s=0.5
    )
    process = ComputeProcess(settings, identity, simulate=hosts)
    stop = asyncio.Event()
    running = asyncio.create_task(process.run(stop))
    try:
        yield process, identity
    finally:
        stop.set()
        await running
        identity.release()


async def test_hosts_register_build_survive_a_kill_and_delete(broker: Rabbit, desk: Desk, tmp_path: Path) -> None:
    env = environment(broker, tmp_path, LEVERET_SIMULATE_PERSIST="true", LEVERET_LABELS='{"disk": "ssd"}')
    worker = await launch(env, "--simulate", "3", "--zones", "2")
    try:
        hosts = await desk.hosts(3)
        beats = sorted((desk.beats[host_id][-1] for host_id in hosts), key=lambda beat: beat.name)
        assert [(beat.name, beat.zone) for beat in beats] == [
            ("lab-sim-0001", "zone-1"),
            ("lab-sim-0002", "zone-2"),
            ("lab-sim-0003", "zone-1"),
        ]
        assert (beats[0].labels, beats[0].virt_type, beats[0].placeable.vcpus) == ({"disk": "ssd"}, "simulated", 256)

        host_id = beats[0].host_id
        await desk.tell(host_id, wish())
        report = await desk.settled(Observed.RUNNING, epoch=1)
        assert (report.token, report.generation, report.guest_ready) == (5, 1, True)

        worker.kill()
        await worker.wait()
        worker = await launch(env, "--simulate", "3", "--zones", "2")
        assert set(await desk.hosts(3, epoch=2)) == set(hosts), "the same hosts, in the next epoch"
        await desk.settled(Observed.RUNNING, epoch=2)
        await desk.tell(host_id, wish(Wanted.ABSENT, generation=2, epoch=1))  # for the one that was killed
        await desk.tell(host_id, wish(Wanted.STOPPED, generation=2, epoch=2))
        await desk.settled(Observed.STOPPED, epoch=2)
        await desk.tell(host_id, wish(Wanted.ABSENT, generation=3, epoch=2))
        await desk.settled(Observed.ABSENT, epoch=2)

        worker.send_signal(signal.SIGTERM)
        assert await worker.wait() == 0
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


async def test_a_list_is_complete_and_a_console_is_answered(broker: Rabbit, desk: Desk, tmp_path: Path) -> None:
    async with in_process(broker, tmp_path):
        (host_id,) = await desk.hosts(1)
        await desk.tell(host_id, wish())
        await desk.settled(Observed.RUNNING, epoch=1)
        desk.reports.clear()
        await desk.tell(host_id, ListVms())
        await eventually(lambda: any(report.complete for report in desk.reports))
        complete = next(report for report in desk.reports if report.complete)
        assert [(vm.vm_id, vm.observed) for vm in complete.vms] == [(VM_ID, Observed.RUNNING)]
        tail = await desk.caller.ask(topology.HOSTS.name, str(host_id), ReadConsole(vm_id=VM_ID), wait_s=5)
        assert isinstance(tail, ConsoleTail)
        assert tail.text.endswith("is up\r\n")
        shown = await desk.caller.ask(topology.HOSTS.name, str(host_id), AskInventory(), wait_s=5)
        assert isinstance(shown, HostInventory)
        assert [(domain.vm_id, domain.token, domain.running) for domain in shown.domains] == [
            (VM_ID, wish().token, True)
        ]
        assert (shown.host_id, shown.files, shown.foreign, shown.leftovers) == (host_id, (VM_ID,), (), ())


async def test_what_is_no_command_is_kept_with_the_reason_and_holds_nothing_up(
    broker: Rabbit, desk: Desk, tmp_path: Path
) -> None:
    async with in_process(broker, tmp_path):
        (host_id,) = await desk.hosts(1)
        connection = await aio_pika.connect(broker.url)
        async with connection:
            channel = await connection.channel()
            hosts = await channel.get_exchange(topology.HOSTS.name)
            for kind, body in (("host.desired", b"{"), ("vm.create", b"{}"), ("host.desired", b'{"vm_id": 1}')):
                message = aio_pika.Message(body, type=kind, content_type="application/json")
                await hosts.publish(message, str(host_id))
            await desk.tell(host_id, wish())
            await desk.settled(Observed.RUNNING, epoch=1)
            dead = await channel.get_queue(topology.DEAD_QUEUE.name)
            codes = []
            for _ in range(3):
                letter = await dead.get(no_ack=True, timeout=5)
                assert letter is not None
                codes.append(letter.headers["dead_code"])
            assert sorted(str(code) for code in codes) == ["invalid_request", "invalid_request", "unknown_type"]


async def test_a_deleted_host_queue_is_declared_again_and_the_host_says_everything(
    broker: Rabbit, desk: Desk, tmp_path: Path
) -> None:
    async with in_process(broker, tmp_path, hosts=2) as (process, _):
        hosts = await desk.hosts(2)
        await desk.tell(hosts[0], wish())
        await desk.settled(Observed.RUNNING, epoch=1)
        desk.reports.clear()
        await asyncio.to_thread(broker.delete_queue, topology.host_queue(hosts[0]).name)
        await eventually(lambda: len({report.host_id for report in desk.reports if report.complete}) == 2)
        await eventually(lambda: all(worker.is_ready for worker in process.workers))
        await desk.tell(hosts[0], wish(Wanted.ABSENT, generation=2))
        await desk.settled(Observed.ABSENT, epoch=1)


async def test_a_deleted_reports_queue_costs_no_report(broker: Rabbit, tmp_path: Path) -> None:
    """With no conductor there to declare it again, the worker itself does."""
    async with in_process(broker, tmp_path) as (process, identity):
        await eventually(lambda: all(worker.is_ready for worker in process.workers))
        connection = await aio_pika.connect(broker.url)
        async with connection:
            channel = await connection.channel()
            await channel.queue_delete(topology.REPORTS_QUEUE.name)
        process.workers[0].agent.on_command(wish())
        await eventually(lambda: process.workers[0].agent.reporter.pending == 0)
        async with Desk(broker).open() as desk:
            await desk.settled(Observed.RUNNING, epoch=identity.epoch)


async def test_closing_reports_what_was_finished_and_leaves_the_next_worker_a_free_identity(
    broker: Rabbit, desk: Desk, tmp_path: Path
) -> None:
    async with in_process(broker, tmp_path):
        (host_id,) = await desk.hosts(1)
        with pytest.raises(IdentityError):
            take_identity(tmp_path)
        await desk.tell(host_id, wish())
        await desk.settled(Observed.RUNNING, epoch=1)
    identity = take_identity(tmp_path)
    assert identity.epoch == 2
    identity.release()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith(("heart:", "relist:", "reporter"))]
