"""Keeps one connection to libvirt: opens it, notices that it ended, opens it again, and runs verbs on it in threads."""

import asyncio
import random
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

import structlog

from leveret.compute.libvirt_driver.door import Door, NoDomainError, told
from leveret.compute.libvirt_driver.lane import Lane, in_thread
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, LeveretError, fail

log = structlog.get_logger()

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
#: Calls that may hang before new ones are refused. Each hanging call has its own, ended connection.
MAX_HUNG = 16
CLOSING = "libvirt-close"


class Connection:
    """The driver's way to libvirt.

    A call that exceeds its time is given up and the connection with it: on a hanging libvirtd the keepalive ends the
    old connection, and with it the given-up threads; with a hanging guest the old connection lives until libvirt
    answers, and the new one does not share its limit of calls under way. While there is no connection verbs fail at
    once with `hypervisor_unavailable`, and one attempt to open one is under way, never more.
    """

    def __init__(
        self, settings: LibvirtSettings, *, on_event: Callable[[UUID], None], on_open: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._on_event = on_event
        self._on_open = on_open
        self._lane = Lane(
            "libvirt", width=settings.calls_at_once, max_hung=MAX_HUNG, timeout_code=Code.HYPERVISOR_TIMEOUT
        )
        self._door: Door | None = None
        self._ended = asyncio.Event()
        self._opened = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._why = "not connected yet"

    @property
    def is_open(self) -> bool:
        return self._door is not None

    async def open(self, *, wait_s: float) -> None:
        """Start to keep a connection, and give the first one a moment to come about."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name="libvirt-connection")
        await self.wait_open(wait_s)

    async def wait_open(self, wait_s: float) -> bool:
        try:
            async with asyncio.timeout(wait_s):
                await self._opened.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        door = self._door
        self._forget("closed")
        if door is not None:
            await asyncio.wait((in_thread(CLOSING, door.retire),), timeout=self._settings.call_timeout_s)

    async def call(self, verb: Callable[..., T], *args: Any) -> T:
        """Run a verb of the door with the usual time limit; failures are the hypervisor's."""
        doing = verb.__name__.replace("_", " ")
        return await self.run(lambda door: verb(door, *args), code=Code.HYPERVISOR_UNAVAILABLE, doing=doing)

    async def run(self, verb: Callable[[Door], T], *, code: Code, doing: str, timeout_s: float | None = None) -> T:
        """Run blocking code on the connection.

        Raises LeveretError: with `code` and libvirt's own words, with `hypervisor_unavailable` when there is no
        connection, `hypervisor_timeout` when there is no answer in time, `domain_missing` for a lost domain.
        """
        door = self._door
        if door is None:
            raise fail(Code.HYPERVISOR_UNAVAILABLE, f"libvirt is not connected ({self._why}); not tried: {doing}.")
        try:
            return await self._lane.run(
                door.use, verb, timeout_s=timeout_s or self._settings.call_timeout_s, doing=doing
            )
        except LeveretError as error:
            if error.problem.code is Code.HYPERVISOR_TIMEOUT:
                self._give_up(door, f"no answer while {doing}")
            raise
        except NoDomainError as error:
            raise told(error, code, doing, alive=True) from error
        except Exception as error:  # libvirt's own, and what the verbs make of it
            alive = door is self._door and door.is_alive()
            if not alive:
                self._give_up(door, str(error))
            raise told(error, code, doing, alive=alive) from error

    def _give_up(self, door: Door, why: str) -> None:
        if door is not self._door:
            return
        log.warning("libvirt.lost", why=why)
        self._forget(why)
        in_thread(CLOSING, door.retire)

    def _forget(self, why: str) -> None:
        self._door = None
        self._why = why
        self._opened.clear()
        self._ended.set()

    async def _keep(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            self._ended.clear()
            try:
                await self._connect()
            except Exception as error:  # noqa: BLE001  (the rim: libvirtd may be away in any way)
                if self._why != str(error):
                    log.warning("libvirt.unreachable", uri=self._settings.uri, why=str(error))
                self._why = str(error)
                await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                continue
            pause_s = FIRST_PAUSE_S
            await self._ended.wait()

    async def _connect(self) -> None:
        """Open, without a time limit: a libvirtd that hangs lets us in when it goes on, and one that dies says so."""
        loop = asyncio.get_running_loop()
        opening: list[Door] = []

        def from_libvirt(vm_id: UUID | None) -> None:
            try:
                loop.call_soon_threadsafe(heard, vm_id)
            except RuntimeError:
                return  # the event loop is closed

        def heard(vm_id: UUID | None) -> None:
            if vm_id is not None:
                self._on_event(vm_id)
            elif opening and opening[0] is self._door:
                self._give_up(opening[0], "libvirtd closed the connection")

        keepalive = (self._settings.keepalive_interval_s, self._settings.keepalive_count)
        attempt = in_thread("libvirt-open", Door.open, self._settings.uri, from_libvirt, *keepalive)
        try:
            door = await asyncio.shield(attempt)
        except asyncio.CancelledError:
            attempt.add_done_callback(_close_late)
            raise
        opening.append(door)
        if not door.is_alive():
            raise ConnectionError("it ended as soon as it was open")
        self._door = door
        self._why = ""
        self._opened.set()
        log.info("libvirt.connected", uri=self._settings.uri)
        self._on_open()


def _close_late(attempt: "asyncio.Future[Door]") -> None:
    """Close a connection that came about when nobody wanted it any more."""
    if not attempt.cancelled() and attempt.exception() is None:
        in_thread(CLOSING, attempt.result().retire)
