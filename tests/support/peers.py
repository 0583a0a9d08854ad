"""Peers that speak Leveret's messages over the real broker, so that tests can say and hear exactly what they want."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel

from leveret.shared import topology
from leveret.shared.bus import DONE, Caller, Consumer, Delivery, Furniture, Link, Outcome, Publisher
from leveret.shared.documents import CreateVm, ImageByName
from leveret.shared.errors import Problem
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Observed
from leveret.shared.messages import (
    CONTENT_TYPE,
    TYPE_OF,
    Capacity,
    DesiredVm,
    Heartbeat,
    HostReport,
    Verdict,
    VmReport,
    decode,
    digest_of,
    encode,
)
from leveret.stack.rabbitmq import Rabbit


async def eventually(check: Callable[[], Any], *, within_s: float = 10.0, what: str = "") -> Any:
    """The first true answer of `check` (plain or async); fails when there is none in time."""
    deadline = time.monotonic() + within_s
    while True:
        answer = check()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"never became true: {what or check}"
        await asyncio.sleep(0.02)


def tiny(name: str | None = None, **more: Any) -> CreateVm:
    """The smallest request: one VM of the registered image."""
    return CreateVm(name=name, vcpus=1, memory_mib=128, disk_gib=1, image=ImageByName(name="tiny"), **more)


def as_delivery(message: BaseModel) -> Delivery:
    """A message as a handler gets it."""
    return Delivery(
        queue="test",
        body=encode(message),
        type=TYPE_OF[type(message)],
        content_type=CONTENT_TYPE,
        headers={},
        message_id=None,
        user_id="leveret-compute",
        reply_to=None,
        correlation_id=None,
    )


class Asker:
    """Asks over the bus, as one broker user."""

    def __init__(self, rabbit: Rabbit, user: str) -> None:
        self._caller = Caller(user)
        self.publisher = self._caller.publisher
        self.link = Link(rabbit.url_of(user), f"test-{user}")
        self.link.add(self._caller)

    async def ask_with(self, message: BaseModel, headers: dict[str, Any], *, wait_s: float = 10.0) -> Verdict:
        """The verdict on a message with these headers and no others; fails when none comes."""
        verdict = await self._caller.ask(
            topology.REQUESTS.name, TYPE_OF[type(message)], message, headers=headers, wait_s=wait_s
        )
        assert isinstance(verdict, Verdict), verdict
        return verdict

    async def ask(self, vm_id: uuid.UUID, message: BaseModel, **headers: Any) -> Verdict:
        """The verdict on a request about a VM."""
        return await self.ask_with(message, {"vm_id": str(vm_id), "request_id": new_id().hex} | headers)


class Gateway(Asker):
    """Asks for VMs as the API does, on behalf of any project."""

    def __init__(self, rabbit: Rabbit) -> None:
        super().__init__(rabbit, "leveret-api")
        self.link.add(Furniture())

    async def ask(
        self, vm_id: uuid.UUID, message: BaseModel, *, request_id: str | None = None, **headers: Any
    ) -> Verdict:
        named = {"request_id": request_id or new_id().hex, "requested_at": str(time.time()), "project": "default"}
        return await super().ask(vm_id, message, **named | headers)

    async def order(self, message: BaseModel, *, project: str = "default", actor: str = "token admin") -> Verdict:
        """The verdict on an administrator's order."""
        return await self.ask_with(message, {"project": project, "actor": actor, "request_id": new_id().hex})


class Host:
    """A host that does nothing by itself: it hears commands, and says what the test tells it to."""

    def __init__(self, rabbit: Rabbit, *, name: str = "h1", zone: str = "z1", size: Capacity | None = None) -> None:
        self.id = uuid.uuid4()
        self.name = name
        self.zone = zone
        self.labels: dict[str, str] = {}
        self.taints: dict[str, str] = {}
        self.vms_max: int | None = None
        self.images: tuple[str, ...] = ()
        self.size = size or Capacity(vcpus=8, memory_mib=8192, disk_gib=100)
        self.epoch = 1
        self.seq = 0
        self.heard: list[DesiredVm] = []
        self.lists_asked = 0
        queue = topology.host_queue(self.id)
        self._publisher = Publisher("leveret-compute")
        self.link = Link(rabbit.url_of("leveret-compute"), f"test-host-{name}")
        self.link.add(Furniture((*topology.CORE_QUEUES, queue)))
        self.link.add(self._publisher)
        self.consumer = Consumer(self.link, queue, self._hear, self._publisher)

    async def _hear(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        for delivery in batch:
            message = decode(delivery.type, delivery.body)
            if isinstance(message, DesiredVm):
                self.heard.append(message)
            else:
                self.lists_asked += 1
        return [DONE] * len(batch)

    async def beat(self, *settled: tuple[uuid.UUID, int, int, str]) -> None:
        """Send a heartbeat, with the digest of these settled VMs."""
        beat = Heartbeat(
            host_id=self.id,
            epoch=self.epoch,
            name=self.name,
            zone=self.zone,
            labels=self.labels,
            taints=self.taints,
            vms_max=self.vms_max,
            images=self.images,
            virt_type="simulated",
            total=self.size,
            placeable=self.size,
            digest=digest_of(list(settled)),
            version="test",
        )
        await self._publisher.publish(topology.HEARTBEATS.name, "heartbeat", beat)

    async def command(self, vm_id: uuid.UUID, check: Callable[[DesiredVm], bool] = lambda _: True) -> DesiredVm:
        """The newest command for a VM that passes the check, once it has come."""
        found: DesiredVm = await eventually(
            lambda: next((c for c in reversed(self.heard) if c.vm_id == vm_id and check(c)), None),
            what=f"command for {vm_id}",
        )
        return found

    def seen(self, command: DesiredVm, observed: Observed, *, settled: bool = True, **more: Any) -> VmReport:
        """A report about the VM of a command."""
        self.seq += 1
        return VmReport(
            vm_id=command.vm_id,
            token=more.pop("token", command.token),
            generation=more.pop("generation", command.generation),
            seq=more.pop("seq", self.seq),
            observed=observed,
            settled=settled,
            **more,
        )

    async def say(self, *reports: VmReport, complete: bool = False) -> None:
        """Send reports, as one message."""
        message = HostReport(host_id=self.id, epoch=self.epoch, seq=self.seq, complete=complete, vms=reports)
        await self._publisher.publish(topology.REPORTS.name, "report", message)

    async def fails(self, command: DesiredVm, problem: Problem) -> None:
        """Report that a build failed and was cleaned up."""
        await self.say(self.seen(command, Observed.ABSENT, problem=problem))


@asynccontextmanager
async def up(*peers: Asker | Host) -> AsyncIterator[None]:
    """These peers, connected."""
    for peer in peers:
        peer.link.start()
        if isinstance(peer, Host):
            peer.consumer.start()
    try:
        for peer in peers:
            assert await peer.link.wait_up(20)
        yield
    finally:
        for peer in peers:
            if isinstance(peer, Host):
                await peer.consumer.stop(1)
            await peer.link.stop()
