"""Stopping everything in good order: the services first, then what they stand on."""

import asyncio

from leveret.stack import hypervisor, resuming
from leveret.stack.layout import Layout
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit
from leveret.stack.services import Runner
from leveret.stack.turns import Progress


def stop_everything(layout: Layout, progress: Progress, *, for_good: bool = False) -> None:
    """Stop what runs. Killed half-way, it leaves a mark, and whoever comes next begins with doing it again.

    Which guests ran is noted, so that they can be started again, unless it is `for_good`.
    """
    layout.stopping.touch()
    rabbit, postgres, runner = Rabbit(layout.rabbitmq), Postgres(layout.postgres), Runner(layout.services)
    private = hypervisor.is_private(layout)
    if private and not for_good:
        asyncio.run(resuming.note(layout))
    progress.doing("stopping Leveret")
    runner.stop(runner.known(), lambda name: progress.done(name, "stopped"))
    if private:
        progress.doing("shutting guests down")
        guests = hypervisor.stop_private(layout)
        kept = "" if for_good else "; `leveret up` starts them again"
        progress.done("libvirtd", f"stopped; guests shut down: {guests}{kept}" if guests else "stopped")
    progress.doing("stopping RabbitMQ and Postgres")
    for name, server in (("rabbitmq", rabbit), ("postgres", postgres)):
        if server.directory.exists():
            was_running = server.is_running()
            server.stop()  # all the same: a broker leaves its name service behind when it dies
            if was_running:
                progress.done(name, "stopped")
    layout.stopping.unlink()
