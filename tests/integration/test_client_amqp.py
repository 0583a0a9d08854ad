"""The AMQP class of the client: a broker user with a client's rights, a real conductor, a real broker."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import pytest
from conductor_world import World
from peers import Host, eventually, tiny
from proxy import Proxy

from leveret.client import (
    ApiError,
    Conflict,
    CreateGroup,
    Denied,
    EventGap,
    Invalid,
    LeveretAmqp,
    Missing,
    Placement,
    Unreachable,
    UpdateVm,
    VmFailed,
    WaitTimedOut,
    new_id,
    own_queue,
)
from leveret.shared import topology
from leveret.shared.documents import DeleteVm
from leveret.shared.errors import Code, Problem
from leveret.shared.lifecycle import Observed, State, Wanted
from leveret.shared.messages import CloudEvent, encode
from leveret.stack.client_permissions import client_permissions
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration


class Clients:
    """Broker users as an administrator makes them for clients."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rabbit = world.rabbit

    async def user(self, *, project: str = "default", role: str = "member") -> str:
        """The URL of a new one that speaks for this project."""
        name = f"app-{uuid.uuid4().hex[:8]}"
        rights = client_permissions(name, project, role)  # type: ignore[arg-type]
        url = self.rabbit.create_user(name, configure=rights.configure, write=rights.write, read=rights.read)
        await self.world.db.execute("INSERT INTO amqp_users VALUES ($1, $2, $3)", name, project, role)
        return url


@pytest.fixture
async def clients(world: World) -> Clients:
    await world.conductor.relay.furnish_once()
    return Clients(world)


@pytest.fixture
async def host(world: World) -> AsyncIterator[Host]:
    host = Host(world.rabbit)
    async with world.hosts(host):
        yield host


async def run(host: Host, vm_id: uuid.UUID, *, guest_ready: bool = False) -> None:
    """Let the host do what it was told to."""
    command = await host.command(vm_id, lambda c: c.wanted is Wanted.RUNNING)
    await host.say(host.seen(command, Observed.RUNNING, guest_ready=guest_ready))


async def test_a_client_gets_a_vm_and_sees_its_whole_life(clients: Clients, host: Host) -> None:
    async with LeveretAmqp(await clients.user(), "default") as leveret:
        receipt = await leveret.create(tiny("web"))
        assert (receipt.verdict, receipt.state, receipt.name) == ("accepted", "building", "web")
        assert str(receipt.address) == "10.80.0.2"
        waiting = asyncio.create_task(leveret.wait(receipt.vm_id, "ready", timeout_s=10))
        await run(host, receipt.vm_id, guest_ready=True)
        sight = await waiting
        assert (sight.name, sight.state, sight.guest_ready) == ("web", State.RUNNING, True)

        labelled = await leveret.update(receipt.vm_id, UpdateVm(labels={"role": "db"}))
        assert labelled.verdict == "accepted"
        rebooted = await leveret.reboot(receipt.vm_id)
        assert rebooted.generation == 2
        command = await host.command(receipt.vm_id, lambda c: c.restarts == 1)
        await host.say(host.seen(command, Observed.RUNNING, guest_ready=True))
        await leveret.wait(receipt.vm_id, "running", timeout_s=10)

        await leveret.delete(receipt.vm_id)
        gone = await host.command(receipt.vm_id, lambda c: c.wanted is Wanted.ABSENT)
        await host.say(host.seen(gone, Observed.ABSENT))
        assert (await leveret.wait(receipt.vm_id, "deleted", timeout_s=10)).state is State.DELETED


async def test_a_request_that_is_sent_again_is_carried_out_once(clients: Clients, host: Host) -> None:
    async with LeveretAmqp(await clients.user(), "default", waits=False) as leveret:
        vm_id, request_id = new_id(), "my-own-1"
        for _ in range(3):
            assert (await leveret.create(tiny("web"), vm_id=vm_id)).vm_id == vm_id
        await run(host, vm_id)
        await clients.world.until(vm_id, State.RUNNING)
        generations = [(await leveret.reboot(vm_id, request_id=request_id)).generation for _ in range(3)]
        assert generations == [2, 2, 2]
        assert (await clients.world.row(vm_id))["restarts"] == 1


async def test_refusals_are_the_errors_of_rest(clients: Clients, host: Host) -> None:
    async with LeveretAmqp(await clients.user(), "default", waits=False) as leveret:
        with pytest.raises(Missing) as missing:
            await leveret.start(new_id())
        assert (missing.value.status, missing.value.code) == (404, "vm_not_found")
        assert missing.value.hint
        vm_id = (await leveret.create(tiny("web"))).vm_id
        with pytest.raises(Conflict) as taken:
            await leveret.create(tiny("web"))
        assert taken.value.code == "name_taken"
        with pytest.raises(Conflict) as stale:
            await leveret.delete(vm_id, if_match=7)
        assert (stale.value.status, stale.value.code) == (412, "precondition_failed")
        with pytest.raises(Invalid):
            await leveret.update(vm_id, UpdateVm(labels={f"key-{n}": "x" for n in range(40)}))


async def test_a_dry_run_tells_and_claims_nothing(clients: Clients, host: Host) -> None:
    async with LeveretAmqp(await clients.user(), "default", waits=False) as leveret:
        assert (await leveret.create(tiny("web"), dry_run=True)).verdict == "would_be_accepted"
        assert await clients.world.db.fetchval("SELECT count(*) FROM vms") == 0
        with pytest.raises(Conflict) as caught:
            await leveret.create(tiny("web").model_copy(update={"vcpus": 200}), dry_run=True)
        assert caught.value.code == "no_capacity"


async def test_a_reader_follows_and_may_not_ask(clients: Clients, host: Host) -> None:
    url = await clients.user(role="reader")
    async with LeveretAmqp(url, "default", retry_for_s=5) as leveret, aclosing(leveret.watch()) as events:
        with pytest.raises(Denied) as caught:
            await leveret.create(tiny("web"))
        assert caught.value.code == "forbidden"
        vm_id = new_id()
        waiting = asyncio.create_task(leveret.wait(vm_id, "running", timeout_s=10))
        await clients.world.gateway.ask(vm_id, tiny("web"))
        await run(host, vm_id)
        assert (await waiting).name == "web"
        getting = asyncio.ensure_future(anext(events))
        await clients.world.gateway.ask(vm_id, DeleteVm())
        assert (await getting).vm_id == vm_id


async def test_another_projects_events_are_not_to_be_had(clients: Clients) -> None:
    async with LeveretAmqp(await clients.user(project="other"), "default", waits=False) as leveret:
        with pytest.raises(Denied) as caught:
            await anext(leveret.watch())
        assert caught.value.code == "forbidden"


async def test_a_broker_user_that_nobody_lets_speak_is_refused(clients: Clients, world: World) -> None:
    url = await clients.user()
    await world.db.execute("DELETE FROM amqp_users")
    async with LeveretAmqp(url, "default", waits=False) as leveret:
        with pytest.raises(Denied) as caught:
            await leveret.create(tiny("web"))
    assert caught.value.code == "forbidden"


async def test_a_wrong_password_is_told_at_once(clients: Clients) -> None:
    url = await clients.user()
    wrong = url.replace(f":{urlsplit(url).password}@", ":wrong-secret@")
    async with asyncio.timeout(10), LeveretAmqp(wrong, "default", retry_for_s=60) as leveret:
        for asking in (
            leveret.create(tiny("web")),
            anext(leveret.watch()),
            leveret.wait(new_id(), "running", timeout_s=60),
        ):
            with pytest.raises(Denied) as caught:
                await asking
            assert (caught.value.status, caught.value.code) == (401, "unauthenticated")
            assert "secret" not in str(caught.value)


async def test_a_virtual_host_that_is_not_there_is_told_apart_from_a_broker_that_is_not(clients: Clients) -> None:
    url = urlsplit(await clients.user())._replace(path="/elsewhere").geturl()
    async with LeveretAmqp(url, "default", waits=False, retry_for_s=1) as leveret:
        with pytest.raises(Unreachable, match="virtual host"):
            await leveret.create(tiny("web"))


async def test_a_wait_for_a_request_does_not_go_by_what_was_before_it(clients: Clients, host: Host) -> None:
    async with LeveretAmqp(await clients.user(), "default") as leveret:
        vm_id = (await leveret.create(tiny("web"))).vm_id
        await run(host, vm_id, guest_ready=True)
        await leveret.wait(vm_id, "running", timeout_s=10)
        waiting = asyncio.create_task(leveret.wait(await leveret.reboot(vm_id), "running", timeout_s=10))
        command = await host.command(vm_id, lambda c: c.restarts == 1)
        assert not waiting.done()
        await host.say(host.seen(command, Observed.RUNNING, guest_ready=True))
        assert (await waiting).state is State.RUNNING
        again = await leveret.wait(await leveret.start(vm_id), "running", timeout_s=10)  # it changes nothing
        assert again.state is State.RUNNING


async def test_a_queued_request_is_asked_again_until_it_is_judged(feed: "Feed") -> None:
    url = feed.follower(role="member")
    async with LeveretAmqp(url, feed.project, verdict_wait_s=0.1) as leveret:
        asked = await leveret.start(new_id())
        assert asked.verdict == "queued"
        with pytest.raises(WaitTimedOut, match="still queued"):
            await leveret.wait(asked, "running", timeout_s=1.0)
        with pytest.raises(ValueError, match="runing"):
            await leveret.wait(asked, "runing", timeout_s=1.0)  # type: ignore[arg-type]


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_trace_goes_along_with_a_request(clients: Clients, host: Host) -> None:
    async with LeveretAmqp(await clients.user(), "default", waits=False) as leveret:
        vm_id = (await leveret.create(tiny("web"), traceparent=TRACEPARENT)).vm_id
        await leveret.update(vm_id, UpdateVm(labels={"a": "b"}), if_match="*", traceparent=TRACEPARENT)
        with pytest.raises(ValueError, match="traceparent"):
            await leveret.delete(vm_id, traceparent="00-0")
    rows = await clients.world.db.fetch("SELECT type, data FROM events WHERE vm_id = $1", vm_id)
    told = {row["type"]: json.loads(row["data"]) if isinstance(row["data"], str) else row["data"] for row in rows}
    assert told["accepted"]["traceparent"] == told["changed"]["traceparent"] == TRACEPARENT


async def test_nobody_there_is_unreachable_and_tells_no_password() -> None:
    async with LeveretAmqp("amqp://app:secret@127.0.0.1:1/leveret", "default", waits=False, retry_for_s=0.3) as leveret:
        with pytest.raises(Unreachable) as caught:
            await leveret.create(tiny("web"))
        assert "secret" not in str(caught.value)
        with pytest.raises(Unreachable) as caught:
            await anext(leveret.watch(give_up_s=0.3))
        assert "secret" not in str(caught.value)


async def test_a_wait_ends_with_the_refusal_of_a_build(clients: Clients, host: Host) -> None:
    async with LeveretAmqp(await clients.user(), "default") as leveret:
        vm_id = (await leveret.create(tiny("web"))).vm_id
        await host.fails(await host.command(vm_id), Problem.of(Code.IMAGE_HASH_MISMATCH, "It is another file."))
        with pytest.raises(VmFailed, match="another file") as caught:
            await leveret.wait(vm_id, "running", timeout_s=10)
        assert caught.value.vm.problem is not None


async def test_a_wait_for_a_vm_that_another_made_begins_with_how_it_stands(clients: Clients, host: Host) -> None:
    vm_id = new_id()
    await clients.world.gateway.ask(vm_id, tiny("web"))
    await run(host, vm_id)
    await clients.world.until(vm_id, State.RUNNING)
    await asyncio.sleep(0)
    async with LeveretAmqp(await clients.user(), "default") as leveret:
        assert (await leveret.wait(vm_id, "running", timeout_s=10)).name == "web"
        with pytest.raises(WaitTimedOut, match="still running"):
            await leveret.wait(vm_id, "stopped", timeout_s=0.1)


class Feed:
    """A project's events as a relay publishes them, without a conductor behind it."""

    def __init__(self, rabbit: Rabbit, channel: aio_pika.abc.AbstractChannel) -> None:
        self._rabbit = rabbit
        self._channel = channel
        # One of its own: the queues of other tests' users are bound to their projects, and stay.
        self.project = f"watched-{uuid.uuid4().hex[:8]}"
        self.exchange: aio_pika.abc.AbstractExchange | None = None

    async def open(self) -> None:
        about = topology.events_exchange(self.project)
        self.exchange = await self._channel.declare_exchange(about.name, about.kind, durable=True)

    def follower(self, *, role: str = "reader") -> str:
        """The URL of a new user that may follow it."""
        name = f"app-{uuid.uuid4().hex[:8]}"
        rights = client_permissions(name, self.project, role)  # type: ignore[arg-type]
        return self._rabbit.create_user(name, configure=rights.configure, write=rights.write, read=rights.read)

    async def tell_when_bound(self, seq: int, *, vm_id: uuid.UUID | None = None) -> None:
        """Tell it as soon as somebody's queue takes it."""

        async def is_taken() -> bool:
            try:
                await self.tell(seq, vm_id=vm_id, mandatory=True)
            except aio_pika.exceptions.DeliveryError:
                return False
            return True

        await eventually(is_taken, what="a queue bound")

    async def tell(self, *numbers: int, vm_id: uuid.UUID | None = None, mandatory: bool = False) -> None:
        assert self.exchange is not None
        for seq in numbers:
            of = vm_id or new_id()
            event = CloudEvent(
                specversion="1.0",
                id=f"{self.project}-{seq}",
                source=f"/v1/projects/{self.project}",
                type="leveret.vm.running.v1",
                subject=str(of),
                time="2026-11-22T08:00:00+00:00",
                datacontenttype="application/json",
                sequence=str(seq),
                data={"vm_id": str(of), "name": "web", "state": "running", "steps": []},
            )
            message = aio_pika.Message(
                encode(event),
                type="vm.event.v1",
                content_type="application/json",
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            await self.exchange.publish(message, routing_key=f"vm.{of}.running", mandatory=mandatory)


@pytest.fixture
async def feed(broker: Rabbit) -> AsyncIterator[Feed]:
    connection = await aio_pika.connect(broker.url)
    async with connection:
        feed = Feed(broker, await connection.channel(on_return_raises=True))
        await feed.open()
        yield feed


async def test_a_watcher_has_each_event_once_in_order_however_often_it_is_published(feed: Feed) -> None:
    async with LeveretAmqp(feed.follower(), feed.project, waits=False) as leveret, aclosing(leveret.watch()) as events:
        getting = asyncio.ensure_future(anext(events))
        await feed.tell_when_bound(1)
        await feed.tell(2, 3, 2, 3, 1, 4)
        assert [(await getting).seq, *[(await anext(events)).seq for _ in range(3)]] == [1, 2, 3, 4]


async def test_an_event_is_the_same_as_over_rest(feed: Feed) -> None:
    vm_id = new_id()
    async with LeveretAmqp(feed.follower(), feed.project, waits=False) as leveret, aclosing(leveret.watch()) as events:
        getting = asyncio.ensure_future(anext(events))
        await feed.tell_when_bound(1, vm_id=vm_id)
        event = await getting
    assert (event.seq, event.vm_id, event.vm_name, event.type, event.state) == (1, vm_id, "web", "running", "running")
    assert event.data == {"steps": []}


async def test_what_happens_while_nobody_watches_is_kept(feed: Feed) -> None:
    url = feed.follower()
    assert await first_of(url, feed) == 1
    await feed.tell(2, 3)
    async with LeveretAmqp(url, feed.project, waits=False) as leveret, aclosing(leveret.watch(after=1)) as events:
        assert [(await anext(events)).seq, (await anext(events)).seq] == [2, 3]


async def test_a_watcher_that_is_cut_off_again_and_again_misses_nothing(feed: Feed, rabbit: Rabbit) -> None:
    proxy = Proxy(rabbit.port)
    await proxy.open()
    url = feed.follower().replace(f":{rabbit.port}/", f":{proxy.port}/")
    seen: list[int] = []
    last = 400

    async def look(leveret: LeveretAmqp) -> None:
        async with aclosing(leveret.watch()) as events:
            async for event in events:
                seen.append(event.seq)
                if event.seq == last:
                    return

    async with LeveretAmqp(url, feed.project, waits=False) as leveret:
        looking = asyncio.create_task(look(leveret))
        await feed.tell_when_bound(1)
        for beginning in range(2, last, 100):
            await eventually(partial(_has, seen, beginning // 2), within_s=20)
            await feed.tell(*range(beginning, beginning + 50))
            proxy.cut()
            await feed.tell(*range(beginning + 50, min(beginning + 100, last + 1)))
        async with asyncio.timeout(30):
            await looking
    await proxy.close()
    assert seen == list(range(1, last + 1))


def _has(seen: list[int], least: int) -> bool:
    return len(seen) >= least


async def test_a_watcher_outlasts_a_restart_of_the_broker(run_dir: Path) -> None:
    broker = Rabbit(run_dir / "rabbitmq-restarted")
    admin = broker.create_user("admin", configure=".*", write=".*", read=".*")
    try:
        broker.start()
        await asyncio.to_thread(broker.wait_ready)
        async with await aio_pika.connect(admin) as connection:
            feed = Feed(broker, await connection.channel(on_return_raises=True))
            await feed.open()
            client = LeveretAmqp(await asyncio.to_thread(feed.follower), feed.project, waits=False)
            async with client as leveret, aclosing(leveret.watch()) as events:
                getting = asyncio.ensure_future(anext(events))
                await feed.tell_when_bound(1)
                await feed.tell(2)
                assert (await getting).seq == 1
                await asyncio.to_thread(broker.stop)
                broker.start()
                await asyncio.to_thread(broker.wait_ready)
                assert (await anext(events)).seq == 2
                async with await aio_pika.connect(admin) as renewed:
                    feed.exchange = await (await renewed.channel()).get_exchange(f"leveret.events.{feed.project}")
                    await feed.tell(3)
                    assert (await anext(events)).seq == 3
    finally:
        await asyncio.to_thread(broker.destroy)


async def test_a_gap_in_the_numbers_is_an_error_and_nothing_else_is_lost(feed: Feed) -> None:
    url = feed.follower()
    assert await first_of(url, feed) == 1
    await feed.tell(2, 5, 6)
    async with LeveretAmqp(url, feed.project, waits=False) as leveret:
        async with aclosing(leveret.watch(after=1)) as events:
            assert (await anext(events)).seq == 2
            with pytest.raises(EventGap) as caught:
                await anext(events)
        assert (caught.value.after, caught.value.until) == (2, 4)
        async with aclosing(leveret.watch(after=caught.value.until)) as events:
            assert [(await anext(events)).seq, (await anext(events)).seq] == [5, 6]


async def test_a_queue_that_ran_over_says_what_it_dropped(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(own_queue._CLASSIC, "x-max-length", 10)
    url = feed.follower()
    assert await first_of(url, feed) == 1
    await feed.tell(*range(2, 31))
    gaps: list[EventGap] = []
    async with (
        LeveretAmqp(url, feed.project, waits=False) as leveret,
        aclosing(leveret.watch(after=1, on_gap=gaps.append)) as events,
    ):
        seen = [(await anext(events)).seq]
        while seen[-1] < 30:
            seen.append((await anext(events)).seq)
    (gap,) = gaps
    assert gap.after == 1
    assert seen == list(range(gap.until + 1, 31))
    assert len(seen) <= 11


async def test_what_cannot_be_read_is_skipped_and_counts_as_lost(feed: Feed) -> None:
    url = feed.follower()
    assert await first_of(url, feed) == 1
    assert feed.exchange is not None
    for body, kind in ((b"{", "vm.event.v1"), (b"{}", "no.such.v1"), (b"{}", "vm.event.v1")):
        message = aio_pika.Message(body, type=kind, content_type="application/json")
        await feed.exchange.publish(message, routing_key="vm.x.running")
    await feed.tell(3)
    async with LeveretAmqp(url, feed.project, waits=False) as leveret, aclosing(leveret.watch(after=1)) as events:
        with pytest.raises(EventGap):
            await anext(events)


async def test_one_vm_can_be_watched_alone(feed: Feed) -> None:
    vm_id = new_id()
    async with (
        LeveretAmqp(feed.follower(), feed.project, waits=False) as leveret,
        aclosing(leveret.watch(vm_id)) as events,
    ):
        getting = asyncio.ensure_future(anext(events))
        await feed.tell_when_bound(1, vm_id=vm_id)
        await feed.tell(2, 3)
        await feed.tell(4, vm_id=vm_id)
        assert [(await getting).seq, (await anext(events)).seq] == [1, 4]


async def test_a_request_without_a_verdict_is_queued_and_may_be_asked_again(feed: Feed) -> None:
    url = feed.follower(role="member")
    async with LeveretAmqp(url, feed.project, waits=False, verdict_wait_s=0.2) as leveret:
        first = await leveret.create(tiny("web"))
        assert (first.verdict, first.vm) == ("queued", None)
        again = await leveret.create(tiny("web"), vm_id=first.vm_id, request_id=first.request_id)
        assert (again.vm_id, again.request_id) == (first.vm_id, first.request_id)
        impatient = LeveretAmqp(url, feed.project, waits=False, verdict_wait_s=0.2, retry_for_s=0.5)
        async with impatient:
            with pytest.raises(ApiError) as caught:
                await impatient.create(tiny("web"), dry_run=True)
        assert caught.value.code == "unavailable"


async def test_requests_through_a_broker_that_comes_and_goes_are_carried_out_once(
    clients: Clients, host: Host, world: World
) -> None:
    proxy = Proxy(world.rabbit.port)
    await proxy.open()
    url = (await clients.user()).replace(f":{world.rabbit.port}/", f":{proxy.port}/")
    async with LeveretAmqp(url, "default", waits=False, verdict_wait_s=0.5) as leveret:
        wanted = [new_id() for _ in range(6)]
        asking = asyncio.gather(*(leveret.create(tiny(), vm_id=vm_id) for vm_id in wanted))
        proxy.cut()
        await asyncio.sleep(0.05)
        proxy.cut()
        receipts = await asking
        assert {receipt.vm_id for receipt in receipts} == set(wanted)
        rows = await world.db.fetch("SELECT id FROM vms")
        assert {row["id"] for row in rows} <= set(wanted)
        await eventually(lambda: _count(world, len(wanted)), what="all of them")
    await proxy.close()


async def _count(world: World, count: int) -> bool:
    return bool(await world.db.fetchval("SELECT count(*) = $1 FROM vms", count))


async def first_of(url: str, feed: Feed) -> int:
    """Watch, have event 1 told, take it, and leave."""
    async with LeveretAmqp(url, feed.project, waits=False) as leveret, aclosing(leveret.watch()) as events:
        getting = asyncio.ensure_future(anext(events))
        await feed.tell_when_bound(1)
        return (await getting).seq


async def test_several_are_made_at_once_in_a_group_and_waited_for_together(clients: Clients, host: Host) -> None:
    async with LeveretAmqp(await clients.user(), "default") as leveret:
        group = CreateGroup(name="web", enforcement="soft")
        await leveret.create_group(group)
        await leveret.create_group(group)
        with pytest.raises(Conflict, match="name_taken"):
            await leveret.create_group(CreateGroup(name="web", policy="pack"))
        wish = tiny("web").model_copy(update={"count": 2, "placement": Placement(group="web")})
        receipt = await leveret.create(wish, vm_id=(request := new_id()))
        assert (receipt.vm_id, receipt.count, receipt.name) == (request, 2, None)
        assert [(one.id, one.name, one.state) for one in receipt.made] == [
            (vm_id, f"web-{number}", State.BUILDING) for number, vm_id in enumerate(receipt.vm_ids, start=1)
        ]
        assert [str(one.address) for one in receipt.made] == ["10.80.0.2", "10.80.0.3"]
        again = await leveret.create(wish, vm_id=request)
        assert [one.id for one in again.made] == [one.id for one in receipt.made]
        with pytest.raises(ValueError, match="wait_all"):
            await leveret.wait(receipt, "running", timeout_s=1)
        waiting = asyncio.create_task(leveret.wait_all(receipt, "running", timeout_s=10))
        for vm_id in receipt.vm_ids:
            await run(host, vm_id)
        assert [(sight.name, sight.state) for sight in await waiting] == [
            ("web-1", State.RUNNING),
            ("web-2", State.RUNNING),
        ]
        with pytest.raises(Conflict, match="group_in_use"):
            await leveret.delete_group("web")
        with pytest.raises(Missing, match="group_not_found"):
            await leveret.delete_group("nobody")
        with pytest.raises(Denied, match="forbidden"):
            await leveret.create(tiny("x").model_copy(update={"placement": Placement(hosts=("h1",))}))
        with pytest.raises(Invalid, match="group_unknown"):
            await leveret.create(tiny("x").model_copy(update={"placement": Placement(group="nobody")}))
