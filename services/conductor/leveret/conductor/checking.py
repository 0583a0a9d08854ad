"""The checker: looks at every invariant, now and then and when asked, and says what is broken."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime

import structlog

from leveret.conductor import metrics
from leveret.conductor.database import Pool
from leveret.conductor.invariants import (
    BY_NAME,
    INVARIANTS,
    Broken,
    BrokerCheck,
    Findings,
    HostCheck,
    Invariant,
    Place,
    check_database,
)
from leveret.shared.bus import Delivery
from leveret.shared.checks import CheckReport, RuleView, RunCheck, UncheckedView

log = structlog.get_logger()

#: Seconds for the database's rules. Whoever asks for a report waits no longer than 25 s.
BUDGET_S = 12.0
#: Parts that could not be looked at, as a report lists them: of more hosts than this only the number is told.
UNCHECKED_MAX = 20

OFTEN = frozenset({Place.ROWS, Place.BROKER})
SELDOM = frozenset({Place.LOG, Place.HOSTS})
EVERYWHERE = OFTEN | SELDOM


class Checker:
    """Every conductor has one, and exports what it finds as `leveret_invariant_violations`."""

    def __init__(self, pool: Pool, broker: BrokerCheck, hosts: HostCheck) -> None:
        self._pool = pool
        self._broker = broker
        self._hosts = hosts
        self._broken: set[str] = set()

    async def check_often(self) -> None:
        """What is cheap: the rows and the broker."""
        await self.check_once(OFTEN)

    async def check_seldom(self) -> None:
        """What takes longer: the whole event log, and all that hosts have."""
        await self.check_once(SELDOM)

    async def check_once(self, places: Collection[Place] = EVERYWHERE) -> CheckReport:
        """Look at these places, set the gauge, and log what is newly broken. Never raises for what is away."""
        began = time.monotonic()
        looks = []
        if database := {Place.ROWS, Place.LOG}.intersection(places):
            looks.append(check_database(self._pool, database, budget_s=BUDGET_S))
        if Place.BROKER in places:
            looks.append(self._broker.check())
        if Place.HOSTS in places:
            looks.append(self._hosts.check())
        findings = Findings()
        for found in await asyncio.gather(*looks):
            findings.merge(found)
        self._publish(findings)
        return _report(findings, places, time.monotonic() - began)

    def _publish(self, findings: Findings) -> None:
        for name, broken in findings.looked_at.items():
            metrics.INVARIANT_VIOLATIONS.labels(name=name).set(broken.count)
            metrics.INVARIANT_CHECKED_AT.labels(name=name).set_to_current_time()
            if broken.count and name not in self._broken:
                self._broken.add(name)
                says = BY_NAME[name].says
                log.error("invariant.broken", name=name, rule=says, count=broken.count, examples=broken.examples[:3])
            elif not broken.count and name in self._broken:
                self._broken.discard(name)
                log.info("invariant.restored", name=name)
        if findings.unchecked:
            log.warning("invariants.unchecked", count=len(findings.unchecked), examples=findings.unchecked[:5])


def _report(findings: Findings, places: Collection[Place], seconds: float) -> CheckReport:
    rules = tuple(_rule(one, findings.looked_at.get(one.name)) for one in INVARIANTS if one.place in places)
    shown = findings.unchecked[:UNCHECKED_MAX]
    if more := len(findings.unchecked) - len(shown):
        shown = [*shown, (f"{more} more", "They are left out here.")]
    return CheckReport(
        at=datetime.now(UTC),
        seconds=round(seconds, 3),
        broken=sum(bool(rule.broken) for rule in rules),
        hosts_asked=findings.hosts_asked,
        rules=rules,
        unchecked=tuple(UncheckedView(what=what, why=why) for what, why in shown),
    )


def _rule(invariant: Invariant, broken: Broken | None) -> RuleView:
    return RuleView(
        name=invariant.name,
        says=invariant.says,
        broken=None if broken is None else broken.count,
        examples=() if broken is None else tuple(broken.examples),
        repair=invariant.repair,
    )


Give = Callable[[Delivery, CheckReport], Awaitable[None]]


class CheckDesk:
    """Checks on demand: one at a time, in a task of its own. Who asks meanwhile gets the report of the next one."""

    WAITING_MAX = 64

    def __init__(self, checker: Checker, give: Give) -> None:
        self._checker = checker
        self._give = give
        self._waiting: list[tuple[Delivery, RunCheck]] = []
        self._task: asyncio.Task[None] | None = None

    def ask(self, delivery: Delivery, ask: RunCheck) -> None:
        """Have a check made, and answered; never waits. Who comes when too many wait already gets no answer."""
        if len(self._waiting) < self.WAITING_MAX:
            self._waiting.append((delivery, ask))
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="check-desk")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while self._waiting:
                asked, self._waiting = self._waiting, []
                try:
                    await self._answer(asked)
                except Exception:  # the rim
                    log.exception("check.failed")
        finally:
            self._task = None

    async def _answer(self, asked: Collection[tuple[Delivery, RunCheck]]) -> None:
        places = EVERYWHERE if any(ask.hosts for _, ask in asked) else EVERYWHERE - {Place.HOSTS}
        report = await self._checker.check_once(places)
        for delivery, _ in asked:
            await self._give(delivery, report)
