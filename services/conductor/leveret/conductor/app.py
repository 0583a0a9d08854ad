"""The conductor process: everything is built here, and nothing is opened before it is started."""

import argparse
import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from importlib.metadata import version

import structlog
import uvloop
from prometheus_client import start_http_server

from leveret.conductor import metrics
from leveret.conductor.checking import CheckDesk, Checker
from leveret.conductor.database import Pool, open_pool
from leveret.conductor.decisions import Limits
from leveret.conductor.dispatch import Answers
from leveret.conductor.hearing import Hearing
from leveret.conductor.heartbeats import HeartbeatHandler
from leveret.conductor.identities import Identities
from leveret.conductor.intake import Intake
from leveret.conductor.invariants import BrokerCheck, HostCheck
from leveret.conductor.placing import Scheduler
from leveret.conductor.relay import Relay, Waking
from leveret.conductor.reports import ReportHandler
from leveret.conductor.requests import RequestHandler
from leveret.conductor.settings import ConductorSettings
from leveret.conductor.sweeper import Sweeper
from leveret.shared import fault_points, logs, topology
from leveret.shared.bus import Answerer, Caller, Consumer, Furniture, Link, Paused, Publisher
from leveret.shared.loop import Loop

log = structlog.get_logger()


class Conductor:
    """A conductor and its parts. Any number of them may run: none leads (law 9)."""

    def __init__(self, settings: ConductorSettings, pool: Pool) -> None:
        self.settings = settings
        self.pool = pool
        limits, limit_s = limits_of(settings), settings.step_timeout_s
        scheduler = Scheduler(limits)
        self.publisher = Publisher(settings.amqp_user)
        self.publishing = Link(settings.amqp_url, "conductor-publish")
        self.publishing.add(Furniture())
        self.publishing.add(self.publisher)
        self.consuming = Link(settings.amqp_url, "conductor-consume")
        self.consuming.add(Furniture())
        self.answering = Link(settings.amqp_url, "conductor-answer")
        self.answerer = Answerer(self.answering, settings.amqp_user)

        self.relay = Relay(pool, self.publisher)
        furnisher = Loop("furnisher", _quiet(self.relay.furnish_once), every_s=5, limit_s=limit_s)
        self.publishing.add(Waking(furnisher))
        self.sweeper = Sweeper(
            pool,
            self.publisher,
            limits,
            resend=timedelta(seconds=settings.resend_s),
            lease=timedelta(seconds=settings.lease_s),
            keep_deleted_days=settings.keep_deleted_days,
            attentive_s=lambda: self.hearing.attentive_s,
            scheduler=scheduler,
        )
        relay_loop = Loop("relay", _quiet(self.relay.relay_once), every_s=0.5, limit_s=limit_s)
        sweep_loop = Loop("sweeper", _quiet(self.sweeper.sweep_once), every_s=settings.sweep_s, limit_s=limit_s)
        self.loops = [
            relay_loop,
            sweep_loop,
            furnisher,
            Loop("forgetter", _quiet(self.sweeper.forget_once), every_s=3600, limit_s=10 * limit_s),
        ]

        self.checker = self._checker()
        answers = Answers(self.publisher, self.answerer, settings.gateway_users)
        self.desk = CheckDesk(self.checker, answers.give)
        requests = RequestHandler(
            pool,
            self.publisher,
            limits,
            Intake(pool, Identities(pool, settings.gateway_users)),
            answers,
            self.desk,
            relay=relay_loop,
            scheduler=scheduler,
        )
        reports = ReportHandler(
            pool,
            self.publisher,
            limits,
            cordon_after=settings.cordon_after_failures,
            placer=sweep_loop,
            relay=relay_loop,
        )
        heartbeats = HeartbeatHandler(pool, self.publisher)
        self.consumers = [
            Consumer(self.consuming, queue, handle, self.publisher, batch_max=batch_max, lament=lament, limit_s=limit_s)
            for queue, handle, batch_max, lament in (
                (topology.REQUESTS_QUEUE, requests.handle, settings.request_batch_max, requests.lament),
                (topology.REPORTS_QUEUE, reports.handle, settings.batch_max, None),
                (topology.HEARTBEATS_QUEUE, heartbeats.handle, settings.batch_max, None),
            )
        ]

        self.hearing = Hearing(self.consumers, settings.lease_s / 2, knock=self.publisher.knock)
        self.loops.append(Loop("hearing", self.hearing.listen_once, every_s=min(1.0, settings.lease_s / 8)))

    def _checker(self) -> Checker:
        """The checker with its own link: what it looks for may not be there, which ends channels."""
        settings = self.settings
        caller = Caller(settings.amqp_user)
        broker = BrokerCheck(self.pool, confirm_s=settings.check_confirm_s)
        self.checking = Link(settings.amqp_url, "conductor-check")
        self.checking.add(caller)
        self.checking.add(broker)
        checker = Checker(self.pool, broker, HostCheck(self.pool, caller, confirm_s=settings.check_confirm_s))
        often, seldom = settings.check_s, settings.check_hosts_s
        self.loops += [
            Loop("checker", checker.check_often, every_s=often, first_after_s=often),
            Loop("host-checker", checker.check_seldom, every_s=seldom, first_after_s=seldom),
        ]
        return checker

    async def start(self) -> None:
        self.publishing.start()
        self.consuming.start()
        self.checking.start()
        self.answering.start()
        self.answerer.start()
        for consumer in self.consumers:
            consumer.start()
            metrics.CONSUMING.labels(queue=consumer.queue).set_function(partial(getattr, consumer, "is_consuming"))
        for loop in self.loops:
            loop.start()

    async def stop(self) -> None:
        """Take no more, finish what is in hand within the drain time, close."""
        await asyncio.gather(*(consumer.stop(self.settings.drain_s) for consumer in self.consumers))
        for loop in self.loops:
            await loop.stop()
        await self.desk.stop()
        await self.answerer.stop()
        for link in (self.consuming, self.checking, self.answering, self.publishing):
            await link.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_s):
                await self.pool.close()


def _quiet(verb: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
    """A loop's verb for which an absent Postgres is news of one line, not a traceback."""

    async def quietly() -> None:
        try:
            await verb()
        except Paused as paused:
            log.warning("loop.paused", loop=verb.__name__, reason=str(paused))

    return quietly


def limits_of(settings: ConductorSettings) -> Limits:
    return Limits(
        build=timedelta(seconds=settings.build_timeout_s),
        change=timedelta(seconds=settings.change_timeout_s),
        delete=timedelta(seconds=settings.delete_timeout_s),
        wait=timedelta(seconds=settings.capacity_timeout_s),
        attempts=settings.max_attempts,
    )


async def run(settings: ConductorSettings) -> None:
    """Run until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    conductor = Conductor(settings, await open_pool(settings.database_url, max_size=settings.db_pool_max))
    await conductor.start()
    log.info("conductor.started", version=version("leveret"))
    await stopping.wait()
    log.info("conductor.stopping")
    await conductor.stop()
    log.info("conductor.stopped")


def main() -> None:
    """`leveret-conductor`: settings come from the environment, see leveret.conductor.settings."""
    parser = argparse.ArgumentParser(prog="leveret-conductor", description=__doc__, epilog=main.__doc__)
    parser.add_argument("--version", action="version", version=version("leveret"))
    parser.parse_args()
    settings = ConductorSettings()
    logs.configure("conductor", level=settings.log_level, style=settings.log_format)
    fault_points.arm(settings.faults)
    if settings.metrics_port:
        start_http_server(settings.metrics_port, addr="127.0.0.1")
    uvloop.run(run(settings))


if __name__ == "__main__":
    main()
