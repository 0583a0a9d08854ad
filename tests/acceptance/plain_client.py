"""A client of Leveret in plain aio-pika: it makes a VM, follows it until it runs, and deletes it.

AMQP_URL=amqp://USER:PASSWORD@HOST:PORT/leveret PROJECT=default IMAGE=debian-12 python plain_client.py
"""

import asyncio
import json
import os
import time
import uuid
from typing import Any
from urllib.parse import unquote, urlsplit

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

URL = os.environ["AMQP_URL"]
USER = unquote(urlsplit(URL).username or "")
PROJECT = os.environ.get("PROJECT", "default")
IMAGE = os.environ.get("IMAGE", "debian-12")
REPLY_TO = "amq.rabbitmq.reply-to"


class Requests:
    """Publishes with confirms, and hears the verdicts by their correlation ids."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def open(self, connection: aio_pika.abc.AbstractConnection) -> None:
        # What no queue takes raises, too: confirmed means queued.
        self._channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        self._exchange = await self._channel.get_exchange("leveret.requests", ensure=False)
        replies = await self._channel.get_queue(REPLY_TO, ensure=False)
        await replies.consume(self._heard, no_ack=True)

    async def ask(
        self, kind: str, vm_id: uuid.UUID, body: dict[str, Any], *, wait_s: float = 10
    ) -> dict[str, Any] | None:
        """The verdict; None when none came in time, and then the events tell what becomes of the request."""
        request_id = str(uuid.uuid4())
        message = aio_pika.Message(
            json.dumps(body).encode(),
            type=kind,
            user_id=USER,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=str(uuid.uuid4()),
            reply_to=REPLY_TO,
            correlation_id=request_id,
            headers={"vm_id": str(vm_id), "request_id": request_id, "requested_at": str(time.time())},
        )
        self._waiting[request_id] = verdict = asyncio.get_running_loop().create_future()
        try:
            await self._exchange.publish(message, routing_key=kind, mandatory=True, timeout=10)
            return await asyncio.wait_for(verdict, wait_s)
        except TimeoutError:
            return None
        finally:
            del self._waiting[request_id]

    async def _heard(self, message: AbstractIncomingMessage) -> None:
        verdict = self._waiting.get(message.correlation_id or "")
        if verdict is not None and not verdict.done():
            verdict.set_result(json.loads(message.body))


async def main() -> None:
    vm_id = uuid.uuid4()
    connection = await aio_pika.connect(URL)
    async with connection:
        # The queue first: an event is copied into the queues that are bound at its moment.
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=100)
        queue = await channel.declare_queue(f"client.{USER}.{vm_id}", durable=True, arguments={"x-expires": 3_600_000})
        await queue.bind(f"leveret.events.{PROJECT}", f"vm.{vm_id}.*")
        requests = Requests()
        await requests.open(connection)

        wish = {"vcpus": 1, "memory_mib": 128, "disk_gib": 1, "image": {"name": IMAGE}}
        verdict = await requests.ask("vm.create.v1", vm_id, wish)
        print("verdict", verdict)
        if verdict is not None and not verdict["accepted"]:
            raise SystemExit(verdict["problem"]["hint"])

        newest = 0
        async with queue.iterator() as messages:
            async for message in messages:
                event = json.loads(message.body)
                if int(event["sequence"]) > newest:  # what comes again is dropped
                    newest = int(event["sequence"])
                    state = event["data"].get("state")
                    print(event["type"], state)
                    if event["type"] == "leveret.vm.running.v1":
                        await requests.ask("vm.delete.v1", vm_id, {})
                await message.ack()
                if state in {"deleted", "error"}:
                    break
        await queue.delete()


if __name__ == "__main__":
    asyncio.run(main())
