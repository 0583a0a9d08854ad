"""What hosts say that they have, compared with the rows.

They cannot be seen at one moment. So a row must be the same before and after its host was asked, and what is wrong must
be wrong in the same way a moment later: a change that is under way is no violation.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from leveret.conductor.database import Pool, statement
from leveret.conductor.invariants.broker import HEARD_WITHIN_S
from leveret.conductor.invariants.invariant import Broken, Findings
from leveret.shared import topology
from leveret.shared.bus import Caller, Paused
from leveret.shared.errors import LeveretError
from leveret.shared.messages import AskInventory, HostInventory, SeenDomain

#: Hosts asked at once.
AT_ONCE = 64

_HOSTS = f"""
SELECT id, name, heartbeat_at > now() - interval '{HEARD_WITHIN_S} s' AS heard FROM hosts
WHERE heartbeat_at > now() - interval '{HEARD_WITHIN_S} s' OR state NOT IN ('fenced', 'retired')
ORDER BY name
"""  # noqa: S608 - our own number
_VMS = """
SELECT id, host_id, token, state, updated_at,
       deadline IS NULL AND state IN ('running', 'stopped') AND observed_generation = generation AS settled
FROM vms WHERE state <> 'deleted'
"""

#: A rule and what breaks it, as (name, value) pairs: the same violation is equal at every look.
Suspicion = tuple[str, tuple[tuple[str, Any], ...]]


@dataclass(frozen=True, slots=True)
class PlacedVm:
    """What a row says of where a VM is. `settled` means that nothing is under way."""

    id: UUID
    host_id: UUID | None
    token: int | None
    state: str
    updated_at: datetime
    settled: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """What one host says, to be looked up by VM."""

    domains: Mapping[UUID, SeenDomain]
    files: frozenset[UUID]
    foreign: tuple[UUID, ...] = ()
    leftovers: tuple[str, ...] = ()

    @classmethod
    def of(cls, told: HostInventory) -> "Shown":
        return cls(
            {domain.vm_id: domain for domain in told.domains}, frozenset(told.files), told.foreign, told.leftovers
        )


@dataclass(frozen=True, slots=True)
class View:
    """The rows before the hosts were asked and after, and what the hosts said. `names` are those of the hosts."""

    before: Mapping[UUID, PlacedVm]
    after: Mapping[UUID, PlacedVm]
    shown: Mapping[UUID, Shown]
    names: Mapping[UUID, str]


class HostCheck:
    """Asks hosts for their inventories. Give it a caller on a link of its own."""

    def __init__(
        self, pool: Pool, caller: Caller, *, confirm_s: float, answer_s: float = 3.0, round_s: float = 6.0
    ) -> None:
        """`answer_s` is the time for one host, `round_s` for all of them: who did not answer by then is unchecked."""
        self._pool = pool
        self._caller = caller
        self._confirm_s = confirm_s
        self._answer_s = answer_s
        self._round_s = round_s

    async def check(self) -> Findings:
        """Ask every host that is heard of; ask again those of which something seems wrong."""
        try:
            names, silent = await self._hosts()
            view, whys = await self._view(names, names)
            suspicions = suspect(view)
            if suspicions:
                await asyncio.sleep(self._confirm_s)
                again, _ = await self._view(_hosts_of(suspicions, view), names)
                suspicions &= suspect(again)
        except Paused as paused:
            return Findings(unchecked=[("hosts", str(paused))])
        looked_at = {rule: Broken() for rule in RULES}
        for rule, facts in sorted(suspicions, key=str):
            looked_at[rule].add(**dict(facts))
        unchecked = [(f"host {name}", "It is silent.") for name in silent]
        unchecked += [(f"host {names[host_id]}", why) for host_id, why in whys.items()]
        return Findings(looked_at, unchecked, len(view.shown))

    async def _hosts(self) -> tuple[dict[UUID, str], list[str]]:
        """The hosts that are heard of, and the names of those that are not, though they should be."""
        async with statement(self._pool) as connection:
            rows = await connection.fetch(_HOSTS)
        return {row["id"]: row["name"] for row in rows if row["heard"]}, [r["name"] for r in rows if not r["heard"]]

    async def _view(self, asked: Collection[UUID], names: Mapping[UUID, str]) -> tuple[View, dict[UUID, str]]:
        """What can be seen of these hosts now, and why not, of those that did not answer."""
        before = await self._rows()
        shown: dict[UUID, Shown] = {}
        whys = dict.fromkeys(asked, "It did not answer in time.")
        slots = asyncio.Semaphore(AT_ONCE)
        tasks = [asyncio.create_task(self._ask(host_id, shown, whys, slots)) for host_id in asked]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._round_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return View(before, await self._rows(), shown, names), whys

    async def _ask(
        self, host_id: UUID, shown: dict[UUID, Shown], whys: dict[UUID, str], slots: asyncio.Semaphore
    ) -> None:
        async with slots:
            try:
                answer = await self._caller.ask(
                    topology.HOSTS.name, str(host_id), AskInventory(), wait_s=self._answer_s, publish_timeout_s=2.0
                )
            except LeveretError as error:
                whys[host_id] = error.problem.message
                return
        if not isinstance(answer, HostInventory):
            return
        if answer.problem is not None:
            whys[host_id] = answer.problem.message
        elif answer.cut:
            whys[host_id] = "It has more than one message can tell."
        else:
            shown[host_id] = Shown.of(answer)
            del whys[host_id]

    async def _rows(self) -> dict[UUID, PlacedVm]:
        async with statement(self._pool) as connection:
            return {row["id"]: PlacedVm(**row) for row in await connection.fetch(_VMS)}


RULES = (
    "vm_runs_once",
    "domain_is_where_it_is_placed",
    "domain_has_a_vm",
    "vm_has_its_domain",
    "files_are_of_placed_vms",
    "pool_holds_nothing_else",
)


def suspect(view: View) -> set[Suspicion]:
    """Everything that does not fit together, of VMs whose rows stood still while their hosts were asked."""
    return {
        *_running_twice(view),
        *(found for host_id in view.shown for found in _domains_of(view, host_id)),
        *(found for host_id in view.shown for found in _files_of(view, host_id)),
        *(found for vm in view.before.values() for found in _missing(view, vm)),
    }


def _suspicion(rule: str, **facts: Any) -> Suspicion:
    return rule, tuple((name, str(value) if isinstance(value, UUID) else value) for name, value in facts.items())


def _stood_still(view: View, vm_id: UUID) -> bool:
    return view.before.get(vm_id) == view.after.get(vm_id)


def _running_twice(view: View) -> Sequence[Suspicion]:
    running: dict[UUID, list[str]] = {}
    for host_id, inventory in view.shown.items():
        for domain in inventory.domains.values():
            if domain.running:
                running.setdefault(domain.vm_id, []).append(f"{view.names[host_id]} (token {domain.token})")
    return [
        _suspicion("vm_runs_once", vm_id=vm_id, hosts=", ".join(sorted(hosts)))
        for vm_id, hosts in running.items()
        if len(hosts) > 1
    ]


def _domains_of(view: View, host_id: UUID) -> Sequence[Suspicion]:
    """Domains that should not be on this host, and foreign ones that have a VM's id."""
    found = []
    host = view.names[host_id]
    for domain in view.shown[host_id].domains.values():
        vm = view.after.get(domain.vm_id)
        facts = {"vm_id": domain.vm_id, "host": host, "token": domain.token}
        if not _stood_still(view, domain.vm_id):
            continue
        if vm is None:
            found.append(_suspicion("domain_has_a_vm", **facts))
        elif vm.host_id != host_id or (vm.settled and vm.token != domain.token):
            found.append(_suspicion("domain_is_where_it_is_placed", **facts, placed_with_token=vm.token))
    for vm_id in view.shown[host_id].foreign:
        if vm_id in view.after and _stood_still(view, vm_id):
            facts = {"vm_id": vm_id, "host": host, "token": None}
            found.append(_suspicion("domain_is_where_it_is_placed", **facts, note="It is not Leveret's."))
    return found


def _files_of(view: View, host_id: UUID) -> Sequence[Suspicion]:
    """Files that should not be in this host's pool."""
    host, inventory = view.names[host_id], view.shown[host_id]
    found = [_suspicion("pool_holds_nothing_else", host=host, file=name) for name in inventory.leftovers]
    for vm_id in inventory.files:
        vm = view.after.get(vm_id)
        if _stood_still(view, vm_id) and (vm is None or vm.host_id != host_id):
            found.append(_suspicion("files_are_of_placed_vms", vm_id=vm_id, host=host, found=True))
    return found


def _missing(view: View, vm: PlacedVm) -> Sequence[Suspicion]:
    """What a host that answered should have of a settled VM, and has not."""
    inventory = view.shown.get(vm.host_id) if vm.host_id is not None else None
    if inventory is None or not vm.settled or vm.host_id is None or not _stood_still(view, vm.id):
        return []
    found: list[Suspicion] = []
    host = view.names[vm.host_id]
    domain = inventory.domains.get(vm.id)
    seen = "no domain" if domain is None else "running" if domain.running else "stopped"
    if seen != vm.state:
        found.append(_suspicion("vm_has_its_domain", vm_id=vm.id, host=host, state=vm.state, found=seen))
    if vm.id not in inventory.files:
        found.append(_suspicion("files_are_of_placed_vms", vm_id=vm.id, host=host, found=False))
    return found


def _hosts_of(suspicions: Collection[Suspicion], view: View) -> set[UUID]:
    """The hosts to be asked again: every one that can bear out a suspicion."""
    vms = {dict(facts).get("vm_id") for _, facts in suspicions}
    named = {dict(facts).get("host") for _, facts in suspicions}
    return {
        host_id
        for host_id, inventory in view.shown.items()
        if view.names[host_id] in named or any(str(vm_id) in vms for vm_id in inventory.domains)
    }
