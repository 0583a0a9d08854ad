"""Reports: what hosts see, applied to the rows of the VMs that are placed there."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import structlog

from leveret.conductor import dispatch, metrics
from leveret.conductor.database import Pool, transaction
from leveret.conductor.decisions import HOST_FAULTS, Limits, is_waiting_for_its_host, on_report
from leveret.conductor.dispatch import Command
from leveret.conductor.rows import Change, Vm
from leveret.conductor.store import hosts, projects, vms
from leveret.conductor.store.hosts import Fenced
from leveret.shared.bus import DONE, Delivery, Outcome, Publisher, Reject
from leveret.shared.errors import LeveretError
from leveret.shared.fault_points import fault_point, take
from leveret.shared.lifecycle import Observed, State
from leveret.shared.loop import Loop
from leveret.shared.messages import HostReport, VmReport

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Applied:
    """What became of some reports: changed VMs, what hosts are to be told, and the names of cordoned hosts."""

    changes: list[Change]
    commands: list[Command]
    cordoned: list[str]


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
        applied = await self._commit(reports)
        if applied.commands:
            await take("reports.send", dispatch.send, self._publisher, applied.commands)
        for name in applied.cordoned:
            log.warning("host.cordoned", host=name, reason="builds failed in a row")
        if any(change.after.state is State.PENDING for change in applied.changes):
            self._placer.wake()
        self._relay.wake()

    @fault_point("reports.apply")
    async def _commit(self, reports: Sequence[HostReport]) -> _Applied:
        newest, lists = _newest(reports), _newest_lists(reports)
        async with transaction(self._pool) as connection:
            now = await vms.database_now(connection)
            listed = await vms.placed_on(connection, list(lists))
            rows = await vms.lock(connection, {vm_id for _, vm_id, _ in newest} | listed)
            fenced = await hosts.fenced(connection, {report.host_id for report in reports})
            off = fenced.keys() | await hosts.retired(connection, {report.host_id for report in reports})
            strays: set[UUID] = set()
            changes: list[Change] = []
            commands: list[Command] = []
            for (host_id, vm_id, _), (report, epoch) in newest.items():
                row = rows.get(vm_id)
                vm = row if row is None or host_id in fenced else _caught_up(row, host_id, report)
                if vm is None or vm.host_id != host_id or vm.token != report.token:
                    answer = _answer_stale(vm, host_id, report, epoch, is_off=host_id in off)
                    strays |= {host_id} if answer else set()
                    commands += answer
                    continue
                if host_id in fenced and _is_from_before(fenced[host_id], vm, epoch):
                    continue
                change = on_report(vm, report, epoch, now, self._limits)
                metrics.REPORTS.labels(outcome="applied" if change else "old").inc()
                if change:
                    changes.append(replace(change, before=row))
                    rows[vm_id] = change.after
            missing, retold = _compare(_present(lists, fenced), rows, {change.after.id for change in changes})
            for vm, report, epoch in missing:
                change = on_report(vm, report, epoch, now, self._limits)
                if change:
                    changes.append(change)
            failed, built = _builds(changes)
            # In one order, before anything else takes some of them: see store.vms.
            await projects.lock_rooms(connection, {c.after.project_id for c in changes if projects.frees_quota(c)})
            given_up = (c.before.host_id for c in changes if c.before and c.gives_up)
            await hosts.lock(connection, {*(host_id for host_id, _ in failed), *given_up}, if_failing=built)
            await hosts.learn_epochs(connection, {host_id: report.epoch for host_id, report in lists.items()})
            await hosts.mark_clean(connection, {id_: lists[id_].epoch for id_ in lists.keys() & fenced.keys() - strays})
            await vms.record(connection, changes)
            cordoned = await hosts.count_builds(connection, failed, built, cordon_after=self._cordon_after)
            told = {c.after.id for c in changes if c.after.sent_at is None and c.after.is_lagging} | retold
            if told:
                commands += await dispatch.commands_for(connection, told)
                await vms.mark_sent(connection, list(told))
        return _Applied(changes, commands, cordoned)


def _caught_up(vm: Vm, host_id: UUID, report: VmReport) -> Vm:
    """The row under the token that its own host has by now: an older copy of the database was restored."""
    if vm.host_id != host_id or vm.token is None or report.token <= vm.token:
        return vm
    return replace(vm, token=report.token, report_epoch=0, report_seq=0)


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
            elif vm.id not in listed and vm.id not in changed and _should_be_there(vm):
                missing.append((vm, _absent(vm, report), report.epoch))
    return missing, retold


def _should_be_there(vm: Vm) -> bool:
    return vm.state in {State.RUNNING, State.STOPPED} or is_waiting_for_its_host(vm)


def _present(lists: Mapping[UUID, HostReport], fenced: Mapping[UUID, Fenced]) -> list[HostReport]:
    """Those of the lists that are no old news of a host that was declared off since."""
    return [one for id_, one in lists.items() if id_ not in fenced or one.epoch > fenced[id_].fenced_epoch]


def _is_from_before(host: Fenced, vm: Vm, epoch: int) -> bool:
    """Whether this is the old news of a host that was declared off since; the VM waits for newer."""
    return is_waiting_for_its_host(vm) and epoch <= host.fenced_epoch


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


def _answer_stale(vm: Vm | None, host_id: UUID, report: VmReport, epoch: int, *, is_off: bool) -> list[Command]:
    """A report under a fence that is not the row's. Only what is proven to be over is removed (law 3).

    On a host that was declared off that is whatever is not placed there any more, wherever it may be placed next.
    """
    metrics.REPORTS.labels(outcome="stale").inc()
    if report.observed is Observed.ABSENT:
        return []
    if vm is None:
        log.warning("vm.unknown", vm_id=str(report.vm_id), host_id=str(host_id), note="left alone")
        return []
    is_over = vm.token is None and is_off
    if vm.state is State.DELETED or is_over or (vm.token is not None and vm.token > report.token):
        log.warning("vm.remnant", vm_id=str(vm.id), host_id=str(host_id), token=report.token)
        return [Command(host_id, dispatch.absent(vm, epoch, report.token))]
    return []


def _builds(changes: Sequence[Change]) -> tuple[list[tuple[UUID, str]], list[UUID]]:
    """The hosts on which builds failed by the host's own fault, with why, and those on which one came to its end."""
    failed: list[tuple[UUID, str]] = []
    built: list[UUID] = []
    for change in changes:
        before, after = change.before, change.after
        if before is None or before.host_id is None or before.state is not State.BUILDING:
            continue
        if len(after.failed_hosts) > len(before.failed_hosts):
            problem = after.failed_hosts[-1]["problem"]
            if problem["code"] in HOST_FAULTS:
                failed.append((before.host_id, f"{problem['code']}, {problem['message']}"))
        elif after.state in {State.RUNNING, State.STOPPED}:
            built.append(before.host_id)
    return failed, built
