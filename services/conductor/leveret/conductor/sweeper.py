"""The sweeper: nothing waits for a message that never comes (law 5)."""

import random
from collections.abc import Callable
from datetime import timedelta

import structlog

from leveret.conductor import decisions, dispatch, metrics
from leveret.conductor.database import Pool, transaction
from leveret.conductor.decisions import Limits
from leveret.conductor.placing import place
from leveret.conductor.store import forgetting, hosts, vms
from leveret.shared.bus import Publisher

log = structlog.get_logger()

BATCH = 200


class Sweeper:
    """Several may sweep at once: rows that one is at are skipped by the others."""

    def __init__(
        self,
        pool: Pool,
        publisher: Publisher,
        limits: Limits,
        *,
        resend: timedelta,
        lease: timedelta,
        keep_deleted_days: int,
        attentive_s: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        self._pool = pool
        self._publisher = publisher
        self._limits = limits
        self._resend = resend
        self._lease = lease
        self._keep_deleted_days = keep_deleted_days
        #: For how long this conductor has been hearing what hosts say: who was deaf cannot tell that they were silent.
        self.attentive_s = attentive_s
        self._rng = rng or random.Random()

    async def sweep_once(self) -> None:
        """Everything that may be overdue, each kind in a transaction of its own."""
        await self.place_pending()
        await self.end_late()
        await self.resend_unsent()
        await self.silence_hosts()

    async def place_pending(self) -> int:
        """Give a host to VMs that lost theirs, or tell them why there is none. Returns how many were placed."""
        async with transaction(self._pool) as connection:
            pending = await vms.lock_pending(connection, BATCH)
            if not pending:
                return 0
            now = await vms.database_now(connection)
            placements = await place(connection, pending, now, self._rng)
            refused = [
                decisions.unplaceable(vm, placements.refused[vm.id]) for vm in pending if vm.id in placements.refused
            ]
            await vms.record(connection, [*placements.placed, *refused])
            commands = await dispatch.commands_for(connection, [c.after.id for c in placements.placed])
        metrics.SWEPT.labels(reason="pending").inc(len(pending))
        await dispatch.send(self._publisher, commands)
        return len(commands)

    @property
    def _hears(self) -> bool:
        return self.attentive_s() >= self._lease.total_seconds()

    async def end_late(self) -> int:
        """Deal with VMs past their deadline. Returns how many there were.

        Not before this conductor has listened for a while: the host's good news may wait in the queue.
        """
        if not self._hears:
            return 0
        async with transaction(self._pool) as connection:
            late = await vms.lock_late(connection, self._limits.backstop, BATCH)
            if not late:
                return 0
            now = await vms.database_now(connection)
            changes = [decisions.on_deadline(vm, now, self._limits) for vm in late]
            written = await vms.record(connection, [change for change in changes if change])
            told = [change.after.id for change in written if change.after.is_lagging]
            commands = await dispatch.commands_for(connection, told)
            await vms.mark_sent(connection, told)
        for change in written:
            log.warning("vm.late", vm_id=str(change.after.id), state=change.after.state, step=change.after.step)
        metrics.SWEPT.labels(reason="late").inc(len(written))
        await dispatch.send(self._publisher, commands)
        return len(written)

    async def resend_unsent(self) -> int:
        """Repeat the commands of VMs that lag. Returns how many were sent."""
        async with transaction(self._pool) as connection:
            lagging = await vms.lock_unsent(connection, self._resend, BATCH)
            if not lagging:
                return 0
            ids = [vm.id for vm in lagging]
            commands = await dispatch.commands_for(connection, ids)
            await vms.mark_sent(connection, ids)
        metrics.SWEPT.labels(reason="unsent").inc(len(commands))
        await dispatch.send(self._publisher, commands)
        return len(commands)

    async def silence_hosts(self) -> list[str]:
        """Give no new work to hosts that are not heard of. Returns their names."""
        if not self._hears:
            return []
        async with transaction(self._pool) as connection:
            names = await hosts.silence(connection, self._lease)
        for name in names:
            log.warning("host.silent", host=name)
        return names

    async def forget_once(self) -> None:
        """Drop what nobody asks for any more, batch after batch."""
        more = True
        while more:
            async with transaction(self._pool) as connection:
                more = await forgetting.forget(connection, self._keep_deleted_days)
