"""Stopping everything in good order: the services first, then what they stand on."""

import asyncio

from leveret.stack import hypervisor, resuming
from leveret.stack.layout import Layout
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit
from leveret.stack.services import Runner
from leveret.stack.turns import Progress


def stop_everything(layout: Layout, progress: Progress, database_url: str | None) -> None:
    """Stop what runs. Killed half-way, it leaves a mark, and whoever comes next begins with doing it again.

    Which guests ran is looked up in the database and noted, so that they can be started again; without a
    `database_url` nobody will want them back.
    """
    layout.stopping.touch()
    rabbit, postgres, runner = Rabbit(layout.rabbitmq), Postgres(layout.postgres), Runner(layout.services)
    private = hypervisor.is_private(layout)
    if private and database_url is not None and postgres.is_running():
        asyncio.run(resuming.note(layout, database_url))
    progress.doing("stopping Leveret")
    runner.stop(runner.known(), lambda name: progress.done(name, "stopped"))
    if private:
        progress.doing("shutting guests down")
        guests = hypervisor.stop_private(layout)
        kept = "; `leveret up` starts them again" if database_url else ""
        progress.done("libvirtd", f"stopped; guests shut down: {guests}{kept}" if guests else "stopped")
    progress.doing("stopping RabbitMQ and Postgres")
    for name, server in (("rabbitmq", rabbit), ("postgres", postgres)):
        if server.directory.exists() and server.is_running():
            server.stop()
            progress.done(name, "stopped")
    layout.stopping.unlink()
