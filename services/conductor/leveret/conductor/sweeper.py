"""The sweeper: nothing waits for a message that never comes (law 5)."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import structlog

from leveret.conductor import decisions, dispatch, metrics
from leveret.conductor.database import Pool, transaction
from leveret.conductor.decisions import Limits
from leveret.conductor.dispatch import Command
from leveret.conductor.placing import Placed, Scheduler
from leveret.conductor.rows import Change, Vm
from leveret.conductor.scheduling import Host
from leveret.conductor.store import forgetting, hosts, projects, vms
from leveret.shared.bus import Publisher
from leveret.shared.errors import Problem
from leveret.shared.fault_points import fault_point, take

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
        scheduler: Scheduler,
    ) -> None:
        self._pool = pool
        self._publisher = publisher
        self._limits = limits
        self._resend = resend
        self._lease = lease
        self._keep_deleted_days = keep_deleted_days
        #: For how long this conductor has been hearing what hosts say: who was deaf cannot tell that they were silent.
        self.attentive_s = attentive_s
        self._scheduler = scheduler

    async def sweep_once(self) -> None:
        """Everything that may be overdue, each kind in a transaction of its own."""
        await self.settle_stranded()
        await self.place_pending()
        await self.end_late()
        await self.resend_unsent()
        await self.silence_hosts()

    async def place_pending(self) -> int:
        """Give a host to VMs that lost theirs, or tell them why there is none. Returns how many were placed."""
        placed, commands = await self._place()
        metrics.SWEPT.labels(reason="pending").inc(placed)
        await self._send(commands)
        return len(commands)

    @fault_point("sweeper.place")
    async def _place(self) -> tuple[int, list[Command]]:
        async with transaction(self._pool) as connection:
            rooms = await hosts.rooms(connection)
            bundles = await vms.lock_pending(connection, rooms, BATCH)
            if not bundles:
                return 0, []
            now = await vms.database_now(connection)
            placed: list[Change] = []
            refused: list[Change] = []
            for bundle, outcome in zip(bundles, await self._scheduler.place(connection, bundles, now), strict=True):
                match outcome:
                    case Placed(changes):
                        placed += changes
                    case Problem() as problem:
                        looked = vms.looked_at(rooms, len(bundle))
                        refused += [decisions.unplaceable(vm, problem, looked, now, self._limits) for vm in bundle]
            await vms.record(connection, [*placed, *refused])
            return len(placed), await dispatch.commands_for(connection, [change.after.id for change in placed])

    @property
    def _hears(self) -> bool:
        return self.attentive_s() >= self._lease.total_seconds()

    async def end_late(self) -> int:
        """Deal with VMs past their deadline. Returns how many there were.

        Not before this conductor has listened for a while: the host's good news may wait in the queue.
        """
        if not self._hears:
            return 0
        late, commands = await self._end()
        for change in late:
            log.warning("vm.late", vm_id=str(change.after.id), state=change.after.state, step=change.after.step)
        metrics.SWEPT.labels(reason="late").inc(len(late))
        await self._send(commands)
        return len(late)

    @fault_point("sweeper.end_late")
    async def _end(self) -> tuple[list[Change], list[Command]]:
        async with transaction(self._pool) as connection:
            late = await vms.lock_late(connection, self._limits.backstop, BATCH)
            if not late:
                return [], []
            now = await vms.database_now(connection)
            changes = [decisions.on_deadline(vm, now, self._limits) for vm in late]
            written = await vms.record(connection, [change for change in changes if change])
            told = [change.after.id for change in written if change.after.is_lagging]
            commands = await dispatch.commands_for(connection, told)
            await vms.mark_sent(connection, told)
            return written, commands

    async def settle_stranded(self) -> int:
        """Settle what becomes of VMs whose host is proven to be off. Returns how many there were."""
        settled = await self._settle()
        for change in settled:
            log.warning("vm.stranded", vm_id=str(change.after.id), state=change.after.state)
        metrics.SWEPT.labels(reason="stranded").inc(len(settled))
        return len(settled)

    @fault_point("sweeper.settle")
    async def _settle(self) -> list[Change]:
        async with transaction(self._pool) as connection:
            stranded = await vms.lock_stranded(connection, BATCH)
            if not stranded:
                return []
            now = await vms.database_now(connection)
            await projects.lock_rooms(connection, {vm.project_id for vm in stranded})
            # Whoever brings a host back waits for this lock, or was here first.
            there = await hosts.lock(connection, [vm.host_id for vm in stranded])
            changes = [self._strand(vm, there[vm.host_id], now) for vm in stranded if vm.host_id]
            written = await vms.record(connection, [change for change in changes if change])
            await hosts.mark_unclean(
                connection, [c.before.host_id for c in written if c.before and c.before.host_id and c.gives_up]
            )
            return written

    def _strand(self, vm: Vm, host: Host, now: datetime) -> Change | None:
        match host.state:
            case "fenced":
                return decisions.on_fence(vm, host.name, now, self._limits)
            case "retired":
                return decisions.on_retire(vm, host.name)
        return None

    async def resend_unsent(self) -> int:
        """Repeat the commands of VMs that lag. Returns how many were sent."""
        commands = await self._repeat()
        metrics.SWEPT.labels(reason="unsent").inc(len(commands))
        await self._send(commands)
        return len(commands)

    @fault_point("sweeper.resend")
    async def _repeat(self) -> list[Command]:
        async with transaction(self._pool) as connection:
            lagging = await vms.lock_unsent(connection, self._resend, BATCH)
            if not lagging:
                return []
            ids = [vm.id for vm in lagging]
            commands = await dispatch.commands_for(connection, ids)
            await vms.mark_sent(connection, ids)
            return commands

    async def silence_hosts(self) -> list[str]:
        """Give no new work to hosts that are not heard of. Returns their names."""
        if not self._hears:
            return []
        names = await self._silence()
        for name in names:
            log.warning("host.silent", host=name)
        return names

    @fault_point("sweeper.silence")
    async def _silence(self) -> list[str]:
        async with transaction(self._pool) as connection:
            return await hosts.silence(connection, self._lease)

    async def _send(self, commands: Sequence[Command]) -> None:
        if commands:
            await take("sweeper.send", dispatch.send, self._publisher, commands)

    async def forget_once(self) -> None:
        """Drop what nobody asks for any more, batch after batch."""
        while await self._forget() >= forgetting.BATCH:
            continue

    @fault_point("sweeper.forget")
    async def _forget(self) -> int:
        async with transaction(self._pool) as connection:
            return await forgetting.forget(connection, self._keep_deleted_days)
