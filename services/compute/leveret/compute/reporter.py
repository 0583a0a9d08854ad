"""Tells the conductor what the host sees: durably, in batches, and only the newest of each VM."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from uuid import UUID

import structlog

from leveret.compute.status import Status
from leveret.shared.errors import LeveretError
from leveret.shared.fault_points import take
from leveret.shared.messages import HostReport

log = structlog.get_logger()

#: Progress waits this long for more to tell: the steps of a fast build make one report.
LINGER_S = 0.015
BATCH_MAX = 200
PAUSE_MIN_S = 0.1
PAUSE_MAX_S = 2.0

Publish = Callable[[HostReport], Awaitable[None]]


class Reporter:
    """Remembers which VMs there is something to tell of, never what: that is written when it is sent.

    So the newest always wins, an outage of the broker costs one entry a VM, and what is repeated is never stale. At
    most one report is under way; the next gathers meanwhile.
    """

    def __init__(
        self,
        host_id: UUID,
        epoch: int,
        publish: Publish,
        *,
        status_of: Callable[[UUID], Status | None],
        present: Callable[[], Iterable[Status]],
        slots: asyncio.Semaphore | None = None,
        limit_s: float = 60.0,
    ) -> None:
        """`slots` bounds the reports of all hosts of a process that are under way: a slow broker then makes reports
        larger instead of letting them time out in a queue, and come twice.
        """
        self._host_id = host_id
        self._epoch = epoch
        self._publish = publish
        self._status_of = status_of
        self._present = present
        self._limit_s = limit_s
        self._slots = slots or asyncio.Semaphore(1)
        self._seq = 0
        self._dirty: dict[UUID, None] = {}
        self._complete = False
        self._urgent = False
        self._poked = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        return len(self._dirty) + self._complete

    @property
    def sending(self) -> bool:
        return self._task is not None

    def add(self, vm_id: UUID, *, urgent: bool) -> None:
        """There is something to tell of this VM: at once, or with what comes in the next moment."""
        self._dirty[vm_id] = None
        if urgent:
            self._start()
        elif self._task is None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._start)

    def add_complete(self) -> None:
        """List every VM the host has."""
        self._complete = True
        self._start()

    def poke(self) -> None:
        """The broker is back: do not wait out a pause."""
        self._poked.set()

    async def flush_once(self) -> None:
        """Send what there is to tell, at most one batch of it.

        Raises what `publish` raises; then it is still to be told.
        """
        complete, self._complete = self._complete, False
        statuses = list(self._present()) if complete else []
        listed = {status.vm_id for status in statuses}
        batch = [] if complete else list(self._dirty)[:BATCH_MAX]
        statuses += [status for vm_id in batch if (status := self._status_of(vm_id)) is not None]
        for vm_id in (*batch, *listed):
            self._dirty.pop(vm_id, None)
        if not statuses and not complete:
            return
        report = self._written(statuses, complete)
        try:
            await take("host.report", self._publish, report)
        except BaseException:
            self._complete |= complete
            self._dirty.update((vm.vm_id, None) for vm in report.vms)
            raise

    async def drain(self, timeout_s: float) -> bool:
        """Send everything that is left. Returns whether that was done in time."""
        if self._dirty or self._complete:
            self._start()
        if self._task is None:
            return True
        await asyncio.wait({self._task}, timeout=timeout_s)
        return self._task is None

    async def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _written(self, statuses: list[Status], complete: bool) -> HostReport:
        vms = []
        for status in statuses:
            self._seq += 1
            vms.append(status.report(self._seq))
        if complete:
            self._seq += 1
        return HostReport(host_id=self._host_id, epoch=self._epoch, seq=self._seq, complete=complete, vms=tuple(vms))

    def _start(self) -> None:
        self._urgent = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is None:
            self._task = asyncio.create_task(self._flush(), name="reporter")

    async def _flush(self) -> None:
        pause_s = PAUSE_MIN_S
        try:
            while self._complete or (self._urgent and self._dirty):
                self._urgent = self._complete or len(self._dirty) > BATCH_MAX
                try:
                    async with self._slots, asyncio.timeout(self._limit_s):
                        await self.flush_once()
                    pause_s = PAUSE_MIN_S
                    continue
                except (LeveretError, TimeoutError) as error:
                    if pause_s == PAUSE_MIN_S:  # an outage is told once
                        log.warning("report.not_sent", host_id=str(self._host_id), why=str(error) or "it hangs")
                except Exception:  # the rim
                    log.exception("report.failed", host_id=str(self._host_id))
                self._urgent = True
                await self._pause(pause_s)
                pause_s = min(pause_s * 2, PAUSE_MAX_S)
        finally:
            self._task = None
        if self._dirty:
            self.add(next(iter(self._dirty)), urgent=False)

    async def _pause(self, pause_s: float) -> None:
        self._poked.clear()
        try:
            async with asyncio.timeout(pause_s * random.uniform(0.75, 1.25)):
                await self._poked.wait()
        except TimeoutError:
            return
