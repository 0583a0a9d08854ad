"""Reports: what hosts see, applied to the rows of the VMs that are placed there."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from uuid import UUID

import structlog

from leveret.conductor import dispatch, metrics
from leveret.conductor.database import Pool, transaction
from leveret.conductor.decisions import HOST_FAULTS, Limits, on_report
from leveret.conductor.dispatch import Command
from leveret.conductor.rows import Change, Vm
from leveret.conductor.store import hosts, projects, vms
from leveret.shared.bus import DONE, Delivery, Outcome, Publisher, Reject
from leveret.shared.errors import LeveretError
from leveret.shared.lifecycle import Observed, State
from leveret.shared.loop import Loop
from leveret.shared.messages import HostReport, VmReport

log = structlog.get_logger()


class ReportHandler:
    """Handles `leveret.conductor.reports`. `placer` is woken when a VM has to go elsewhere."""

    def __init__(
        self, pool: Pool, publisher: Publisher, limits: Limits, *, cordon_after: int, placer: Loop, relay: Loop
    ) -> None:
        self._pool = pool
        self._publisher = publisher
        self._limits = limits
        self._cordon_after = cordon_after
        self._placer = placer
        self._relay = relay

    async def handle(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        reports: list[HostReport] = []
        for delivery in batch:
            try:
                report = delivery.decoded(among={"host.report": HostReport})
                assert isinstance(report, HostReport)
                reports.append(report)
                outcomes.append(DONE)
            except LeveretError as error:
                outcomes.append(Reject(error.problem))
        if reports:
            await self._apply(reports)
        return outcomes

    async def _apply(self, reports: Sequence[HostReport]) -> None:
        newest, lists = _newest(reports), _newest_lists(reports)
        async with transaction(self._pool) as connection:
            now = await vms.database_now(connection)
            listed = await vms.placed_on(connection, list(lists))
            rows = await vms.lock(connection, {vm_id for _, vm_id, _ in newest} | listed)
            changes: list[Change] = []
            commands: list[Command] = []
            for (host_id, vm_id, _), (report, epoch) in newest.items():
                vm = rows.get(vm_id)
                if vm is None or vm.host_id != host_id or vm.token != report.token:
                    commands += _answer_stale(vm, host_id, report, epoch)
                    continue
                change = on_report(vm, report, epoch, now, self._limits)
                metrics.REPORTS.labels(outcome="applied" if change else "old").inc()
                if change:
                    changes.append(change)
                    rows[vm_id] = change.after
            missing, retold = _compare(lists.values(), rows, {change.after.id for change in changes})
            for vm, report, epoch in missing:
                change = on_report(vm, report, epoch, now, self._limits)
                if change:
                    changes.append(change)
            failed, built = _builds(changes)
            # In one order, before anything else takes some of them: see store.vms.
            await projects.lock_rooms(connection, {c.after.project_id for c in changes if projects.frees_quota(c)})
            await hosts.lock(connection, {*failed, *(c.before.host_id for c in changes if c.before and c.gives_up)})
            await hosts.learn_epochs(connection, {host_id: report.epoch for host_id, report in lists.items()})
            await vms.record(connection, changes)
            cordoned = await hosts.count_builds(connection, failed, built, cordon_after=self._cordon_after)
            told = {c.after.id for c in changes if c.after.sent_at is None and c.after.is_lagging} | retold
            if told:
                commands += await dispatch.commands_for(connection, told)
                await vms.mark_sent(connection, list(told))
        await dispatch.send(self._publisher, commands)
        for name in cordoned:
            log.warning("host.cordoned", host=name, reason="builds failed in a row")
        if any(change.after.state is State.PENDING for change in changes):
            self._placer.wake()
        self._relay.wake()


def _compare(
    lists: Iterable[HostReport], rows: Mapping[UUID, Vm], changed: Collection[UUID]
) -> tuple[list[tuple[Vm, VmReport, int]], set[UUID]]:
    """What complete lists do not say: VMs that had run and are missing, and VMs whose command must be repeated."""
    missing: list[tuple[Vm, VmReport, int]] = []
    retold: set[UUID] = set()
    for report in lists:
        listed = {seen.vm_id for seen in report.vms}
        for vm in rows.values():
            if vm.host_id != report.host_id:
                continue
            if vm.is_lagging:
                retold.add(vm.id)
            elif vm.id not in listed and vm.id not in changed and vm.state in {State.RUNNING, State.STOPPED}:
                missing.append((vm, _absent(vm, report), report.epoch))
    return missing, retold


def _newest_lists(reports: Sequence[HostReport]) -> dict[UUID, HostReport]:
    """The last complete list of each host."""
    newest: dict[UUID, HostReport] = {}
    for report in reports:
        old = newest.get(report.host_id)
        if report.complete and (old is None or (old.epoch, old.seq) < (report.epoch, report.seq)):
            newest[report.host_id] = report
    return newest


def _newest(reports: Sequence[HostReport]) -> dict[tuple[UUID, UUID, int], tuple[VmReport, int]]:
    """The last report of each placement by each host: it says all that the earlier ones said.

    By (host, VM, token): the end of one placement must not be hidden by the beginning of the next.
    """
    newest: dict[tuple[UUID, UUID, int], tuple[VmReport, int]] = {}
    for report in reports:
        for seen in report.vms:
            key = (report.host_id, seen.vm_id, seen.token)
            old = newest.get(key)
            if old is None or (old[1], old[0].seq) < (report.epoch, seen.seq):
                newest[key] = (seen, report.epoch)
    return newest


def _absent(vm: Vm, report: HostReport) -> VmReport:
    """What a complete list says of a VM that is not on it. Its `seq` is the list's: newer reports outrank it."""
    assert vm.token is not None
    return VmReport(
        vm_id=vm.id,
        token=vm.token,
        generation=vm.generation,
        seq=report.seq,
        observed=Observed.ABSENT,
        settled=True,
    )


def _answer_stale(vm: Vm | None, host_id: UUID, report: VmReport, epoch: int) -> list[Command]:
    """A report under a fence that is not the row's. Only what is proven to be over is removed (law 3)."""
    metrics.REPORTS.labels(outcome="stale").inc()
    if report.observed is Observed.ABSENT:
        return []
    if vm is None:
        log.warning("vm.unknown", vm_id=str(report.vm_id), host_id=str(host_id), note="left alone")
        return []
    if vm.state is State.DELETED or (vm.token is not None and vm.token > report.token):
        log.warning("vm.remnant", vm_id=str(vm.id), host_id=str(host_id), token=report.token)
        return [Command(host_id, dispatch.absent(vm, epoch, report.token))]
    return []


def _builds(changes: Sequence[Change]) -> tuple[list[UUID], list[UUID]]:
    """The hosts on which builds failed by the host's own fault, and those on which one came to its end."""
    failed: list[UUID] = []
    built: list[UUID] = []
    for change in changes:
        before, after = change.before, change.after
        if before is None or before.host_id is None or before.state is not State.BUILDING:
            continue
        if len(after.failed_hosts) > len(before.failed_hosts):
            if after.failed_hosts[-1]["problem"]["code"] in HOST_FAULTS:
                failed.append(before.host_id)
        elif after.state in {State.RUNNING, State.STOPPED}:
            built.append(before.host_id)
    return failed, built
