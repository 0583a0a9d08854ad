"""What may not be: each rule is a pure function over a case, and yields what breaks it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from chaos.case import Case, Finding, Sort
from chaos.history import Entry, Request, Told, last_writers
from chaos.snapshot import Snapshot, Vm

Rule = Callable[[Case], Iterator[Finding]]


def judge(entries: Sequence[Entry], there: Snapshot) -> list[Finding]:
    """Everything that may not be, and is."""
    case = Case(entries, there)
    return [finding for rule in RULES for finding in rule(case)]


# Lost.

#: Outcomes of requests that must come to something.
_SAFE = frozenset({"accepted", "confirmed"})


def creates_left_something(case: Case) -> Iterator[Finding]:
    """A create that was accepted has its VM; one that was only confirmed may have been refused instead."""
    for request in case.requests:
        if request.op != "create" or request.outcome not in _SAFE:
            continue
        key = (request.project, request.vm_id)
        if request.vm_id in case.vms or (not request.is_accepted and key in case.never):
            continue
        yield _lost(request, f"the create was {request.outcome}, and there is no VM")


def requests_left_a_trace(case: Case) -> Iterator[Finding]:
    """What was confirmed was judged: the log, the VM or a refusal says so. A delete also shows in there being no VM."""
    for request in case.requests:
        if request.outcome not in _SAFE or (request.project, request.request_id) in case.mentioned:
            continue
        vm = case.vms.get(request.vm_id)
        if vm is None and (request.project, request.vm_id) in case.never and request.op != "create":
            continue  # there never was anything to change or delete
        if vm is not None and vm.state == "deleted" and request.op == "delete":
            continue
        if request.op == "create" and vm is not None and vm.project == request.project:
            continue  # asked again under another id, or a create whose marks were overtaken by later requests
        yield _lost(request, f"it was {request.outcome}, and nothing remembers it")


def vms_are_as_wished(case: Case) -> Iterator[Finding]:
    """The row wants what was last surely wished, and is that."""
    for vm_id, asked in case.by_vm.items():
        vm = case.vms.get(vm_id)
        deletes = [request for request in asked if request.op == "delete"]
        surely_deleted = any(one.outcome in _SAFE or "vm_not_found" in one.refused for one in deletes)
        if vm is None:
            continue  # whether it should be there is another rule's
        wishes = _WISHES if not surely_deleted else {}
        writes = list(last_writers([request for request in asked if request.op in wishes]))
        allowed = {wishes[write.op] for write in writes}
        if any(one.may_happen for one in deletes):
            allowed.add("deleted")
        if vm.desired not in allowed:
            yield _not_so(vm, f"it is to be {vm.desired}; what was wished is {_list(allowed)}")
        elif vm.is_at_rest and not _is_as_desired(vm, case):
            yield _not_so(vm, f"it is {vm.state} ({vm.code or 'no reason'}) and should be {vm.desired}")


_WISHES = {"create": "running", "start": "running", "stop": "stopped"}


def _is_as_desired(vm: Vm, case: Case) -> bool:
    if vm.state in {vm.desired, "error"}:
        return True
    return vm.state == "stopped" and vm.code == "guest_crashed" and vm.id in case.shot


def labels_are_as_wished(case: Case) -> Iterator[Finding]:
    for vm_id, asked in case.by_vm.items():
        vm = case.vms.get(vm_id)
        if vm is None:
            continue
        writes = [request for request in asked if "label" in request.args]
        allowed = {str(write.args["label"]) for write in last_writers(writes)}
        if writes and vm.labels.get("v") not in allowed:
            yield _not_so(vm, f"its label is {vm.labels.get('v')!r}; what was wished is {_list(allowed)}")


def reboots_are_counted(case: Case) -> Iterator[Finding]:
    """Every reboot that was accepted is carried out once, and what is unknown once or never."""
    for vm_id, asked in case.by_vm.items():
        vm = case.vms.get(vm_id)
        reboots = [request for request in asked if request.op == "reboot"]
        if vm is None:
            continue
        least = sum(request.is_accepted for request in reboots)
        most = sum(request.may_happen for request in reboots)
        if vm.restarts < least:
            yield _not_so(vm, f"{least} reboots were accepted, and it counts {vm.restarts}")
        elif vm.restarts > most:
            yield Finding(Sort.DOUBLED, f"vm {vm.id}", f"{most} reboots were asked for, and it counts {vm.restarts}")


def hypervisors_have_what_rows_say(case: Case) -> Iterator[Finding]:
    """Seen from the hypervisors: a running VM has a running domain where it is placed, a stopped one that is off."""
    for vm in case.there.vms:
        if vm.state not in {"running", "stopped"} or not vm.is_at_rest:
            continue
        mine = [one for one in case.domains_of.get(vm.id, []) if (one.host_id, one.token) == (vm.host_id, vm.token)]
        if not any(domain.running is (vm.state == "running") for domain in mine):
            found = [
                f"{'running' if one.running else 'off'} on {one.host_id}" for one in case.domains_of.get(vm.id, [])
            ]
            yield _not_so(vm, f"it is {vm.state} on {vm.host_id}; the hypervisors have {_list(found)}")


def watchers_heard_everything(case: Case) -> Iterator[Finding]:
    """Every event once and in order, whatever was killed meanwhile."""
    told: dict[str, list[int]] = defaultdict(list)
    for event in case.there.events:
        if event.seq is not None:
            told[event.project].append(event.seq)
    for watched in case.there.watched:
        missing = {seq for seq in told[watched.project] if seq > watched.since} - set(watched.seqs)
        if missing:
            evidence = f"{len(missing)} events, the first is number {min(missing)}"
            yield Finding(Sort.LOST, f"watcher {watched.watcher}", f"was never told of {evidence}")
        for before, after in zip(watched.seqs, watched.seqs[1:], strict=False):
            if after <= before:
                evidence = f"was told of event {after} after {before}"
                yield Finding(Sort.DOUBLED, f"watcher {watched.watcher}", evidence)
                break


# Doubled.


def one_vm_for_one_request(case: Case) -> Iterator[Finding]:
    """All answers to one request name one VM, and there is no VM that nobody asked for."""
    for request in case.requests:
        if len(request.named | {request.vm_id}) > 1:
            yield Finding(Sort.DOUBLED, f"request {request.request_id}", f"its answers name {_list(request.named)}")
    lives: dict[str, list[str]] = defaultdict(list)
    for vm in case.there.vms:
        if not any(request.op == "create" for request in case.by_vm.get(vm.id, [])):
            yield Finding(Sort.DOUBLED, f"vm {vm.id}", f"nobody asked for it; it is {vm.state}")
        if "life" in vm.labels:
            lives[vm.labels["life"]].append(vm.id)
    for life, ids in lives.items():
        if len(ids) > 1:
            yield Finding(Sort.DOUBLED, f"life {life}", f"it has the VMs {_list(ids)}")


def one_live_domain(case: Case) -> Iterator[Finding]:
    for vm_id, domains in case.domains_of.items():
        live = [domain.host_id for domain in domains if domain.running]
        if len(live) > 1:
            yield Finding(Sort.DOUBLED, f"vm {vm_id}", f"it runs on {_list(live)}")
    for vm_id, processes in Counter(case.there.qemus).items():
        if processes > 1:
            yield Finding(Sort.DOUBLED, f"vm {vm_id}", f"{processes} QEMUs run it")


#: What must stand in the log between two placements of a VM.
_BETWEEN = frozenset({"build_failed", "pending", "fenced"})


def placed_again_only_after_a_failure(case: Case) -> Iterator[Finding]:
    for vm_id, events in case.events_of.items():
        placed = False
        for event in events:
            if event.type in _BETWEEN or (event.type == "accepted" and event.verb == "retry"):
                placed = False
            elif event.type == "scheduled":
                if placed:
                    yield Finding(Sort.DOUBLED, f"vm {vm_id}", f"event {event.id} places it again, and nothing failed")
                placed = True


def carried_out_once(case: Case) -> Iterator[Finding]:
    """In the log: every VM was made once, and no request has changed one twice."""
    for vm_id, events in case.events_of.items():
        made = sum(event.type == "accepted" and event.verb != "retry" for event in events)
        if made > 1:
            yield Finding(Sort.DOUBLED, f"vm {vm_id}", f"it was accepted {made} times")
        done = Counter(
            event.request_id
            for event in events
            if event.request_id is not None and event.type in {"accepted", "changed", "deleting"}
        )
        for request_id, times in done.items():
            if times > 1:
                yield Finding(Sort.DOUBLED, f"vm {vm_id}", f"request {request_id} was carried out {times} times")


# Overbooked.


def counters_are_sums(case: Case) -> Iterator[Finding]:
    placed: dict[str, list[Vm]] = defaultdict(list)
    for vm in case.there.vms:
        if vm.host_id is not None:
            placed[vm.host_id].append(vm)
    for host in case.there.hosts:
        used = (host.vcpus_used, host.memory_mib_used, host.disk_gib_used)
        sums = _sums(placed[host.id])
        if used != sums:
            yield Finding(Sort.OVERBOOKED, f"host {host.name}", f"its counters are {used}, the sums {sums}")
        room = (host.vcpus, host.memory_mib, host.disk_gib)
        if any(much > most for much, most in zip(sums, room, strict=True)):
            yield Finding(Sort.OVERBOOKED, f"host {host.name}", f"it has {sums} of {room}")


def _sums(vms: Sequence[Vm]) -> tuple[int, int, int]:
    return sum(vm.vcpus for vm in vms), sum(vm.memory_mib for vm in vms), sum(vm.disk_gib for vm in vms)


# Orphaned.


def domains_have_vms(case: Case) -> Iterator[Finding]:
    """Every domain and every file belongs to a VM that is placed there, by this placement's token."""
    for domain in case.there.domains:
        vm = case.vms.get(domain.vm_id)
        if vm is None or vm.host_id != domain.host_id or vm.token != domain.token:
            where = "nowhere" if vm is None or vm.host_id is None else f"on {vm.host_id} by token {vm.token}"
            evidence = f"on host {domain.host_id} by token {domain.token}; the VM is placed {where}"
            yield Finding(Sort.ORPHANED, f"domain {domain.vm_id}", evidence)
    for files in case.there.files:
        vm = case.vms.get(files.vm_id)
        if vm is None or vm.host_id != files.host_id:
            yield Finding(Sort.ORPHANED, f"files of {files.vm_id}", f"on host {files.host_id}")
    for oddity in case.there.oddities:
        yield Finding(Sort.ORPHANED, f"file {oddity}", "it belongs to no VM")
    running = {domain.vm_id for domain in case.there.domains if domain.running}
    for vm_id in case.there.qemus:
        if vm_id not in running:
            yield Finding(Sort.ORPHANED, f"QEMU of {vm_id}", "no hypervisor knows that it runs")


def addresses_have_vms(case: Case) -> Iterator[Finding]:
    held = {vm.id: vm.address for vm in case.there.vms if vm.state != "deleted" and vm.address is not None}
    taken = {one.vm_id: one.address for one in case.there.addresses}
    for vm_id in held.keys() | taken.keys():
        if held.get(vm_id) != taken.get(vm_id):
            evidence = f"{taken.get(vm_id)} is taken for it, and it has {held.get(vm_id)}"
            yield Finding(Sort.ORPHANED, f"address of vm {vm_id}", evidence)


def quotas_are_sums(case: Case) -> Iterator[Finding]:
    for quota in case.there.quotas:
        alive = [vm for vm in case.there.vms if vm.project == quota.project and vm.state != "deleted"]
        used = (quota.vms_used, quota.vcpus_used, quota.memory_mib_used, quota.disk_gib_used)
        sums = (len(alive), *_sums(alive))
        if used != sums:
            yield Finding(Sort.ORPHANED, f"quota of {quota.project}", f"its counters are {used}, the sums {sums}")
        if quota.vms_max is not None and len(alive) > quota.vms_max:
            yield Finding(Sort.OVERBOOKED, f"quota of {quota.project}", f"{len(alive)} VMs of {quota.vms_max}")


_HOST_QUEUE = "leveret.host.{}.commands"
_OWN_QUEUES = frozenset({f"leveret.conductor.{name}" for name in ("requests", "reports", "beats")})
_DEAD = "leveret.dead"


def queues_have_owners(case: Case) -> Iterator[Finding]:
    hosts = {_HOST_QUEUE.format(host.id) for host in case.there.hosts}
    known = hosts | _OWN_QUEUES | {_DEAD} | set(case.there.client_queues)
    for queue in case.there.queues:
        if queue.name not in known:
            yield Finding(Sort.ORPHANED, f"queue {queue.name}", "nobody owns it")
        if queue.name in _OWN_QUEUES | hosts and queue.consumers == 0:
            yield Finding(Sort.ORPHANED, f"queue {queue.name}", "nobody consumes it")
        if queue.name in _OWN_QUEUES - {"leveret.conductor.beats"} and queue.messages:
            yield Finding(Sort.ORPHANED, f"queue {queue.name}", f"{queue.messages} messages that nobody takes")


def nothing_is_dead(case: Case) -> Iterator[Finding]:
    for queue in case.there.queues:
        if queue.name == _DEAD and queue.messages:
            yield from [Finding(Sort.DEAD, queue.name, "a message")] * queue.messages


# Unexplained.

#: The refusals that each request may meet in this storm. Whatever else is said is said wrongly.
_MAY_BE_REFUSED: Mapping[str, frozenset[str]] = {
    "create": frozenset({"no_capacity", "quota_exceeded", "name_taken", "vm_deleted"}),
    "delete": frozenset({"vm_not_found"}),
    "start": frozenset({"vm_not_found", "vm_deleted", "state_conflict"}),
    "stop": frozenset({"vm_not_found", "vm_deleted", "state_conflict"}),
    "reboot": frozenset({"vm_not_found", "vm_deleted", "state_conflict"}),
    "retry": frozenset({"vm_not_found", "vm_deleted", "state_conflict"}),
    "update": frozenset({"vm_not_found", "vm_deleted"}),
}
_INSIDE = frozenset({"internal", "handler_crashed"})


def answers_make_sense(case: Case) -> Iterator[Finding]:
    for request in case.requests:
        undeserved = set(request.refused) - _MAY_BE_REFUSED[request.op]
        if undeserved:
            yield _unexplained(request, f"refused with {_list(undeserved)}")
        if request.is_accepted and request.refused:
            yield _unexplained(request, f"accepted, and refused with {_list(request.refused)}")
    for entry in case.entries:
        if entry.told is Told.UNKNOWN and (entry.code in _INSIDE or entry.code == "http_500"):
            evidence = f"answered with {entry.code} by {entry.via}: {entry.note}"
            yield Finding(Sort.UNEXPLAINED, f"request {entry.request_id}", evidence)


def refused_creates_make_nothing(case: Case) -> Iterator[Finding]:
    """Never "failed, then created"."""
    for request in case.requests:
        vm = case.vms.get(request.vm_id)
        others = [one for one in case.by_vm[request.vm_id] if one.op == "create" and one is not request]
        if request.op == "create" and not request.may_happen and vm is not None and not others:
            yield _unexplained(request, f"refused with {_list(request.refused)}, and the VM is {vm.state}")


def errors_say_why(case: Case) -> Iterator[Finding]:
    for vm in case.there.vms:
        if vm.state == "error":
            told = any(event.type == "error" and event.code for event in case.events_of.get(vm.id, []))
            if vm.code is None or not told:
                yield Finding(Sort.UNEXPLAINED, f"vm {vm.id}", f"in error; code {vm.code}, event {told}")
    for refused in case.there.refused:
        if refused.code is None:
            yield Finding(Sort.UNEXPLAINED, f"request {refused.request_id}", "refused without a code")


def everything_is_at_rest(case: Case) -> Iterator[Finding]:
    for vm in case.there.vms:
        if not vm.is_at_rest:
            past = "" if vm.late_s is None or vm.late_s < 0 else f", {vm.late_s:.0f} s past its deadline"
            evidence = f"{vm.state}, step {vm.step}, generation {vm.observed_generation} of {vm.generation}{past}"
            yield Finding(Sort.UNEXPLAINED, f"vm {vm.id}", evidence)


def own_rules_hold(case: Case) -> Iterator[Finding]:
    check = case.there.check
    for name, examples in check.broken.items():
        yield Finding(Sort.BROKEN, name, str(examples[:3]))
    for what in check.unchecked:
        yield Finding(Sort.BROKEN, what, "could not be looked at")
    if check.hosts_asked < len(case.there.hosts):
        yield Finding(Sort.BROKEN, "hosts", f"only {check.hosts_asked} of {len(case.there.hosts)} answered")


RULES: tuple[Rule, ...] = (
    creates_left_something,
    requests_left_a_trace,
    vms_are_as_wished,
    labels_are_as_wished,
    reboots_are_counted,
    hypervisors_have_what_rows_say,
    watchers_heard_everything,
    one_vm_for_one_request,
    one_live_domain,
    placed_again_only_after_a_failure,
    carried_out_once,
    counters_are_sums,
    domains_have_vms,
    addresses_have_vms,
    quotas_are_sums,
    queues_have_owners,
    nothing_is_dead,
    answers_make_sense,
    refused_creates_make_nothing,
    errors_say_why,
    everything_is_at_rest,
    own_rules_hold,
)


def _lost(request: Request, evidence: str) -> Finding:
    subject = f"request {request.request_id} of {request.project} for vm {request.vm_id} ({request.op})"
    return Finding(Sort.LOST, subject, evidence)


def _not_so(vm: Vm, evidence: str) -> Finding:
    return Finding(Sort.LOST, f"vm {vm.id}", evidence)


def _unexplained(request: Request, evidence: str) -> Finding:
    subject = f"request {request.request_id} of {request.project} for vm {request.vm_id} ({request.op})"
    return Finding(Sort.UNEXPLAINED, subject, evidence)


def _list(items: Iterable[str]) -> str:
    return ", ".join(sorted(items)) or "nothing"
