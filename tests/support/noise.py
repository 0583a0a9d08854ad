"""A neighbour that asks for VMs at a steady rate, in a process of its own: `noise.py amqp|rest URL TOKEN RATE_PER_S`.

It goes on until its standard input is closed, waits for no answer before it asks again, and then prints what came of it
as JSON: {"asked": ..., "answers": {code: count}}. `TOKEN` is a bearer token, or the project of an AMQP client.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import aiormq
import httpx2

from leveret.client.broker import user_of
from leveret.shared import topology
from leveret.shared.ids import new_id

CREATE = json.dumps({"vcpus": 1, "memory_mib": 128, "disk_gib": 1, "image": {"name": "tiny"}})
#: What is asked at once, so that a timer that is late by a little makes up for it.
TICK_S = 0.02
LATE_MAX_S = 0.5
REST_IN_FLIGHT_MAX = 64


class Noise:
    """What was asked, and how it was answered."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self) -> None:
        raise NotImplementedError

    async def make(self, rate_per_s: float) -> None:
        """Ask at this rate, for ever. What was missed by more than a moment is not made up for."""
        last, owed = time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            owed += min(now - last, LATE_MAX_S) * rate_per_s
            last = now
            while owed >= 1:
                owed -= 1
                self.asked += 1
                task = asyncio.create_task(self.ask())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(TICK_S)


class AmqpNoise(Noise):
    """Publishes without waiting for confirms; the answers come by direct reply."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._channel: aiormq.abc.AbstractChannel | None = None

    async def connect(self) -> None:
        self._connection = await aiormq.connect(self._url)
        self._channel = await self._connection.channel(publisher_confirms=False)
        await self._channel.basic_consume("amq.rabbitmq.reply-to", self._hear, no_ack=True)

    async def _hear(self, message: aiormq.abc.DeliveredMessage) -> None:
        verdict = json.loads(bytes(message.body))
        self.answers["accepted" if verdict["accepted"] else verdict["problem"]["code"]] += 1

    async def ask(self) -> None:
        assert self._channel is not None
        properties = aiormq.spec.Basic.Properties(
            content_type="application/json",
            delivery_mode=2,
            message_id=new_id().hex,
            message_type="vm.create.v1",
            user_id=user_of(self._url),
            reply_to="amq.rabbitmq.reply-to",
            headers={"vm_id": str(new_id())},
        )
        await self._channel.basic_publish(
            CREATE.encode(), exchange=topology.REQUESTS.name, routing_key="vm.create.v1", properties=properties
        )


class RestNoise(Noise):
    """Posts on a bounded number of connections; what finds none free is not sent, and counted as `not_sent`."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._web = httpx2.AsyncClient(base_url=url, headers=headers, timeout=30, verify=False)
        self._slots = REST_IN_FLIGHT_MAX

    async def connect(self) -> None:
        """Connections are made as they are needed."""

    async def ask(self) -> None:
        if not self._slots:
            self.answers["not_sent"] += 1
            return
        self._slots -= 1
        try:
            answer = await self._web.put(f"/v1/vms/{new_id()}", content=CREATE)
            document: dict[str, Any] = answer.json()
            self.answers[document["verdict"] if answer.is_success else document["code"]] += 1
        except httpx2.HTTPError as error:
            self.answers[type(error).__name__] += 1
        finally:
            self._slots += 1


async def main(way: str, url: str, token: str, rate_per_s: float) -> None:
    noise: AmqpNoise | RestNoise = AmqpNoise(url) if way == "amqp" else RestNoise(url, token)
    await noise.connect()
    print("on", flush=True)
    making = asyncio.create_task(noise.make(rate_per_s))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    making.cancel()
    print(json.dumps({"asked": noise.asked, "answers": dict(noise.answers)}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
