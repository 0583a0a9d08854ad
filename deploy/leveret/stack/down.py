"""`leveret down`: stop everything in good order."""

import shutil

from leveret.stack import hypervisor
from leveret.stack.errors import StackError
from leveret.stack.layout import Layout
from leveret.stack.libvirtd import Libvirtd
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit
from leveret.stack.stopping import stop_everything
from leveret.stack.turns import Progress, alone


def down(layout: Layout, progress: Progress, *, purge: bool = False) -> None:
    """Stop the services, then what they stand on. The data is kept, unless it is to be purged.

    Guests of a private libvirtd are shut down, and started again by the next `up`; those of the system's or the
    session's libvirtd run on. Nothing to stop is success. Raises StackError when something survives being killed.
    """
    if not layout.lock.exists():
        return  # nothing was ever started here
    with alone(layout, progress):
        if purge:
            _refuse_to_leave_guests(layout)
        stop_everything(layout, progress, for_good=purge)
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
    for file in (layout.token, layout.client_config, layout.remembered, layout.resume, layout.stopping):
        file.unlink(missing_ok=True)
