"""The judge of script/chaos: a good story passes, and each kind of violation in a broken one is found."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from chaos.case import LEGEND, Case, Sort, counts
from chaos.history import Entry, Request, Told, last_writers, requests
from chaos.rules import RULES, judge
from chaos.snapshot import (
    Address,
    Check,
    Domain,
    Event,
    Files,
    Host,
    Queue,
    Quota,
    Refused,
    Snapshot,
    Tombstone,
    Vm,
    Watched,
)

pytestmark = pytest.mark.unit

RUNNING, STOPPED, DELETED, UNBORN, REFUSED, FAILED = "running", "stopped", "deleted", "unborn", "refused", "failed"


class Story:
    """A history that is told step by step."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._now = 0.0

    def ask(self, vm_id: str, op: str, *told: str, request_id: str = "", **args: Any) -> "Story":
        """One attempt for each of `told`: a verdict, `unknown`, or the code of a refusal."""
        request_id = request_id or f"{op}-{vm_id}"
        for outcome in told or ("accepted",):
            entry = Entry(self._tick(), Told.INVOKE, 1, "p", request_id, vm_id, op, "rest", args)
            self.entries.append(entry)
            match outcome:
                case "accepted" | "queued" | "confirmed":
                    answer = replace(entry, told=Told.OK, verdict=outcome, args={})
                case "unknown" | "internal":
                    answer = replace(entry, told=Told.UNKNOWN, code=outcome, args={})
                case "lost on the way":
                    continue
                case code:
                    answer = replace(entry, told=Told.FAIL, code=code, args={})
            self.entries.append(replace(answer, at_s=self._tick()))
        return self

    def _tick(self) -> float:
        self._now += 1
        return self._now


def story() -> Story:
    """What clients of a good installation were told: one VM of every fate."""
    told = Story()
    told.ask(RUNNING, "create", "unknown", "queued", "accepted", label="0")
    told.ask(RUNNING, "update", "accepted", label="1").ask(RUNNING, "reboot", "unknown", "accepted")
    told.ask(STOPPED, "create", "confirmed", label="0").ask(STOPPED, "stop")
    told.ask(DELETED, "create", label="0").ask(DELETED, "delete", "unknown", "accepted")
    told.ask(UNBORN, "delete", "vm_not_found").ask(UNBORN, "create", "vm_deleted", label="0")
    told.ask(REFUSED, "create", "no_capacity", label="0")
    told.ask(FAILED, "create", label="0").ask(FAILED, "start", "state_conflict")
    return told


def event(number: int, vm_id: str, kind: str, **more: Any) -> Event:
    return Event(id=number, project="p", seq=number, vm_id=vm_id, type=kind, **more)


#: What a good installation has to show for that story.
GOOD = Snapshot(
    vms=(
        Vm(
            id=RUNNING,
            project="p",
            state="running",
            desired="running",
            host_id="h1",
            token=1,
            restarts=1,
            labels={"v": "1", "life": "1"},
            address="10.0.0.1",
            recent_requests=("create-running create.v1-00", "update-running x", "reboot-running y"),
        ),
        Vm(
            id=STOPPED,
            project="p",
            state="stopped",
            desired="stopped",
            host_id="h2",
            token=2,
            labels={"v": "0", "life": "2"},
            address="10.0.0.2",
            recent_requests=("create-stopped x", "stop-stopped x"),
        ),
        Vm(id=DELETED, project="p", state="deleted", desired="deleted", labels={"v": "0", "life": "3"}),
        Vm(
            id=FAILED,
            project="p",
            state="error",
            desired="running",
            labels={"v": "0", "life": "4"},
            code="build_failed",
            address="10.0.0.3",
            recent_requests=("create-failed x",),
        ),
    ),
    events=(
        event(1, RUNNING, "accepted", request_id="create-running", state="pending"),
        event(2, RUNNING, "scheduled", state="building", moved_from="pending"),
        event(3, RUNNING, "build_failed", state="pending", code="start_failed"),
        event(4, RUNNING, "scheduled", state="building", moved_from="pending"),
        event(5, RUNNING, "changed", request_id="update-running", state="building"),
        event(6, DELETED, "accepted", request_id="create-deleted", state="pending"),
        event(7, DELETED, "deleting", request_id="delete-deleted", state="deleting"),
        event(8, FAILED, "error", state="error", code="build_failed"),
    ),
    refused=(Refused(vm_id=REFUSED, project="p", request_id="create-refused", code="no_capacity"),),
    tombstones=(Tombstone(vm_id=UNBORN, project="p"),),
    hosts=tuple(
        Host(
            id=name,
            name=name,
            state="up",
            vcpus=4,
            vcpus_used=1,
            memory_mib=1024,
            memory_mib_used=128,
            disk_gib=10,
            disk_gib_used=1,
        )
        for name in ("h1", "h2")
    ),
    quotas=(Quota(project="p", vms_max=3, vms_used=3, vcpus_used=3, memory_mib_used=384, disk_gib_used=3),),
    addresses=(
        Address(address="10.0.0.1", vm_id=RUNNING),
        Address(address="10.0.0.2", vm_id=STOPPED),
        Address(address="10.0.0.3", vm_id=FAILED),
    ),
    domains=(
        Domain(host_id="h1", vm_id=RUNNING, token=1, running=True),
        Domain(host_id="h2", vm_id=STOPPED, token=2, running=False),
    ),
    files=(Files(host_id="h1", vm_id=RUNNING), Files(host_id="h2", vm_id=STOPPED)),
    qemus=(RUNNING,),
    queues=(
        *(Queue(name=f"leveret.conductor.{name}", messages=0, consumers=3) for name in ("requests", "reports")),
        Queue(name="leveret.host.h1.commands", messages=0, consumers=1),
        Queue(name="leveret.host.h2.commands", messages=0, consumers=1),
        Queue(name="leveret.dead", messages=0, consumers=0),
        Queue(name="client.p.main", messages=3, consumers=1),
    ),
    client_queues=("client.p.main",),
    watched=(
        Watched(watcher="rest", project="p", since=0, seqs=tuple(range(1, 9))),
        Watched(watcher="amqp", project="p", since=2, seqs=tuple(range(3, 9))),
    ),
    check=Check(hosts_asked=2),
)


def changed(kind: str, name: str, **fields: Any) -> Snapshot:
    """The good snapshot, with one of its facts otherwise."""
    facts = [
        fact.model_copy(update=fields)
        if name in {getattr(fact, key, None) for key in ("id", "vm_id", "name")}
        else fact
        for fact in getattr(GOOD, kind)
    ]
    assert tuple(facts) != getattr(GOOD, kind)
    return GOOD.model_copy(update={kind: tuple(facts)})


def without(kind: str, name: str) -> Snapshot:
    facts = tuple(
        one for one in getattr(GOOD, kind) if name not in {getattr(one, key, None) for key in ("id", "vm_id")}
    )
    assert facts != getattr(GOOD, kind)
    return GOOD.model_copy(update={kind: facts})


def beside(kind: str, *more: object) -> Snapshot:
    return GOOD.model_copy(update={kind: (*getattr(GOOD, kind), *more)})


def test_a_good_story_is_found_good() -> None:
    assert judge(story().entries, GOOD) == []


#: Every one is the good snapshot with one thing wrong, and the sort of violation that this is.
WRONG: dict[str, tuple[Sort, Snapshot]] = {
    "an accepted create has no VM": (Sort.LOST, without("vms", FAILED)),
    "a confirmed create has neither VM nor refusal": (Sort.LOST, without("vms", STOPPED)),
    "a VM runs that was stopped": (Sort.LOST, changed("vms", STOPPED, state="running", desired="running")),
    "a VM that should run is stopped": (Sort.LOST, changed("vms", RUNNING, state="stopped", code="guest_crashed")),
    "a deleted VM lives": (Sort.LOST, changed("vms", DELETED, state="running", desired="running", host_id="h1")),
    "a VM is deleted that nobody deleted": (Sort.LOST, changed("vms", RUNNING, state="deleted", desired="deleted")),
    "a label is the one of before": (Sort.LOST, changed("vms", RUNNING, labels={"v": "0"})),
    "a reboot was not carried out": (Sort.LOST, changed("vms", RUNNING, restarts=0)),
    "an accepted request left no trace": (Sort.LOST, changed("vms", STOPPED, recent_requests=())),
    "a running VM has no domain": (Sort.LOST, without("domains", RUNNING)),
    "a running VM's domain is off": (Sort.LOST, changed("domains", RUNNING, running=False)),
    "a stopped VM's domain runs": (Sort.LOST, changed("domains", STOPPED, running=True)),
    "a watcher was not told of an event": (
        Sort.LOST,
        GOOD.model_copy(update={"watched": (Watched(watcher="w", project="p", since=0, seqs=(1, 2, 4, 5, 6, 7, 8)),)}),
    ),
    "a watcher was told of an event twice": (
        Sort.DOUBLED,
        GOOD.model_copy(
            update={"watched": (Watched(watcher="w", project="p", since=0, seqs=(1, 2, 3, 3, 4, 5, 6, 7, 8)),)}
        ),
    ),
    "a VM that nobody asked for": (
        Sort.DOUBLED,
        beside("vms", Vm(id="ghost", project="p", state="deleted", desired="deleted")),
    ),
    "two VMs for one life": (Sort.DOUBLED, changed("vms", DELETED, labels={"v": "0", "life": "1"})),
    "two live domains": (
        Sort.DOUBLED,
        beside("domains", Domain(host_id="h2", vm_id=RUNNING, token=1, running=True)),
    ),
    "two QEMUs": (Sort.DOUBLED, GOOD.model_copy(update={"qemus": (RUNNING, RUNNING)})),
    "placed again though nothing failed": (
        Sort.DOUBLED,
        GOOD.model_copy(update={"events": tuple(one for one in GOOD.events if one.type != "build_failed")}),
    ),
    "made twice": (Sort.DOUBLED, beside("events", event(9, RUNNING, "accepted", request_id="another"))),
    "carried out twice": (Sort.DOUBLED, beside("events", event(9, RUNNING, "changed", request_id="update-running"))),
    "rebooted too often": (Sort.DOUBLED, changed("vms", RUNNING, restarts=2)),
    "a host's counter is too high": (Sort.OVERBOOKED, changed("hosts", "h1", vcpus_used=2)),
    "a host's counter is too low": (Sort.OVERBOOKED, changed("hosts", "h1", memory_mib_used=0)),
    "a host has more than it can": (Sort.OVERBOOKED, changed("hosts", "h1", vcpus=0)),
    "a project has more than it may": (
        Sort.OVERBOOKED,
        GOOD.model_copy(update={"quotas": (GOOD.quotas[0].model_copy(update={"vms_max": 2}),)}),
    ),
    "a domain without a VM": (
        Sort.ORPHANED,
        beside("domains", Domain(host_id="h2", vm_id=DELETED, token=9, running=False)),
    ),
    "a domain of an older placement": (Sort.ORPHANED, changed("domains", STOPPED, token=1)),
    "files without a VM": (Sort.ORPHANED, beside("files", Files(host_id="h2", vm_id=DELETED))),
    "files on another host": (Sort.ORPHANED, beside("files", Files(host_id="h2", vm_id=RUNNING))),
    "a stray file": (Sort.ORPHANED, beside("oddities", "half-made.qcow2")),
    "a QEMU that no hypervisor knows": (Sort.ORPHANED, beside("qemus", DELETED)),
    "an address of nobody's": (Sort.ORPHANED, beside("addresses", Address(address="10.0.0.9", vm_id=DELETED))),
    "a VM whose address is not taken": (Sort.ORPHANED, without("addresses", RUNNING)),
    "a quota that is held by nobody": (
        Sort.ORPHANED,
        GOOD.model_copy(update={"quotas": (GOOD.quotas[0].model_copy(update={"vms_used": 4, "vms_max": None}),)}),
    ),
    "a queue of nobody's": (
        Sort.ORPHANED,
        beside("queues", Queue(name="leveret.host.h9.commands", messages=0, consumers=1)),
    ),
    "a request that nobody takes": (Sort.ORPHANED, changed("queues", "leveret.conductor.requests", messages=1)),
    "a host that hears nothing": (Sort.ORPHANED, changed("queues", "leveret.host.h1.commands", consumers=0)),
    "an error without a code": (Sort.UNEXPLAINED, changed("vms", FAILED, code=None)),
    "an error without an event": (Sort.UNEXPLAINED, without("events", FAILED)),
    "a refusal without a code": (Sort.UNEXPLAINED, changed("refused", REFUSED, code=None)),
    "a VM past its deadline": (Sort.UNEXPLAINED, changed("vms", RUNNING, late_s=70.0)),
    "a VM that is still built": (Sort.UNEXPLAINED, changed("vms", FAILED, state="building", late_s=-5.0)),
    "a refused create made a VM": (
        Sort.UNEXPLAINED,
        beside("vms", Vm(id=REFUSED, project="p", state="deleted", desired="running")),
    ),
    "a dead letter": (Sort.DEAD, changed("queues", "leveret.dead", messages=1)),
    "a rule of the product's own": (
        Sort.BROKEN,
        GOOD.model_copy(update={"check": Check(hosts_asked=2, broken={"vm_runs_once": [{"vm_id": RUNNING}]})}),
    ),
    "a host that was not looked at": (Sort.BROKEN, GOOD.model_copy(update={"check": Check(hosts_asked=1)})),
    "a rule that was not looked at": (
        Sort.BROKEN,
        GOOD.model_copy(update={"check": Check(hosts_asked=2, unchecked=("broker",))}),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_it_is_found_that(what: str) -> None:
    sort, there = WRONG[what]
    assert counts(judge(story().entries, there))[sort] >= 1


#: Stories that no good installation tells, over the good snapshot.
MISTOLD: dict[str, tuple[Sort, Callable[[Story], Story]]] = {
    "accepted and refused": (Sort.UNEXPLAINED, lambda told: told.ask(STOPPED, "stop", "state_conflict")),
    "refused for no good reason": (
        Sort.UNEXPLAINED,
        lambda told: told.ask(RUNNING, "start", "unauthenticated", request_id="another"),
    ),
    "something broke inside": (Sort.UNEXPLAINED, lambda told: told.ask(RUNNING, "start", "internal", "accepted")),
    "a confirmed stop was not heeded": (Sort.LOST, lambda told: told.ask(RUNNING, "stop", "accepted")),
    "a confirmed delete was not heeded": (Sort.LOST, lambda told: told.ask(RUNNING, "delete", "confirmed")),
}


@pytest.mark.parametrize("what", MISTOLD)
def test_it_is_found_when_clients_were_told(what: str) -> None:
    sort, more = MISTOLD[what]
    assert counts(judge(more(story()).entries, GOOD))[sort] >= 1


def test_one_request_that_made_two_vms_is_found() -> None:
    told = story()
    told.entries = [
        replace(entry, vm_id="other") if entry.request_id == "create-failed" and entry.told is Told.OK else entry
        for entry in told.entries
    ]
    assert counts(judge(told.entries, GOOD))[Sort.DOUBLED] == 1


def test_what_may_have_happened_is_no_violation_either_way() -> None:
    """Unknown means that both are right."""
    told = story().ask(RUNNING, "stop", "unknown").ask(RUNNING, "delete", "lost on the way")
    assert judge(told.entries, GOOD) == []
    gone = changed("vms", RUNNING, state="deleted", desired="deleted", host_id=None, token=None, address=None)
    found = {finding.sort for finding in judge(told.entries, gone)}
    assert Sort.LOST not in found


def test_a_guest_that_the_storm_killed_may_be_stopped_and_no_other() -> None:
    there = changed("vms", RUNNING, state="stopped", code="guest_crashed")
    off = tuple(one.model_copy(update={"running": False}) for one in there.domains)
    there = there.model_copy(update={"domains": off, "qemus": ()})
    shot = Entry(50, Told.NEMESIS, op="kill", via="qemu", vm_id=RUNNING)
    assert judge([*story().entries, shot], there) == []
    frozen = replace(shot, op="freeze")
    assert counts(judge([*story().entries, frozen], there))[Sort.LOST] == 1


def test_a_write_that_was_over_before_another_began_is_not_the_last() -> None:
    told = Story().ask("v", "stop", request_id="1").ask("v", "start", request_id="2").ask("v", "stop", "unknown")
    last = [request.request_id for request in last_writers(requests(told.entries))]
    assert last == ["2", "stop-v"]


def test_a_write_that_was_refused_is_never_the_last() -> None:
    told = Story().ask("v", "stop", request_id="1").ask("v", "start", "unknown", "state_conflict", request_id="2")
    assert [request.request_id for request in last_writers(requests(told.entries))] == ["1"]


def test_writes_at_the_same_time_may_both_be_the_last() -> None:
    writes = [
        Request("p", "1", "v", "stop", {}, invoked_at=1, settled_at=5, is_accepted=True),
        Request("p", "2", "v", "start", {}, invoked_at=2, settled_at=4, is_accepted=True),
    ]
    assert len(list(last_writers(writes))) == 2


def test_every_sort_of_violation_is_explained_and_can_be_found() -> None:
    assert set(LEGEND) == set(Sort)
    assert {sort for sort, _ in WRONG.values()} == set(Sort)


def test_every_rule_finds_something_that_the_others_do_not_need_to() -> None:
    """A rule that none of these stories breaks would be one that cannot fail."""
    broken = set()
    for _, there in WRONG.values():
        broken |= {rule.__name__ for rule in RULES if list(rule(Case(story().entries, there)))}
    for _, more in MISTOLD.values():
        broken |= {rule.__name__ for rule in RULES if list(rule(Case(more(story()).entries, GOOD)))}
    assert broken == {rule.__name__ for rule in RULES}


def test_an_entry_is_read_as_it_was_written() -> None:
    for entry in story().entries:
        assert Entry.of(entry.line()) == entry
