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
from leveret.shared.bus import reading

log = structlog.get_logger()

HEARTBEAT_S = 10
CONNECT_TIMEOUT_S = 10

#: What a broken connection or channel raises: socket, protocol and state errors, and a bare `Exception` for whatever
#: waits on a connection that is closed in good order. Nothing narrower holds them all.
BROKER_ERRORS = (Exception,)


class Part(Protocol):
    """Something that lives on a link: it is attached again after every reconnection."""

    async def attach(self, connection: AbstractConnection) -> None: ...
    def detach(self) -> None: ...


class Link:
    """One connection for one purpose, kept up for ever, with jittered pauses between attempts.

    Each time it comes up it attaches its parts, in order; a part declares what it needs, so that a broker that lost
    everything is furnished anew. `last_error` is why the last attempt failed; None before it, and once one succeeded.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.last_error: Exception | None = None
        self._url = url
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

    async def _live_once(self) -> None:
        self._broken.clear()
        reading.install()
        connection = await aio_pika.connect(
            self._url,
            heartbeat=HEARTBEAT_S,
            timeout=CONNECT_TIMEOUT_S,
            client_properties={"connection_name": self.name},
        )
        closed = asyncio.ensure_future(connection.closed())
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
    """Declares every exchange and these queues each time its link comes up. Put it first on a link.

    A process declares what it consumes: a host may not touch the conductor's queues.
    """

    def __init__(self, queues: tuple[topology.Queue, ...] = topology.CORE_QUEUES) -> None:
        self._queues = queues

    async def attach(self, connection: AbstractConnection) -> None:
        channel = await connection.channel()
        await topology.declare(channel, queues=self._queues)
        await channel.close()

    def detach(self) -> None:
        """Nothing to forget."""
