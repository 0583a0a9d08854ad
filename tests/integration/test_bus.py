"""The bus on a real broker: what is confirmed is there, what is not done comes again, what is poison is kept."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import aiormq
import pytest
from peers import eventually
from proxy import Proxy

from leveret.shared import topology
from leveret.shared.bus import (
    DONE,
    Consumer,
    Delivery,
    Envelope,
    Furniture,
    Link,
    Outcome,
    Paused,
    Publisher,
    Reject,
    Retry,
    Unroutable,
)
from leveret.shared.bus.link import CONNECT_TIMEOUT_S
from leveret.shared.documents import StartVm
from leveret.shared.errors import Code, LeveretError, Problem
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration

Judge = Callable[[Sequence[Delivery]], Awaitable[Sequence[Outcome]]]


class Bus:
    """A publisher and a consumer of a queue of their own."""

    def __init__(
        self, rabbit: Rabbit, judge: Judge, *, batch_max: int = 50, url: str = "", furnish_every_s: float = 60
    ) -> None:
        key = uuid.uuid4().hex
        self.key = key
        self.queue = topology.Queue(f"leveret.test.{key}", "commands", {"x-expires": 60_000}, ((topology.HOSTS, key),))
        self.publisher = Publisher("leveret-api")
        url = url or rabbit.url_of("leveret-api")
        self.publishing = Link(url, "test-publish")
        self.publishing.add(Furniture())
        self.publishing.add(self.publisher)
        self.consuming = Link(url, "test-consume")
        self.consuming.add(Furniture((*topology.CORE_QUEUES, self.queue), every_s=furnish_every_s))
        self.consumer = Consumer(self.consuming, self.queue, judge, self.publisher, batch_max=batch_max)

    async def put(self, count: int, start: int = 0) -> None:
        await asyncio.gather(*(self._put(n) for n in range(start, start + count)))

    async def takes_again(self) -> bool:
        """Whether a message gets through."""
        try:
            await self.put(1)
        except LeveretError:
            return False
        return True

    async def _put(self, n: int) -> None:
        envelope = Envelope(headers={"n": str(n)})
        await self.publisher.publish(topology.HOSTS.name, self.key, StartVm(), envelope=envelope)


@asynccontextmanager
async def running(bus: Bus) -> AsyncIterator[Bus]:
    bus.publishing.start()
    bus.consuming.start()
    bus.consumer.start()
    try:
        assert await bus.publishing.wait_up(20)
        assert await bus.consuming.wait_up(20)
        yield bus
    finally:
        await bus.consumer.stop(2)
        await bus.consuming.stop()
        await bus.publishing.stop()


async def depth(rabbit: Rabbit, queue: str) -> int:
    """Messages that are ready in a queue: those that a consumer holds come back when it is gone."""
    async with await aio_pika.connect(rabbit.url) as connection:
        channel = await connection.channel()
        declared = await channel.declare_queue(queue, passive=True)
        return declared.declaration_result.message_count or 0


async def test_messages_come_in_batches_and_are_gone_when_done(broker: Rabbit) -> None:
    seen: list[str] = []
    sizes: list[int] = []

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        sizes.append(len(batch))
        seen.extend(delivery.header("n") or "" for delivery in batch)
        await asyncio.sleep(0)
        return [DONE] * len(batch)

    bus = Bus(broker, judge)
    async with running(bus):
        await bus.put(500)
        await eventually(lambda: len(seen) == 500)
    assert sorted(map(int, seen)) == list(range(500))
    assert max(sizes) <= 50
    assert len(sizes) < 500
    assert await depth(broker, bus.queue.name) == 0


async def test_what_is_to_be_retried_comes_again_and_holds_up_nothing(broker: Rabbit) -> None:
    tries: dict[str, int] = {}

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        for delivery in batch:
            n = delivery.header("n") or ""
            tries[n] = tries.get(n, 0) + 1
            outcomes.append(Retry(0.01) if int(n) % 7 == 0 and tries[n] < 3 else DONE)
        return outcomes

    bus = Bus(broker, judge)
    async with running(bus):
        await bus.put(100)
        await eventually(lambda: len(tries) == 100 and sum(tries.values()) == 100 + 2 * 15)
    assert await depth(broker, bus.queue.name) == 0


async def test_poison_is_kept_with_its_reason_and_the_rest_flows(broker: Rabbit) -> None:
    done: list[str] = []

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        for delivery in batch:
            n = delivery.header("n") or ""
            if n == "13":
                raise ZeroDivisionError("a defect")
            if n == "14":
                outcomes.append(Reject(Problem.of(Code.INVALID_REQUEST, "Fourteen is bad.")))
            else:
                outcomes.append(DONE)
        done.extend(delivery.header("n") or "" for delivery in batch)
        return outcomes

    bus = Bus(broker, judge)
    async with running(bus):
        await bus.put(30)
        await eventually(lambda: len(set(done)) == 29)

        async def dead() -> bool:
            return await depth(broker, topology.DEAD_QUEUE.name) == 2

        await eventually(dead)
    assert await depth(broker, bus.queue.name) == 0
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(topology.DEAD_QUEUE.name)
        found: dict[Any, Any] = {}
        for _ in range(2):
            message = await queue.get()
            assert message is not None
            found[message.headers["n"]] = (message.headers["dead_code"], message.headers["dead_queue"], message.body)
            await message.ack()
    assert found == {
        "13": ("handler_crashed", bus.queue.name, b"{}"),
        "14": ("invalid_request", bus.queue.name, b"{}"),
    }


async def test_while_its_store_is_away_a_batch_waits_and_nothing_is_given_back(broker: Rabbit) -> None:
    attempts: list[list[str]] = []
    away = True

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        attempts.append([delivery.header("n") or "" for delivery in batch])
        if away:
            raise Paused("the database is away")
        return [DONE] * len(batch)

    bus = Bus(broker, judge)
    async with running(bus):
        await bus.put(1)
        await eventually(lambda: len(attempts) >= 3)
        assert attempts[0] == attempts[1] == attempts[2] == ["0"]
        away = False
        await bus.put(5, start=1)
        await eventually(lambda: {n for batch in attempts for n in batch} == {str(n) for n in range(6)})
    assert await depth(broker, bus.queue.name) == 0
    assert await depth(broker, topology.DEAD_QUEUE.name) == 0


async def test_a_consumer_that_stops_leaves_the_rest_to_others(broker: Rabbit) -> None:
    taken: list[str] = []
    gate = asyncio.Event()

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        taken.extend(delivery.header("n") or "" for delivery in batch)
        await gate.wait()
        return [DONE] * len(batch)

    bus = Bus(broker, judge, batch_max=5)
    async with running(bus):
        await bus.put(40)
        await eventually(lambda: taken)
        stopping = asyncio.ensure_future(bus.consumer.stop(5))
        gate.set()
        await stopping
        finished = len(taken)

    async def rest() -> bool:
        return await depth(broker, bus.queue.name) == 40 - finished

    await eventually(rest)
    assert 0 < finished < 40


async def test_an_unroutable_message_is_an_error_and_not_a_success(broker: Rabbit) -> None:
    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        return [DONE] * len(batch)

    bus = Bus(broker, judge)
    async with running(bus):
        with pytest.raises(Unroutable):
            await bus.publisher.publish(topology.HOSTS.name, "nobody", StartVm())
        await bus.put(1)  # the channel is still good


async def test_a_deleted_queue_is_made_anew_and_consumed_again(broker: Rabbit) -> None:
    seen: list[str] = []

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        seen.extend(delivery.header("n") or "" for delivery in batch)
        return [DONE] * len(batch)

    bus = Bus(broker, judge)
    async with running(bus):
        async with await aio_pika.connect(broker.url) as connection:
            channel = await connection.channel()
            await channel.queue_delete(bus.queue.name)

        async def through() -> bool:
            try:
                await bus.put(1)
            except LeveretError:
                return False
            return bool(seen)

        await eventually(through)


async def test_a_forged_user_is_refused_by_the_broker_and_the_link_comes_back(broker: Rabbit) -> None:
    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        return [DONE] * len(batch)

    bus = Bus(broker, judge)
    forger = Publisher("leveret-conductor")
    bus.publishing.add(forger)
    async with running(bus):
        with pytest.raises(LeveretError) as caught:
            await forger.publish(topology.HOSTS.name, bus.key, StartVm())
        assert caught.value.problem.code is Code.UNAVAILABLE
        await eventually(bus.takes_again)


async def test_a_channel_that_broke_a_rule_is_replaced(broker: Rabbit) -> None:
    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        return [DONE] * len(batch)

    bus = Bus(broker, judge)
    async with running(bus):
        with pytest.raises(LeveretError):
            await bus.publisher.publish("no.such.exchange", "x", StartVm())
        await eventually(bus.takes_again)


async def test_without_a_connection_a_publish_says_so_at_once() -> None:
    with pytest.raises(LeveretError, match="cannot be reached"):
        await Publisher("leveret-api").publish(topology.HOSTS.name, "x", StartVm())


async def test_a_posting_channel_that_broke_a_rule_is_replaced_too(broker: Rabbit) -> None:
    seen: list[str] = []

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        seen.extend(delivery.queue for delivery in batch)
        return [DONE] * len(batch)

    bus = Bus(broker, judge)
    async with running(bus):
        await bus.publisher.post("no.such.exchange", "x", StartVm())

        async def through() -> bool:
            await bus.publisher.post(topology.HOSTS.name, bus.key, StartVm())
            return bool(seen)

        await eventually(through)


@asynccontextmanager
async def proxied(rabbit: Rabbit, count: int) -> AsyncIterator[list[Proxy]]:
    """Some ways to the broker."""
    proxies = [Proxy(rabbit.port) for _ in range(count)]
    for proxy in proxies:
        await proxy.open()
    try:
        yield proxies
    finally:
        for proxy in proxies:
            await proxy.close()


def addresses_through(rabbit: Rabbit, *proxies: Proxy) -> str:
    return ",".join(proxy.through(rabbit.url_of("leveret-api")) for proxy in proxies)


async def test_a_link_moves_on_to_another_node_at_once(broker: Rabbit) -> None:
    async with proxied(broker, 3) as proxies:
        link = Link(addresses_through(broker, *proxies), "test")
        link.add(Furniture())
        link.start()
        try:
            assert await link.wait_up(20)
            for _ in range(2):
                [current] = [proxy for proxy in proxies if proxy.is_used]
                await current.close()
                await eventually(lambda: not link.is_up)
                began = time.monotonic()
                assert await link.wait_up(20)
                assert time.monotonic() - began < 5
        finally:
            await link.stop()


async def test_a_link_does_not_wait_long_for_a_node_that_says_nothing(broker: Rabbit) -> None:
    async with proxied(broker, 2) as (silent, sound):
        silent.swallow()
        links = [Link(addresses_through(broker, silent, sound), f"test-{n}") for n in range(6)]
        for link in links:
            link.start()
        try:
            assert all(await asyncio.gather(*(link.wait_up(CONNECT_TIMEOUT_S) for link in links)))
        finally:
            for link in links:
                await link.stop()


async def test_who_waits_on_a_connection_that_is_given_up_is_told_of_an_error(
    broker: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiormq cancels whoever waits; nobody told them to stop."""
    monkeypatch.setattr("leveret.shared.bus.link.HEARTBEAT_S", 1)
    seen: list[str] = []

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        seen.extend(delivery.header("n") or "" for delivery in batch)
        return [DONE] * len(batch)

    async with proxied(broker, 1) as [proxy]:
        bus = Bus(broker, judge, url=addresses_through(broker, proxy))
        async with running(bus):
            await bus.put(1)
            await eventually(lambda: seen == ["0"])
            proxy.strand()
            with pytest.raises(LeveretError, match="did not confirm"):
                await bus.publisher.publish(topology.HOSTS.name, bus.key, StartVm(), timeout_s=30)
            await eventually(bus.takes_again, within_s=20)
            await eventually(lambda: len(seen) > 1, within_s=20)


async def test_a_broker_in_need_is_told_nothing_and_nothing_stale_comes_afterwards(broker: Rabbit) -> None:
    seen: list[str] = []

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        seen.extend(delivery.header("n") or "" for delivery in batch)
        return [DONE] * len(batch)

    async def is_refused_at_once() -> bool:
        with pytest.raises(LeveretError) as caught:
            await bus.publisher.publish(topology.HOSTS.name, bus.key, StartVm(), timeout_s=0.5)
        return "takes nothing now" in caught.value.problem.message

    bus = Bus(broker, judge)
    async with running(bus):
        await asyncio.to_thread(broker.ctl, "eval", "vm_memory_monitor:set_vm_memory_high_watermark(0.0).")
        try:
            await eventually(is_refused_at_once)
            for n in range(50):
                await bus.publisher.post(
                    topology.HOSTS.name, bus.key, StartVm(), envelope=Envelope(headers={"n": f"{n}"})
                )
            with pytest.raises(LeveretError, match="takes nothing now"):
                await bus.put(1)
        finally:
            await asyncio.to_thread(broker.ctl, "eval", "vm_memory_monitor:set_vm_memory_high_watermark(0.4).")
        await eventually(bus.takes_again)
        await eventually(lambda: "0" in seen)
    # What was written before the broker said that it reads nothing arrives as well: those had no number.
    assert [n for n in seen if n] == ["0"]


async def test_a_binding_that_somebody_removed_comes_back_by_itself(broker: Rabbit) -> None:
    seen: list[str] = []

    async def judge(batch: Sequence[Delivery]) -> Sequence[Outcome]:
        seen.extend(delivery.queue for delivery in batch)
        return [DONE] * len(batch)

    bus = Bus(broker, judge, furnish_every_s=0.5)
    async with running(bus):
        async with await aio_pika.connect(broker.url) as connection:
            queue = await (await connection.channel()).get_queue(bus.queue.name)
            await queue.unbind(topology.HOSTS.name, bus.key)
        with pytest.raises(Unroutable):
            await bus.put(1)
        await eventually(bus.takes_again)
        await eventually(lambda: seen)


async def test_an_exchange_that_somebody_deleted_is_declared_again(
    broker: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leveret.shared.bus.publishing.DECLARED_FOR_S", 0.0)
    exchange = topology.events_exchange(f"p{uuid.uuid4().hex[:8]}")
    publisher, link = Publisher("leveret-conductor"), Link(broker.url_of("leveret-conductor"), "test")
    link.add(publisher)
    link.start()
    try:
        assert await link.wait_up(20)
        await publisher.declare_exchange(exchange)
        async with await aio_pika.connect(broker.url) as connection:
            channel = await connection.channel()
            await channel.exchange_delete(exchange.name)
            await publisher.declare_exchange(exchange)
            await channel.get_exchange(exchange.name, ensure=True)
            await channel.exchange_delete(exchange.name)
    finally:
        await link.stop()


async def test_a_hosts_queue_is_one_workers_and_goes_with_it(broker: Rabbit) -> None:
    queue = topology.host_queue(uuid.uuid4())
    first, second = (Link(broker.url_of("leveret-compute"), f"test-{n}") for n in range(2))
    for link in (first, second):
        link.add(Furniture((queue,)))
        link.start()
        assert await link.wait_up(2 if link is second else 20) == (link is first)
    assert "RESOURCE_LOCKED" in str(second.last_error)
    await first.stop()
    assert await second.wait_up(20)
    await second.stop()
    async with await aio_pika.connect(broker.url) as connection:
        with pytest.raises(aiormq.exceptions.ChannelNotFoundEntity):
            await (await connection.channel()).get_queue(queue.name)
