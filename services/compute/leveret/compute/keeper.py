"""Keeps one VM as wished: one thing at a time, and the newest wish wins."""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from enum import StrEnum
from uuid import UUID

import structlog

from leveret.compute.breakable import Breakable, OutOfTime
from leveret.compute.convergence import Plan, Rank, Then, is_pointless, observe, plan, rank
from leveret.compute.driver import Domain, StepVerb
from leveret.compute.host import Host
from leveret.compute.status import Status
from leveret.compute.trouble import TRANSIENT, crashed, missing, not_cleaned_up, out_of_time, placed
from leveret.shared.errors import Code, LeveretError, Problem, fail
from leveret.shared.fault_points import take
from leveret.shared.lifecycle import BUILD_STEPS, Observed, Step, Wanted
from leveret.shared.messages import DesiredVm

log = structlog.get_logger()


class Answer(StrEnum):
    """What a keeper makes of a command."""

    NEWER = "newer"
    SAME = "same"
    STALE = "stale"


class _Superseded(Exception):
    """A newer wish has come, or the worker is closing: look at everything again."""


class Keeper:
    """Drives one VM. It has a task only while there is something to do, and forgets a wish that has come true.

    A failing build is undone, then reported as absent with its problem. Everything else that fails is tried again,
    with growing pauses, for as long as it is the wish.
    """

    __slots__ = (
        "_deadline",
        "_due",
        "_failure",
        "_had_run",
        "_host",
        "_waiting",
        "_wish",
        "status",
        "task",
    )

    def __init__(self, host: Host, vm_id: UUID) -> None:
        self.status = Status(vm_id)
        self.task: asyncio.Task[None] | None = None
        self._host = host
        self._wish: DesiredVm | None = None
        self._deadline = 0.0  # of the wish's build, on the loop's monotonic clock
        self._failure: Problem | None = None  # of the build under this token: what is left of it is being removed
        self._had_run = False  # was settled under this token: not to be built again
        self._due = False
        self._waiting = Breakable()

    @property
    def busy(self) -> bool:
        return self.task is not None

    # What may be asked of it. None of these wait.

    def accept(self, vm: DesiredVm) -> Answer:
        """Take a wish, unless it is older than what is known. A wish that is known already is hurried, or answered."""
        known = self._rank()
        if rank(vm) < known:
            return Answer.STALE
        if rank(vm) > known:
            self._take(vm)
            return Answer.NEWER
        if self._wish is None:
            self._host.changed(self.status, True)
        else:
            self.hurry()
            self._ensure()
        return Answer.SAME

    def look(self) -> None:
        """The hypervisor may have changed something: find out."""
        self._ensure()

    def adopt(self, domain: Domain) -> None:
        """Know a domain from an inventory, while nothing else is going on."""
        self._see(domain)
        if self.status.observed is Observed.RUNNING and not self.status.guest_ready:
            self._host.readiness.watch(self.status.vm_id)

    def hurry(self) -> None:
        """Do not wait out a pause."""
        self._waiting.hurry()

    def ready(self) -> None:
        """The guest has announced that it is up."""
        if self.status.observed is Observed.RUNNING and not self.status.guest_ready:
            self.status.guest_ready = True
            self._host.changed(self.status, True)

    def _rank(self) -> Rank:
        return rank(self._wish) if self._wish else (self.status.token, False, self.status.generation)

    def _take(self, vm: DesiredVm) -> None:
        was, status = self._wish, self.status
        if vm.token != status.token:
            self._failure, self._had_run = None, False
            self.status = status = Status(status.vm_id, vm.token)
        elif was is None:
            status.took_s = {}
        self._wish = vm
        self._deadline = asyncio.get_running_loop().time() + max(vm.deadline_s, 0.0)
        status.generation, status.settled = vm.generation, False
        if was and is_pointless(status.step or Step.DISPATCHED, was, vm):
            self._waiting.break_off()
        self._waiting.calm()
        self._waiting.hurry()
        self._ensure()

    def _ensure(self) -> None:
        self._due = True
        if self.task is None and not self._host.closing:
            self.task = asyncio.create_task(self._work())

    # The one task.

    async def _work(self) -> None:
        try:
            while self._due and not self._host.closing:
                self._due = False
                await self._once()
        finally:
            self.task = None

    async def _once(self) -> None:
        wish = self._wish
        try:
            await (self._look() if wish is None else self._fulfil(wish))
        except _Superseded:
            self._due = True
        except LeveretError as error:
            await self._stumble(wish, error.problem)
        except Exception as error:  # the rim
            log.exception("vm.crashed", vm_id=str(self.status.vm_id))
            await self._stumble(wish, crashed(error))
        else:
            self._waiting.calm()

    async def _stumble(self, wish: DesiredVm | None, problem: Problem) -> None:
        """Say what is wrong, pause, and try again; what was wrong with an older wish is nobody's business."""
        self._due = True
        if self._wish is not wish:
            return
        log.warning("vm.failed", vm_id=str(self.status.vm_id), step=self.status.step, code=problem.code)
        if wish is not None:
            self._tell(self.status.step, self._placed(problem))
        await self._waiting.pause(before=self._deadline)

    async def _look(self) -> None:
        """See what the hypervisor has of a VM of which nothing is wished at the moment."""
        domain = await self._host.driver.find(self.status.vm_id)
        if self._wish is not None:
            raise _Superseded
        if domain is not None:
            if self._see(domain):
                self._host.changed(self.status, True)
            await self._check_ready()
        elif not self.status.token:
            self._due = False
            self._host.gone(self.status.vm_id)
        elif self.status.present:
            self._miss()

    async def _fulfil(self, wish: DesiredVm) -> None:
        """Do what is next for this wish, and say what came of it."""
        if self._failure is not None and wish.wanted is not Wanted.ABSENT:
            await self._clean_up(wish, self._failure)
            return
        domain = await self._host.driver.find(wish.vm_id)
        self._check(wish)
        if domain is not None and domain.journal.token == wish.token:
            self.status.observed = observe(domain)
        todo = plan(wish, domain, had_run=self._had_run)
        if todo.builds:
            await self._build(wish, todo)
            if self._failure is not None:
                self._due = True
                return
        else:
            for step in todo.steps:
                await self._within(wish, self._step(step, wish), until=None)
            if todo.then is Then.MARK:
                await self._mark(wish)
        self._check(wish)
        if todo.then is Then.MARK:
            domain = await self._host.driver.find(wish.vm_id)
            self._check(wish)
        self._conclude(wish, todo.then, domain)
        await self._check_ready()

    def _conclude(self, wish: DesiredVm, then: Then, domain: Domain | None) -> None:
        match then:
            case Then.GONE:
                self._bury(None)
            case Then.MISSING:
                self._miss()
            case Then.STALE:
                self._wish, self._due = None, True
            case Then.MARK | Then.REST if domain is not None:
                if domain.journal.generation < wish.generation:
                    raise fail(Code.INTERNAL, "The hypervisor did not keep the journal that was written.")
                self._see(domain)
                self._host.changed(self.status, True)
            case _:
                self._due = True  # a remnant is out of the way, or the domain vanished: look again

    # Steps.

    async def _build(self, wish: DesiredVm, todo: Plan) -> None:
        """Build within the deadline, or note why not."""
        try:
            if asyncio.get_running_loop().time() >= self._deadline:
                raise OutOfTime
            await self._within(wish, self._build_steps(wish, todo), until=self._deadline)
        except OutOfTime:
            self._fail(out_of_time(self.status.step, self.status.problem))
        except LeveretError as error:
            self._check(wish)
            if error.problem.code in TRANSIENT:
                raise
            self._fail(error.problem)
        else:
            self._host.metrics.builds.labels("built").inc()

    async def _build_steps(self, wish: DesiredVm, todo: Plan) -> None:
        await self._fetch(wish)
        builds = self._host.builds
        if builds.locked():
            self._tell(Step.DISPATCHED, None)
        async with builds:
            for step in todo.steps[1:]:
                await self._step(step, wish)
            await self._mark(wish)

    async def _fetch(self, wish: DesiredVm) -> None:
        fetches, sha256, fetched = self._host.fetches, wish.image.sha256, False
        await fetches.enter(sha256, wish.project)
        try:
            await self._step(Step.IMAGE, wish)
            fetched = True
        finally:
            fetches.leave(sha256, fetched=fetched)

    async def _clean_up(self, wish: DesiredVm, failure: Problem) -> None:
        """Leave nothing of a failed build; until that is done its capacity stays taken."""
        try:
            self.status.problem = failure
            await self._step(Step.CLEANUP, wish)
        except LeveretError as error:
            raise LeveretError(not_cleaned_up(failure, error.problem)) from error
        self._check(wish)
        self._bury(failure)

    async def _step(self, step: Step, wish: DesiredVm) -> None:
        """Take one step, and note what it took."""
        self._check(wish)
        loop, status = asyncio.get_running_loop(), self.status
        began = loop.time()
        self._tell(step, status.problem)
        if step not in BUILD_STEPS:
            self._host.readiness.forget(wish.vm_id)
        limit_s = self._host.limits_s[step] + (wish.grace_s if step is Step.STOP else 0)
        await self._do(f"vm.{step}", self._host.verbs[step], wish, limit_s)
        seconds = loop.time() - began
        self._host.metrics.took(step, seconds)
        status.spent(step, seconds)
        status.problem = self._failure
        if step in {Step.START, Step.REBOOT, Step.STOP}:
            status.guest_ready = False

    async def _mark(self, wish: DesiredVm) -> None:
        self._check(wish)
        await self._do("vm.mark", self._host.driver.mark, wish, self._host.step_limit_s)
        if self.status.token == wish.token:
            self._had_run = True

    async def _do(self, point: str, verb: StepVerb, wish: DesiredVm, limit_s: float) -> None:
        """Have the hypervisor do something. Raises LeveretError `hypervisor_timeout` when that seems to hang."""
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                await take(point, verb, wish)
        except TimeoutError:
            if limit.expired():
                raise fail(Code.HYPERVISOR_TIMEOUT, f"It was not done within {limit_s:g} s.") from None
            raise

    async def _within(self, wish: DesiredVm, work: Awaitable[object], *, until: float | None) -> None:
        """Await what a newer wish may break off. Raises OutOfTime when `until` has come."""
        try:
            await self._waiting.run(work, until=until)
        except OutOfTime:
            self._check(wish)
            raise

    def _check(self, wish: DesiredVm) -> None:
        if self._wish is not wish or self._host.closing:
            raise _Superseded

    async def _check_ready(self) -> None:
        """Spare a guest that is up at once the round of being watched."""
        status = self.status
        if status.observed is not Observed.RUNNING or status.guest_ready or not status.settled:
            return
        with suppress(LeveretError):
            if await self._host.driver.guest_ready(status.vm_id):
                self.ready()
                return
        self._host.readiness.watch(status.vm_id)

    # What is known and told.

    def _see(self, domain: Domain) -> bool:
        """Know a domain as it is. Returns whether that is news."""
        news = self.status.see(domain, self._host.driver.boot_id)
        if self.status.observed is not Observed.RUNNING:
            self._host.readiness.forget(self.status.vm_id)
        if self.status.settled:
            self._wish, self._had_run = None, True
        return news

    def _miss(self) -> None:
        log.warning("vm.missing", vm_id=str(self.status.vm_id))
        self._wish = None
        self.status.lose(self._placed(missing(self.status.vm_id)))
        self._host.readiness.forget(self.status.vm_id)
        self._host.changed(self.status, True)

    def _bury(self, problem: Problem | None) -> None:
        self._wish, self._due = None, False
        self.status.lose(problem)
        self._host.changed(self.status, True)
        self._host.gone(self.status.vm_id)

    def _tell(self, step: Step | None, problem: Problem | None) -> None:
        """Progress, or trouble: trouble is told at once."""
        status = self.status
        if (step, problem) != (status.step, status.problem):
            urgent = problem != status.problem
            status.step, status.problem = step, problem
            self._host.changed(status, urgent)

    def _fail(self, problem: Problem) -> None:
        self._failure = self._placed(problem)
        self._host.metrics.builds.labels(str(problem.code)).inc()
        log.warning("build.failed", vm_id=str(self.status.vm_id), code=problem.code, step=self._failure.step)

    def _placed(self, problem: Problem) -> Problem:
        return placed(problem, self._host.name, self.status.step)
