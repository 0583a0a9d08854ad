"""`leveret down`: stop everything in good order."""

import asyncio
import shutil

from leveret.stack import hypervisor, resuming
from leveret.stack.errors import StackError
from leveret.stack.layout import Layout
from leveret.stack.libvirtd import Libvirtd
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit
from leveret.stack.services import Runner
from leveret.stack.up import Progress, alone, local_database_url


def down(layout: Layout, progress: Progress, *, purge: bool = False) -> None:
    """Stop the services, then what they stand on. The data is kept, unless it is to be purged.

    Guests of a private libvirtd are shut down, and started again by the next `up`; those of the system's or the
    session's libvirtd run on. Nothing to stop is success. Raises StackError when something survives being killed.
    """
    if not layout.root.exists():
        return
    with alone(layout, progress):
        rabbit, postgres, runner = Rabbit(layout.rabbitmq), Postgres(layout.postgres), Runner(layout.services)
        private = hypervisor.is_private(layout)
        if purge:
            _refuse_to_leave_guests(layout)
        elif private and postgres.directory.exists() and postgres.is_running():
            asyncio.run(resuming.note(layout, local_database_url(layout)))
        progress.doing("stopping Leveret")
        runner.stop(runner.known(), lambda name: progress.done(name, "stopped"))
        if private:
            progress.doing("shutting guests down")
            guests = hypervisor.stop_private(layout)
            kept = "" if purge else "; `leveret up` starts them again"
            progress.done("libvirtd", f"stopped; guests shut down: {guests}{kept}" if guests else "stopped")
        progress.doing("stopping RabbitMQ and Postgres")
        for name, server in (("rabbitmq", rabbit), ("postgres", postgres)):
            if server.directory.exists() and server.is_running():
                server.stop()
                progress.done(name, "stopped")
        if purge:
            _purge(layout)
            progress.done("purged", str(layout.root))
        elif left := hypervisor.shared_guests(layout):
            progress.done("guests", f"left as they are: {len(left)}; their libvirtd is not this installation's own")


def _refuse_to_leave_guests(layout: Layout) -> None:
    """Domains in somebody else's libvirtd would be left without their disks, and nobody would know them."""
    if left := hypervisor.shared_guests(layout):
        raise StackError(
            f"some VMs ({len(left)}) stand in a libvirtd that is not this installation's own. Delete them first: "
            "`leveret up`, then `leveret delete --wait $(leveret list -o name)`."
        )


def _purge(layout: Layout) -> None:
    """Delete what `up` made and nothing else: the directory may hold other things too."""
    Libvirtd(layout.libvirt).destroy()
    Rabbit(layout.rabbitmq).destroy()
    Postgres(layout.postgres).destroy()
    for directory in (layout.services, layout.host, layout.fake_hosts, layout.pool, layout.ssh_key.parent):
        shutil.rmtree(directory, ignore_errors=True)
    for file in (layout.token, layout.client_config, layout.remembered, layout.resume):
        file.unlink(missing_ok=True)
