"""Links: broker connections that come back by themselves.

A broker under a memory alarm stops reading from a connection that publishes, acknowledgements included; therefore a
process has one link for publishing and another for consuming.
"""

import asyncio
import random
import time
from contextlib import suppress
from typing import Protocol

import aio_pika
import structlog
from aio_pika.abc import AbstractConnection

from leveret.shared import topology
from leveret.shared.addresses import addresses_in
from leveret.shared.bus import ending, reading

log = structlog.get_logger()

#: A peer that is gone without a word is noticed after 23 to 31 s: aiormq allows for three of these and three seconds,
#: and looks at every half of one.
HEARTBEAT_S = 8
#: For trying all addresses once.
CONNECT_TIMEOUT_S = 10
#: What somebody deleted, bindings too, is back after this time and a fifth of it.
FURNISH_EVERY_S = 30.0

#: What a broken connection or channel raises: socket, protocol and state errors, and a bare `Exception` for whatever
#: waits on a connection that is closed in good order. Nothing narrower holds them all.
BROKER_ERRORS = (Exception,)


class Part(Protocol):
    """Something that lives on a link: it is attached again after every reconnection."""

    async def attach(self, connection: AbstractConnection) -> None: ...
    def detach(self) -> None: ...


class Link:
    """One connection for one purpose, kept up for ever, with jittered pauses between attempts.

    `urls` are the addresses of the broker's nodes, with commas between them: any of them will do, in random order, the
    one that was lost last. Each time the link comes up it attaches its parts, in order; a part declares what it needs,
    so that a broker that lost everything is furnished anew. `last_error` is why the last attempt failed; None before
    it, and once one succeeded.
    """

    def __init__(self, urls: str, name: str) -> None:
        self.name = name
        self.last_error: Exception | None = None
        self._addresses = addresses_in(urls)
        self._last_address = ""
        self._parts: list[Part] = []
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._broken = asyncio.Event()

    def add(self, part: Part) -> None:
        self._parts.append(part)

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=f"link:{self.name}")

    async def wait_up(self, timeout_s: float) -> bool:
        """Whether the link came up within this time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        return self._up.is_set()

    def renew(self) -> None:
        """Drop the connection and build everything anew: a part found that something is missing."""
        self._broken.set()

    async def stop(self) -> None:
        if self._task is not None:
            # A library that waits with `wait_for` may lose a cancellation that comes as it is done (CPython #86296).
            while not self._task.done():
                self._task.cancel()
                await asyncio.wait({self._task}, timeout=1)
            self._task = None

    async def _keep(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._live_once()
            except BROKER_ERRORS as error:  # the rim
                self.last_error = error.with_traceback(None)  # its frames hold the whole connection
                log.warning("link.failed", link=self.name, error=f"{type(error).__name__}: {error}")
            failures = 1 if time.monotonic() - began > 30 else failures + 1
            await asyncio.sleep(random.uniform(0.5, 1.0) * min(0.25 * 2**failures, 5.0))

    async def _connect(self) -> AbstractConnection:
        """A connection to the first node that grants one. Raises what the last of them said."""
        addresses = random.sample(self._addresses, k=len(self._addresses))
        addresses.sort(key=lambda address: address == self._last_address)
        error: Exception = ConnectionError("there is no address to connect to")
        for address in addresses:
            self._last_address = address
            try:
                return await aio_pika.connect(
                    address,
                    heartbeat=HEARTBEAT_S,
                    timeout=CONNECT_TIMEOUT_S / len(addresses),
                    client_properties={"connection_name": self.name},
                )
            except BROKER_ERRORS as failure:
                error = failure
        raise error

    async def _live_once(self) -> None:
        self._broken.clear()
        reading.install()
        ending.install()
        connection = await self._connect()
        # aio-pika's `closed()` only tells of a close that was asked for.
        lost = asyncio.Event()
        connection.close_callbacks.add(lambda *_: lost.set())
        closed = asyncio.ensure_future(lost.wait())
        broken = asyncio.ensure_future(self._broken.wait())
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S * 3):
                for part in self._parts:
                    await part.attach(connection)
            self.last_error = None
            self._up.set()
            log.info("link.up", link=self.name)
            await asyncio.wait({closed, broken}, return_when=asyncio.FIRST_COMPLETED)
            log.warning("link.down", link=self.name)
        finally:
            self._up.clear()
            for part in self._parts:
                part.detach()
            closed.cancel()
            broken.cancel()
            with suppress(*BROKER_ERRORS):
                async with asyncio.timeout(2):
                    await connection.close()


class Furniture:
    """Declares every exchange and these queues each time its link comes up, and now and then while it is up.

    What an operator deletes by mistake nobody may notice: a binding that is gone only makes a queue silent. Put it
    first on a link. A process declares what it consumes: a host may not touch the conductor's queues.
    """

    def __init__(
        self, queues: tuple[topology.Queue, ...] = topology.CORE_QUEUES, *, every_s: float = FURNISH_EVERY_S
    ) -> None:
        self._queues = queues
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None

    async def attach(self, connection: AbstractConnection) -> None:
        await self._declare(connection)
        self._task = asyncio.create_task(self._keep(connection), name="furniture")

    def detach(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _declare(self, connection: AbstractConnection) -> None:
        channel = await connection.channel()
        await topology.declare(channel, queues=self._queues)
        await channel.close()

    async def _keep(self, connection: AbstractConnection) -> None:
        while True:
            await asyncio.sleep(self._every_s * random.uniform(0.8, 1.2))
            try:
                async with asyncio.timeout(self._every_s):
                    await self._declare(connection)
            except BROKER_ERRORS as error:  # the rim; a link that is broken notices it by itself
                log.warning("furniture.not_declared", error=f"{type(error).__name__}: {error}")
