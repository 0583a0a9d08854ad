"""The case against an installation: what it was asked and what it has, and the sorts of things that may not be.

LEGEND says in words what each count in the report is; rules.RULES is how it is found.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from chaos.history import Entry, Told, by_vm, requests
from chaos.snapshot import Domain, Event, Snapshot


class Sort(StrEnum):
    """What sort of violation it is."""

    LOST = "lost"
    DOUBLED = "doubled"
    OVERBOOKED = "overbooked"
    ORPHANED = "orphaned"
    UNEXPLAINED = "unexplained"
    DEAD = "dead letters"
    BROKEN = "invariants broken"


LEGEND: Mapping[Sort, str] = {
    Sort.LOST: """\
A request that was confirmed (2xx, or the broker's confirm) and left neither its VM nor a recorded refusal nor any
trace; or a VM that is not in the end what was last surely wished of it (running, stopped, deleted, its label, its
number of reboots), by its row and by its hypervisor; or an event that a watcher was never told. A guest whose QEMU the
storm killed may be stopped, with that reason. A VM may be in error, explained.""",
    Sort.DOUBLED: """\
Two VMs for one id or key, or one that nobody asked for; two live domains or two QEMUs for one VM over all hosts; two
placements without a failed build, a fence or a retry between them; one request carried out twice, by the log or by the
count of reboots; an event that a watcher was told twice.""",
    Sort.OVERBOOKED: """\
Counters of a host above its capacity, or not the sums over the VMs that are placed there; a project with more VMs than
its quota.""",
    Sort.ORPHANED: """\
A domain, a QEMU, files, an address, a share of a quota, a queue, or a message in one, that has no VM, no host or no
client.""",
    Sort.UNEXPLAINED: """\
A VM in error, or a refusal, without a code and an event; a VM past its deadline, or not at rest; a refusal that the
request does not deserve; one request that was both accepted and refused; an answer that says that something broke
inside.""",
    Sort.DEAD: "Messages in leveret.dead.",
    Sort.BROKEN: """\
Rules of the product's own that are broken (`POST /v1/checks` with all hosts), or could not be looked at.""",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One violation: of what, and the evidence."""

    sort: Sort
    subject: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.sort}: {self.subject}: {self.evidence}"


class Case:
    """A history and a snapshot, indexed."""

    def __init__(self, entries: Sequence[Entry], there: Snapshot) -> None:
        self.entries = entries
        self.there = there
        self.requests = requests(entries)
        self.by_vm = by_vm(self.requests)
        self.vms = {vm.id: vm for vm in there.vms}

    @cached_property
    def events_of(self) -> Mapping[str, list[Event]]:
        found: dict[str, list[Event]] = defaultdict(list)
        for event in sorted(self.there.events, key=lambda event: event.id):
            if event.vm_id is not None:
                found[event.vm_id].append(event)
        return found

    @cached_property
    def mentioned(self) -> frozenset[tuple[str, str]]:
        """Project and id of every request that the log, a row or a refusal remembers."""
        found = {(event.project, event.request_id) for event in self.there.events if event.request_id}
        found |= {(refused.project, refused.request_id) for refused in self.there.refused}
        found |= {(vm.project, mark.split(" ", 1)[0]) for vm in self.there.vms for mark in vm.recent_requests}
        return frozenset(found)

    @cached_property
    def never(self) -> frozenset[tuple[str, str]]:
        """Project and id of VMs that will never be: their create was refused, or a delete came before it."""
        refused = {(one.project, one.vm_id) for one in self.there.refused}
        return frozenset(refused | {(one.project, one.vm_id) for one in self.there.tombstones})

    @cached_property
    def domains_of(self) -> Mapping[str, list[Domain]]:
        found: dict[str, list[Domain]] = defaultdict(list)
        for domain in self.there.domains:
            found[domain.vm_id].append(domain)
        return found

    @cached_property
    def shot(self) -> frozenset[str]:
        """The VMs whose QEMU the storm has killed."""
        return frozenset(
            entry.vm_id for entry in self.entries if entry.told is Told.NEMESIS and entry.op == "kill" and entry.vm_id
        )


def counts(findings: Iterable[Finding]) -> dict[Sort, int]:
    counted = Counter(finding.sort for finding in findings)
    return {sort: counted[sort] for sort in Sort}
