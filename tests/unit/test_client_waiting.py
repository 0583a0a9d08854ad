"""Waits of the client: what they look at, what they listen to, and when they end."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

import pytest
from peers import eventually

from leveret.client.errors import ApiError, Unreachable, VmFailed, WaitTimedOut, refusal
from leveret.client.waiting import Wait
from leveret.shared.documents import EventView, VmView
from leveret.shared.waiting import Target

pytestmark = pytest.mark.unit

VM_ID = uuid.UUID("0192f0c1-0000-7000-8000-000000000001")
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


class Story:
    """A VM whose life the test tells: its row, and the events of it."""

    def __init__(self) -> None:
        self.vm: VmView | None = None
        self.refusal: ApiError | None = None
        self.looks = 0
        self.events: asyncio.Queue[EventView | Exception] = asyncio.Queue()
        self.heard: list[str] = []
        self.is_heard = False
        self.is_queued = False
        self.verdict: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def is_now(self, state: str, **more: Any) -> None:
        shape = {"id": VM_ID, "project": "default", "name": "web", "state": state, "step": None, "desired": "running"}
        sizes = {"vcpus": 1, "memory_mib": 128, "disk_gib": 1, "attempts": 1, "generation": 1, "observed_generation": 1}
        nothing = dict.fromkeys(("address", "mac", "ssh", "host", "zone", "problem"))
        rest = {"image": "tiny", "network": "default", "labels": {}, "guest_ready": False}
        times = {"created_at": NOON, "updated_at": NOON}
        self.vm = VmView.model_validate(shape | sizes | nothing | rest | times | more)

    def tell(self, kind: str) -> None:
        seq = self.events.qsize() + 1
        state = self.vm.state if self.vm else None
        event = EventView(seq=seq, vm_id=VM_ID, vm_name="web", type=kind, state=state, at=NOON, data={})
        self.events.put_nowait(event)

    async def look(self) -> VmView | None:
        self.looks += 1
        if self.refusal is not None:
            raise self.refusal
        return self.vm

    async def hear(self) -> AsyncGenerator[EventView, None]:
        self.is_heard = True
        try:
            while True:
                event = await self.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.is_heard = False

    async def wait(self, target: Target, *, timeout_s: float = 5.0, watched: bool = True) -> VmView:
        told = (lambda event: self.heard.append(event.type)) if watched else None
        return await Wait(target, judged=self.judged, look=self.look, hear=self.hear, on_event=told).outcome(timeout_s)

    async def judged(self) -> int:
        """Every request has its verdict, unless the test said that it is queued."""
        return await self.verdict if self.is_queued else 0


async def test_a_wait_ends_with_the_event_that_reaches_it() -> None:
    story = Story()
    story.is_now("building", observed_generation=0)
    story.tell("accepted")
    waiting = asyncio.create_task(story.wait("running"))
    await eventually(lambda: story.heard)
    story.is_now("running")
    story.tell("running")
    assert (await waiting).state == "running"
    assert story.heard == ["accepted", "running"]
    assert not story.is_heard


async def test_nobody_listens_for_what_is_there_already() -> None:
    story = Story()
    story.is_now("running")
    assert (await story.wait("running", watched=False)).name == "web"
    assert story.looks == 1


async def test_who_watches_a_wait_hears_its_last_event_too() -> None:
    story = Story()
    story.is_now("running")
    waiting = asyncio.create_task(story.wait("running"))
    await eventually(lambda: story.is_heard)
    story.tell("accepted")
    story.tell("running")
    await waiting
    assert story.heard == ["accepted", "running"]


async def test_who_watches_a_failure_hears_it_told() -> None:
    story = Story()
    story.is_now("error")
    story.tell("accepted")
    story.tell("build_failed")
    story.tell("error")
    with pytest.raises(VmFailed):
        await story.wait("running")
    assert story.heard == ["accepted", "build_failed", "error"]


async def test_a_wait_for_a_queued_vm_outlasts_its_absence() -> None:
    story = Story()
    waiting = asyncio.create_task(story.wait("running", watched=False))
    await eventually(lambda: story.looks)
    story.is_now("running")
    assert (await waiting).name == "web"
    assert story.looks == 2


async def test_a_wait_ends_with_the_refusal_of_a_queued_create() -> None:
    story = Story()
    story.refusal = refusal("name_taken", "It is taken.")
    with pytest.raises(ApiError, match="name_taken"):
        await story.wait("running")


async def test_a_wait_that_takes_too_long_says_where_the_vm_stands() -> None:
    story = Story()
    story.is_now("building", observed_generation=0)
    with pytest.raises(WaitTimedOut, match="still building"):
        await story.wait("running", timeout_s=0.05)
    assert not story.is_heard


async def test_a_wait_that_takes_too_long_says_that_the_request_is_queued() -> None:
    with pytest.raises(WaitTimedOut, match="still queued"):
        await Story().wait("running", timeout_s=0.05)


async def test_a_wait_ends_when_nothing_will_be_heard_any_more() -> None:
    story = Story()
    story.is_now("building", observed_generation=0)
    story.events.put_nowait(Unreachable("http://leveret.test", "away"))
    with pytest.raises(Unreachable):
        await story.wait("running")


async def test_a_burst_of_events_is_not_a_burst_of_looks() -> None:
    story = Story()
    story.is_now("building", observed_generation=0)
    for _ in range(100):
        story.tell("progress")
    waiting = asyncio.create_task(story.wait("running"))
    await eventually(lambda: len(story.heard) == 100)
    story.is_now("running")
    story.tell("running")
    await waiting
    assert story.looks < 20


async def test_what_stands_before_the_verdict_says_nothing_about_a_queued_request() -> None:
    """A start that is queued: the VM is stopped, and as far as is known nobody wants it otherwise."""
    story = Story()
    story.is_queued = True
    story.is_now("stopped", desired="stopped")
    waiting = asyncio.create_task(story.wait("running", watched=False))
    await asyncio.sleep(0)
    assert story.looks == 0
    story.verdict.set_result(2)
    await eventually(lambda: story.looks)
    assert not waiting.done()
    story.is_now("running", generation=2, observed_generation=2)
    story.tell("running")
    assert (await waiting).generation == 2


async def test_an_older_wish_that_has_come_true_is_not_the_one_waited_for() -> None:
    story = Story()
    story.is_queued = True
    story.is_now("running")  # a reboot was accepted, and this row is from before it
    story.verdict.set_result(2)
    with pytest.raises(WaitTimedOut, match="still running"):
        await story.wait("running", timeout_s=0.05)


async def test_a_request_that_stays_queued_is_told_as_queued() -> None:
    story = Story()
    story.is_queued = True
    story.is_now("stopped", desired="stopped")
    with pytest.raises(WaitTimedOut, match="still queued"):
        await story.wait("running", timeout_s=0.05)


async def test_nobody_can_wait_for_what_is_no_target() -> None:
    with pytest.raises(ValueError, match="running, ready, stopped, deleted"):
        await Story().wait("runing")  # type: ignore[arg-type]
