"""Clients that live the lives of a workload."""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from chaos.doors import DOCUMENTS, AmqpDoor, Answer, Ask, RestDoor
from chaos.history import Entry, History, Told
from chaos.watcher import Watcher
from chaos.workload import REAL, REAL_AT_ONCE, REAL_LABEL, Door, Life, Step
from leveret.shared.documents import CreateVm, Document, ImageByName, Placement, StopVm, UpdateVm

#: How long a client goes on asking while it does not know, in seconds; then it leaves it at that.
GIVE_UP_S = 150.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.3, 8.0
#: Lives that are lived at the same time: who comes later waits for one to end, as a program with so many workers would.
LIVES_AT_ONCE = 250
#: How long a client waits for its VM to come to rest before it asks for more.
SETTLE_S = 15.0


@dataclass
class Clients:
    """Everybody's clients.

    While `go_on` is not set nobody begins another request; `asking` counts those whose fate is not yet known. When
    `hurry` is set nobody pauses any more.
    """

    history: History
    rest: Mapping[str, Sequence[RestDoor]]
    amqp: Mapping[str, AmqpDoor]
    watchers: Sequence[Watcher]
    image: str
    began: float
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    asking: int = 0
    took: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    unlived: list[Life] = field(default_factory=list)
    _guests: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(REAL_AT_ONCE))
    _chance: random.Random = field(default_factory=random.Random)

    async def live_all(self, lives: Sequence[Life]) -> None:
        """Every life from its time on; returns when all are lived."""
        began = time.monotonic()
        slots = asyncio.Semaphore(LIVES_AT_ONCE)

        async def one(life: Life) -> None:
            try:
                await self._live(life)
            finally:
                slots.release()

        async with asyncio.TaskGroup() as group:
            for life in lives:
                await self._pause(began + life.at_s - time.monotonic())
                await slots.acquire()
                await self.go_on.wait()
                group.create_task(one(life))

    async def clear(self, vm_ids: Mapping[str, str]) -> None:
        """Delete these VMs (by id, with their projects)."""
        async with asyncio.TaskGroup() as group:
            slots = asyncio.Semaphore(50)

            async def one(vm_id: str, project: str) -> None:
                async with slots:
                    life = Life(0, "clear", 0.0, project, Door.REST, vm_id, ())
                    ask = Ask("delete", vm_id, f"clear-{vm_id}", _document(life, "delete", 0, self.image))
                    await self._until_known(life, ask, Step("delete"), {}, 0)

            for vm_id, project in vm_ids.items():
                group.create_task(one(vm_id, project))

    async def _live(self, life: Life) -> None:
        if life.zone == REAL:
            async with self._guests:
                if self.hurry.is_set():
                    self.unlived.append(life)  # no room for its guest was found while the storm lasted
                else:
                    await self._walk(life)
        else:
            await self._walk(life)

    async def _walk(self, life: Life) -> None:
        beside: list[asyncio.Task[None]] = []
        for index, step in enumerate(life.steps):
            await self._pause(step.after_s)
            if step.until_settled:
                await self._watcher(life).until_resting(life.vm_id, SETTLE_S)
            if step.if_error and self._watcher(life).states.get(life.vm_id) != "error":
                continue
            await self.go_on.wait()
            asking = asyncio.create_task(self._ask(life, index, step))
            if step.with_next:
                beside.append(asking)
            else:
                await asking
        await asyncio.gather(*beside)

    async def _ask(self, life: Life, index: int, step: Step) -> None:
        """One request, sent as often at once as the step says, until its fate is known."""
        document, args = _document(life, step.op, index, self.image), _args(step.op, index)
        ask = Ask(step.op, life.vm_id, life.request_id(index), document, life.key if step.op == "create" else None)
        self.asking += 1
        try:
            await asyncio.gather(*(self._until_known(life, ask, step, args, copy) for copy in range(step.times)))
        finally:
            self.asking -= 1

    async def _until_known(self, life: Life, ask: Ask, step: Step, args: dict[str, str], copy: int) -> None:
        began, pause_s, attempt = time.monotonic(), FIRST_PAUSE_S, 0
        while True:
            answer = await self._attempt(life, ask, step, args, copy + attempt)
            is_known = answer.told is Told.FAIL or answer.verdict in {"accepted", "confirmed"}
            if is_known:
                self.took[answer.verdict or "refused"].append(time.monotonic() - began)
            if is_known or time.monotonic() - began > GIVE_UP_S:
                return
            if answer.verdict == "queued":
                pause_s = LONGEST_PAUSE_S  # it is safe, and asking again makes more work for who is behind with it
            await asyncio.sleep(pause_s * self._chance.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            attempt += 1

    async def _attempt(self, life: Life, ask: Ask, step: Step, args: dict[str, str], turn: int) -> Answer:
        """Through another door each time, where there are several: any of them must do."""
        amqp, apis = self.amqp[life.project], self.rest[life.project]
        is_amqp = step.quiet or (ask.key is None and (life.door is Door.AMQP) == (turn % 3 != 2))
        door = amqp if is_amqp else apis[(life.number + turn) % len(apis)]
        asked = Entry(
            at_s=self._now(),
            told=Told.INVOKE,
            call=self.history.call(),
            project=life.project,
            request_id=ask.request_id,
            vm_id=ask.vm_id,
            op=ask.op,
            via=door.name,
            args=args,
        )
        self.history.add(asked)
        answer = await (amqp.tell(ask) if step.quiet else door.attempt(ask))
        self.history.add(
            replace(
                asked,
                at_s=self._now(),
                told=answer.told,
                vm_id=answer.vm_id or ask.vm_id,
                args={},
                verdict=answer.verdict,
                code=answer.code,
                note=answer.note,
            )
        )
        return answer

    def _watcher(self, life: Life) -> Watcher:
        """Whom this life's client goes by: the first that watches its project."""
        return next(watcher for watcher in self.watchers if watcher.project == life.project)

    def _now(self) -> float:
        return round(time.monotonic() - self.began, 4)

    async def _pause(self, seconds: float) -> None:
        if seconds <= 0 or self.hurry.is_set():
            return
        try:
            async with asyncio.timeout(seconds):
                await self.hurry.wait()
        except TimeoutError:
            return


def _args(op: str, index: int) -> dict[str, str]:
    """What the checker must know of a request beside its verb."""
    return {"label": str(index)} if op in {"create", "update"} else {}


def _document(life: Life, op: str, index: int, image: str) -> Document:
    match op:
        case "create":
            return CreateVm(
                name=life.name,
                vcpus=1,
                memory_mib=128,
                disk_gib=1,
                image=ImageByName(name=image if life.zone == REAL else "tiny"),
                labels={"life": f"{life.kind}-{life.number}", "v": str(index)},
                placement=_placement(life.zone),
            )
        case "update":
            return UpdateVm(labels={"v": str(index)})
        case "stop":
            return StopVm(grace_s=0)
        case _:
            return DOCUMENTS[op]()


def _placement(zone: str | None) -> Placement:
    """Only who asks for a real guest gets one."""
    forbidden = {} if zone == REAL else dict(REAL_LABEL)
    return Placement(zones=(zone,) if zone else (), forbid_labels=forbidden)
