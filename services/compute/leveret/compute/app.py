"""The compute process: composition root and command line."""

import argparse
import asyncio
import signal
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version

import structlog
import uvloop
from pydantic import ValidationError

from leveret.compute.agent import Limits
from leveret.compute.behaviour import Behaviour
from leveret.compute.driver import Driver
from leveret.compute.heart import Registration
from leveret.compute.identity import Identity, IdentityError, take_identity
from leveret.compute.ledger import Ledger
from leveret.compute.metrics import Metrics
from leveret.compute.settings import ComputeSettings
from leveret.compute.simulated import SimulatedDriver
from leveret.compute.worker import Announcement, Outbound, Worker
from leveret.shared import fault_points, logs, topology
from leveret.shared.bus import Envelope, Furniture, Link, Publisher, Unroutable
from leveret.shared.errors import LeveretError
from leveret.shared.lifecycle import Observed
from leveret.shared.messages import Capacity, ConsoleTail, Heartbeat, HostInventory, HostReport, explain

log = structlog.get_logger()

#: Each host has a channel; a connection has 2,047 of them, and is attached anew as a whole when one breaks.
HOSTS_PER_LINK = 200
#: Reports under way at once, over all hosts.
REPORTS_AT_ONCE = 64


class ComputeProcess:
    """All hosts of one process, and the links they share."""

    def __init__(self, settings: ComputeSettings, identity: Identity, *, simulate: int = 0) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._report_slots = asyncio.Semaphore(REPORTS_AT_ONCE)
        self._publisher = Publisher(settings.amqp_user)
        self._publish_link = Link(settings.amqp_url, f"compute-publish:{settings.host_name}")
        self._publish_link.add(Furniture(()))
        self._publish_link.add(self._publisher)
        self._ledger = _ledger(settings) if simulate else None
        hosts = _simulated(settings, identity, simulate, self._ledger) if simulate else _real(settings, identity)
        self.workers = [self._worker(registration, driver) for registration, driver in hosts]
        self._publish_link.add(Announcement(self.workers))
        self._consume_links = [
            self._consume_link(self.workers[first : first + HOSTS_PER_LINK], first)
            for first in range(0, len(self.workers), HOSTS_PER_LINK)
        ]
        for observed in Observed:
            self._metrics.count_domains(observed.value, partial(self._count, observed.value))

    async def run(self, stop: asyncio.Event) -> None:
        """Work until told to stop; then drain and close. Guests go on."""
        if self._settings.metrics_port:
            self._metrics.serve(self._settings.metrics_port)
        await asyncio.gather(*(worker.open() for worker in self.workers))
        for link in (self._publish_link, *self._consume_links):
            link.start()
        log.info("compute.started", hosts=len(self.workers))
        await stop.wait()
        log.info("compute.stopping", drain_s=self._settings.drain_s)
        await asyncio.gather(*(link.stop() for link in self._consume_links))
        await asyncio.gather(*(worker.close(self._settings.drain_s) for worker in self.workers))
        await self._publish_link.stop()
        if self._ledger is not None:
            self._ledger.close()
        log.info("compute.stopped")

    def _worker(self, registration: Registration, driver: Driver) -> Worker:
        settings = self._settings
        return Worker(
            registration,
            driver,
            Outbound(self._publish, self._post, self._reply),
            metrics=self._metrics,
            limits=Limits(
                builds=settings.build_concurrency,
                fetches=settings.fetch_concurrency,
                step_s=settings.step_timeout_s,
                image_s=settings.image_timeout_s + settings.step_timeout_s,
            ),
            heartbeat_s=settings.heartbeat_s,
            pool_check_s=settings.pool_check_s,
            report_slots=self._report_slots,
        )

    def _consume_link(self, workers: list[Worker], first: int) -> Link:
        link = Link(self._settings.amqp_url, f"compute-consume:{self._settings.host_name}:{first}")
        link.add(Furniture(tuple(worker.queue for worker in workers)))
        for worker in workers:
            worker.consume(link, self._publisher)
        link.add(Announcement(workers))
        return link

    async def _publish(self, report: HostReport) -> None:
        try:
            await self._publisher.publish(topology.REPORTS.name, "report", report)
        except Unroutable:
            self._metrics.reports.labels("failed").inc()
            self._publish_link.renew()  # somebody deleted the queue: declare it again
            raise
        except LeveretError:
            self._metrics.reports.labels("failed").inc()
            raise
        self._metrics.reports.labels("sent").inc()

    async def _post(self, heartbeat: Heartbeat) -> None:
        await self._publisher.post(topology.HEARTBEATS.name, "heartbeat", heartbeat)

    async def _reply(self, reply_to: str, correlation_id: str | None, answer: ConsoleTail | HostInventory) -> None:
        await self._publisher.post("", reply_to, answer, envelope=Envelope(correlation_id=correlation_id))

    def _count(self, observed: str) -> float:
        return sum(worker.agent.census()[observed] for worker in self.workers)


Hosts = list[tuple[Registration, Driver]]


def _real(settings: ComputeSettings, identity: Identity) -> Hosts:
    """This machine, through libvirt."""
    from leveret.compute.libvirt_driver import LibvirtDriver, LibvirtSettings

    driver = LibvirtDriver(
        LibvirtSettings(
            uri=settings.libvirt_uri,
            pool_dir=settings.pool_dir,
            virt_type=settings.virt_type,
            network_mode=settings.network_mode,
            advertise_host=settings.advertise_host,
            image_dirs=settings.image_dirs,
            image_inner_allowed=settings.image_inner_allowed,
            image_max_bytes=settings.image_max_bytes,
            image_timeout_s=settings.image_timeout_s,
            disk_reserve_gib=settings.reserve_disk_gib,
            call_timeout_s=settings.call_timeout_s,
            file_timeout_s=settings.file_timeout_s,
            pool_slow_s=settings.pool_slow_s,
        )
    )
    registration = Registration(
        host_id=identity.host_id,
        epoch=identity.epoch,
        name=settings.host_name,
        zone=settings.zone,
        version=version("leveret"),
        labels=settings.labels,
        share=settings.share,
        taints=settings.taints,
        vms_max=settings.max_vms,
    )
    return [(registration, driver)]


def _simulated(settings: ComputeSettings, identity: Identity, count: int, ledger: Ledger | None) -> Hosts:
    """As many hosts as asked for, spread over the zones in turn."""
    behaviour = Behaviour(
        total=Capacity(
            vcpus=settings.simulate_vcpus,
            memory_mib=settings.simulate_memory_mib,
            disk_gib=settings.simulate_disk_gib,
        ),
        latency_s=settings.simulate_latency_s,
        failures=settings.simulate_failures,
        shutdown_s=settings.simulate_shutdown_s,
        ready_s=settings.simulate_ready_s,
    )
    hosts: Hosts = []
    for index in range(count):
        host_id = identity.of_simulated(index)
        zone = settings.zone if settings.simulate_zones == 1 else f"zone-{index % settings.simulate_zones + 1}"
        seed = None if settings.simulate_seed is None else settings.simulate_seed + index
        registration = Registration(
            host_id=host_id,
            epoch=identity.epoch,
            name=f"{settings.host_name}-sim-{index + 1:04}",
            zone=zone,
            version=version("leveret"),
            labels=settings.labels,
            share=settings.share,
            taints=settings.taints,
            vms_max=settings.max_vms,
        )
        hosts.append((registration, SimulatedDriver(host_id, behaviour, ledger=ledger, seed=seed)))
    return hosts


def _ledger(settings: ComputeSettings) -> Ledger | None:
    return Ledger(settings.host_state_dir / "simulated.jsonl") if settings.simulate_persist else None


async def serve(settings: ComputeSettings, simulate: int) -> None:
    """Run until SIGTERM or SIGINT."""
    identity = take_identity(settings.host_state_dir)
    try:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        log.info("compute.starting", host_id=str(identity.host_id), epoch=identity.epoch, simulate=simulate)
        await ComputeProcess(settings, identity, simulate=simulate).run(stop)
    finally:
        identity.release()


def read(arguments: Sequence[str] | None) -> tuple[ComputeSettings, int]:
    """The settings and the number of simulated hosts; whatever is wrong with them is said, and ends the process."""
    parser = argparse.ArgumentParser(
        prog="leveret-compute",
        description="The worker of one host: drives libvirt towards what is wanted, and reports what it sees.",
        epilog="Settings are environment variables: "
        + ", ".join(f"LEVERET_{name.upper()}" for name in ComputeSettings.model_fields),
    )
    parser.add_argument("--simulate", type=int, default=0, metavar="N", help="be N simulated hosts; needs no libvirt")
    parser.add_argument("--zones", type=int, metavar="N", help="spread simulated hosts over N zones")
    parser.add_argument("--version", action="version", version=f"leveret-compute {version('leveret')}")
    parsed = parser.parse_args(arguments)
    if parsed.simulate < 0 or (parsed.zones is not None and parsed.zones < 1):
        parser.error("--simulate and --zones count something")
    try:
        settings = ComputeSettings()
    except ValidationError as error:
        faults = "; ".join(f"LEVERET_{fault['field'].upper()}: {fault['message']}" for fault in explain(error))
        parser.error(faults)
    if parsed.zones:
        settings = settings.model_copy(update={"simulate_zones": parsed.zones})
    return settings, parsed.simulate


def main(arguments: Sequence[str] | None = None) -> int:
    """The `leveret-compute` command. Returns 1 when the host's identity or its pool cannot be had."""
    settings, simulate = read(arguments)
    logs.configure("compute", level=settings.log_level, style=settings.log_format)
    fault_points.arm(settings.faults)
    # libvirt's events come through the loop that asyncio makes; uvloop is for thousands of simulated hosts.
    run: Callable[..., None] = uvloop.run if simulate else asyncio.run
    try:
        run(serve(settings, simulate))
    except (IdentityError, LeveretError) as error:
        log.error("compute.refused", why=str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
