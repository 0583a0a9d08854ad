"""A storm from its beginning to its verdict."""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import asyncpg
from installation import Installation

from chaos import baseline, house, looking
from chaos.baseline import Baseline
from chaos.case import Finding
from chaos.crowd import client_queues, crowd
from chaos.history import History
from chaos.lives import Clients
from chaos.nemesis import Nemesis
from chaos.rules import judge
from chaos.schedule import EVERY_S, Fault, schedule
from chaos.snapshot import Check, Snapshot
from chaos.workload import Life, calm, workload
from leveret.client.errors import ClientError
from leveret.stack.bootstrap import DATABASE, OWNER
from leveret.stack.libvirtd import Libvirtd

#: RabbitMQ 3.10 may lose a quorum queue that it is killed within a second of making: the storm begins a little later.
CALM_BEFORE_S = 5.0
#: Everything must be at rest again this long after the last fault.
CONVERGED_WITHIN_S = 120.0
#: It is waited for longer, to tell what is late from what is lost.
GIVE_UP_S = 300.0
#: What is left to be asked when everything is at rest may take so long.
FINISH_S = 900.0
#: In which watchers hear the newest event, when all is at rest.
CATCH_UP_S = 30.0
#: VMs of a quiet round.
ROUND_LIVES = 40

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What will happen: everything in it follows from seed, length, requests and whether there are guests."""

    seed: int
    storm_s: float
    requests: int
    guests: bool
    hosts: int
    round_lives: int
    components: tuple[str, ...]
    faults: tuple[Fault, ...]
    lives: tuple[Life, ...]


def plan(
    seed: int,
    storm_s: float,
    requests: int,
    *,
    guests: bool,
    hosts: int = house.HOSTS,
    round_lives: int = ROUND_LIVES,
) -> Plan:
    components = (
        *(f"conductor-{number}" for number in range(1, house.CONDUCTORS + 1)),
        "api",
        *(f"api-{number}" for number in range(2, house.APIS + 1)),
        *house.WORKERS,
        *(("compute", "libvirtd", "qemu") if guests else ()),
        "rabbitmq",
        "postgres",
    )
    faults = schedule(seed, storm_s, components, every_s=EVERY_S)
    lives = workload(seed, requests, storm_s, guests=guests)
    return Plan(seed, storm_s, requests, guests, hosts, round_lives, components, faults, lives)


@dataclass
class Result:
    """What came of it."""

    plan: Plan
    findings: list[Finding] = field(default_factory=list)
    converged_s: float | None = None
    late: Mapping[str, str] = field(default_factory=dict)
    in_storm: int = 0
    asked: int = 0
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    ended: list[tuple[float, str]] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    said: Counter[str] = field(default_factory=Counter)
    load: tuple[float, float, float] = (0.0, 0.0, 0.0)
    grown: list[str] = field(default_factory=list)
    baselines: tuple[Baseline, ...] = ()
    took: Mapping[str, list[float]] = field(default_factory=dict)
    unlived: int = 0
    is_finished: bool = False
    history: History = field(default_factory=History)
    there: Snapshot = field(default_factory=Snapshot)

    @property
    def converged_in_time(self) -> bool:
        return self.converged_s is not None and self.converged_s <= CONVERGED_WITHIN_S

    @property
    def is_good(self) -> bool:
        return not self.findings and not self.grown and self.converged_in_time and self.is_finished


class Storm:
    """One storm over one installation. What it writes down goes to `directory`."""

    def __init__(self, plan: Plan, installation: Installation, directory: Path, say: Say) -> None:
        self._plan = plan
        self._house = installation
        self._directory = directory
        self._say = say
        self._dsn = installation.postgres.dsn(OWNER, DATABASE)
        self._lines = house.Lines()
        self._components = house.components(installation)
        self._result = Result(plan)

    async def run(self) -> Result:
        async with AsyncExitStack() as stack:
            await self._lines.open(self._house)
            stack.push_async_callback(self._lines.close)
            await asyncio.to_thread(house.furnish, self._house, self._lines)
            self._components = house.components(self._house)
            stack.push_async_callback(asyncio.to_thread, house.end, self._house, list(self._house.services))
            self._say("everything stands; making projects")
            history = History(stack.enter_context((self._directory / "history.jsonl").open("w")))
            self._result.history = history
            image = "appliance" if self._plan.guests else "tiny"
            clients = await stack.enter_async_context(crowd(self._house, history, image=image, give_up_s=GIVE_UP_S))
            await asyncio.sleep(CALM_BEFORE_S)
            await self._storm(clients)
        return self._result

    async def _storm(self, clients: Clients) -> None:
        plan, result = self._plan, self._result
        began = clients.began = time.monotonic()
        keeper = house.Keeper(self._components, self._directory / "logs", began)
        libvirtd = Libvirtd(self._house.layout.libvirt) if plan.guests else None
        nemesis = Nemesis(plan.faults, self._components, keeper, self._lines, result.history, libvirtd)
        keeping = asyncio.create_task(keeper.run())
        clients.go_on.set()
        living = asyncio.create_task(clients.live_all(plan.lives))
        telling = asyncio.create_task(self._tell(began, living, nemesis))
        try:
            await nemesis.run()
            clients.go_on.clear()
            result.load = os.getloadavg()
            result.in_storm = len(result.history.entries)
            self._say(f"the last fault is over after {time.monotonic() - began:.0f} s; waiting for rest")
            await self._converge(nemesis, clients)
            clients.hurry.set()
            clients.go_on.set()
            await self._finish(living)
            telling.cancel()
            result.asked = len(result.history.entries)
            await self._judge(clients, "converged.json")
            await self._calm_down(clients)
            await self._clear(clients)
        finally:
            for task in (telling, living, keeping):
                task.cancel()
            await asyncio.gather(telling, living, keeping, return_exceptions=True)
            keeper.keep_logs()
            result.done, result.skipped, result.ended = nemesis.done, nemesis.skipped, keeper.ended
            result.gaps = [f"{one.name}: {gap}" for one in clients.watchers for gap in one.gaps]
            result.took, result.unlived = clients.took, len(clients.unlived)
            result.said = keeper.complaints()

    async def _tell(self, began: float, living: "asyncio.Task[None]", nemesis: Nemesis) -> None:
        while True:
            await asyncio.sleep(15)
            asked = len({(e.project, e.request_id) for e in self._result.history.entries if e.request_id})
            faults = f"{sum(nemesis.done.values())} faults, {sum(nemesis.skipped.values())} left out"
            what = "all lives are lived" if living.done() else f"{asked} requests"
            self._say(f"{time.monotonic() - began:6.0f} s  {what}, {faults}")

    async def _converge(self, nemesis: Nemesis, clients: Clients) -> None:
        """Until everything is at rest; notes what it took since the last fault, and what came last."""
        result, deadline = self._result, time.monotonic() + GIVE_UP_S
        while time.monotonic() < deadline:
            late = await self._unrest(clients)
            if not late:
                result.converged_s = time.monotonic() - nemesis.over_at
                self._say(
                    f"at rest {result.converged_s:.1f} s after the last fault; the last was {_words(result.late)}"
                )
                return
            result.late = late
            await asyncio.sleep(0.5)
        self._say(f"no rest after {GIVE_UP_S:.0f} s: {_words(result.late)}")

    async def _finish(self, living: "asyncio.Task[None]") -> None:
        """What was to be asked and was not, since there were too many under way: now, without faults."""
        if not living.done():
            self._say("the rest of the lives, without faults")
        await asyncio.wait({living}, timeout=FINISH_S)
        self._result.is_finished = living.done()
        if living.done():
            living.result()
        await self._until_quiet()

    async def _unrest(self, clients: Clients | None = None) -> dict[str, str]:
        """What is not yet at rest; the dear questions are only asked when the cheap ones are answered."""
        if clients is not None and clients.asking:
            return {"clients": f"do not know what became of {clients.asking} requests"}
        down = [name for name, one in self._components.items() if not await asyncio.to_thread(one.is_ready)]
        if down:
            return {"processes": f"not ready: {', '.join(down)}"}
        try:
            connection = await asyncpg.connect(self._dsn, timeout=5)
        except (OSError, asyncpg.PostgresError, TimeoutError) as error:
            return {"database": str(error)}
        try:
            row = await connection.fetchrow(looking.UNDER_WAY)
        except (OSError, asyncpg.PostgresError) as error:
            return {"database": str(error)}
        finally:
            await connection.close()
        under_way = {name: str(count) for name, count in row.items() if count} if row else {}
        if under_way:
            return under_way
        waiting = [
            queue
            for queue in await asyncio.to_thread(looking.queues, self._house.rabbit)
            if queue.messages and queue.name in {"leveret.conductor.requests", "leveret.conductor.reports"}
        ]
        return {queue.name: f"{queue.messages} messages" for queue in waiting}

    async def _judge(self, clients: Clients, name: str) -> None:
        """Look at everything, and hold it against the history so far."""
        check = await self._check()
        await self._catch_up(clients)
        there = await looking.take(
            self._house.layout,
            self._dsn,
            self._house.rabbit,
            check=check,
            watched=tuple(watcher.told() for watcher in clients.watchers),
            client_queues=client_queues(),
        )
        there = there.model_copy(update={"entries": len(self._result.history.entries)})
        (self._directory / name).write_text(there.model_dump_json(indent=1))
        self._result.there = there
        found = judge(self._result.history.entries, there)
        self._result.findings += found
        self._say(f"{name.removesuffix('.json')}: {len(there.vms)} VMs, {len(found)} findings")
        for finding in found[:20]:
            self._say(f"  {finding}")

    async def _check(self) -> Check:
        """What Leveret says of itself. An answer that is not had is a finding, and not the end of the storm."""
        try:
            async with self._house.client() as client:
                return await looking.check(client)
        except ClientError as error:
            return Check(unchecked=(f"no report: {error}",))

    async def _catch_up(self, clients: Clients) -> None:
        """Return when the watchers have heard the newest event, or had time for it."""
        connection = await asyncpg.connect(self._dsn)
        try:
            rows = await connection.fetch("SELECT id, last_seq FROM projects")
        finally:
            await connection.close()
        newest = {row["id"]: row["last_seq"] for row in rows}
        deadline = time.monotonic() + CATCH_UP_S
        while not all(one.seqs and one.seqs[-1] >= newest[one.project] for one in clients.watchers):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.2)

    async def _calm_down(self, clients: Clients) -> None:
        """The same quiet round three times: what the third leaves behind, the second should have left too."""
        measured = []
        first, lives = len(self._plan.lives), self._plan.round_lives
        for number in range(1, 4):
            await clients.live_all(calm(number, first + number * lives, lives))
            await self._until_quiet()
            measured.append(await baseline.measure(self._components, self._house.rabbit))
        self._result.baselines = tuple(measured)
        self._result.grown = baseline.grown(measured[1], measured[2], set(self._house.services))
        (self._directory / "baselines.json").write_text(json.dumps([asdict(one) for one in measured], indent=1))
        self._say(f"quiet rounds: {'; '.join(self._result.grown) or 'nothing has grown'}")

    async def _clear(self, clients: Clients) -> None:
        """Delete everything: then nothing may be left."""
        alive = {vm.id: vm.project for vm in self._result.there.vms if vm.state != "deleted"}
        await clients.clear(alive)
        await self._until_quiet()
        await self._judge(clients, "empty.json")

    async def _until_quiet(self) -> None:
        """Until everything is at rest, or has had time for it: what is not is found by whoever looks next."""
        deadline = time.monotonic() + 60
        while await self._unrest():
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.5)


def _words(what: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {word}" for name, word in what.items()) or "nothing"
