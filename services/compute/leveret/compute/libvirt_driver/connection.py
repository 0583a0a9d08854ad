"""The driver's way to libvirt: one connection that listens, kept open, and a few on which verbs run in threads.

Each connection carries one call at a time. libvirt's client lets threads share a connection, but when that ends under
two waiting calls, as the keepalive ends it when libvirtd hangs, libvirt 9.0 leaves one of them waiting for ever or
crashes the process. With one call on it, the keepalive frees the thread.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

import structlog

from leveret.compute.libvirt_driver.door import Door, NoDomainError, told
from leveret.compute.libvirt_driver.lane import Lane, NoAnswer, in_thread
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, LeveretError, fail

log = structlog.get_logger()

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
#: A connection that stood for so long was a good one.
LASTED_S = 10.0
#: Calls that may hang before new ones are refused.
MAX_HUNG = 16
CLOSING = "libvirt-close"


class Connection:
    """Keeps the listening connection, and runs verbs while there is one.

    Without it verbs fail at once with `hypervisor_unavailable`, so that nothing queues up behind a libvirtd that is
    away. A call that exceeds its time is given up, and libvirt is asked anew for a connection: one that hangs lets
    nobody in until it goes on, and when only a guest hangs a new connection takes milliseconds.
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
        self._listener: Door | None = None
        self._idle: deque[Door] = deque()
        self._ended = asyncio.Event()
        self._opened = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._why = "not connected yet"

    @property
    def is_open(self) -> bool:
        return self._listener is not None

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
        if closing := self._forget("closed"):
            await asyncio.wait(closing, timeout=self._settings.call_timeout_s)

    async def call(self, verb: Callable[..., T], *args: Any) -> T:
        """Run a verb of the door with the usual time limit; failures are the hypervisor's."""
        doing = verb.__name__.replace("_", " ")
        return await self.run(lambda door: verb(door, *args), code=Code.HYPERVISOR_UNAVAILABLE, doing=doing)

    async def run(self, verb: Callable[[Door], T], *, code: Code, doing: str, timeout_s: float | None = None) -> T:
        """Run blocking code on a connection of its own.

        Raises LeveretError: with `code` and libvirt's own words, with `hypervisor_unavailable` when there is no
        connection, with `hypervisor_timeout` when there is no answer in time.
        """
        listener = self._listener
        if listener is None:
            raise self._away(doing)
        limit_s = timeout_s or self._settings.call_timeout_s
        try:
            return await self._lane.run(self._with_door, listener, verb, code, doing, timeout_s=limit_s, doing=doing)
        except NoAnswer:
            self._lose(listener, f"no answer while {doing}")
            raise

    def _with_door(self, listener: Door, verb: Callable[[Door], T], code: Code, doing: str) -> T:
        """Take an idle connection or a new one, and leave it to the next when it is still good. Runs in a thread."""
        if self._listener is not listener:  # it went while the call waited for its turn
            raise self._away(doing)
        door = None
        try:
            door = self._take() or self._open_door()
            return verb(door)
        except LeveretError:
            raise
        except NoDomainError as error:
            raise fail(code, f"There is no domain any more, found while {doing}.") from _without_frames(error)
        except Exception as error:  # the rim: the binding may raise anything  # noqa: BLE001  (it is told)
            alive = door is not None and door.is_alive()
            raise told(error, code, doing, alive=alive) from _without_frames(error)
        finally:
            if door is not None:
                self._give_back(door, listener)

    def _away(self, doing: str) -> LeveretError:
        return fail(Code.HYPERVISOR_UNAVAILABLE, f"libvirt is not connected ({self._why}); not tried: {doing}.")

    def _open_door(self) -> Door:
        return Door.open(self._settings.uri, self._settings.keepalive_interval_s, self._settings.keepalive_count)

    def _take(self) -> Door | None:
        while self._idle:
            try:
                door = self._idle.pop()
            except IndexError:  # another thread was faster
                return None
            if door.is_alive():
                return door
            door.close()
        return None

    def _give_back(self, door: Door, listener: Door) -> None:
        if self._listener is listener and door.is_alive():
            self._idle.append(door)
        else:
            door.close()

    def _lose(self, listener: Door, why: str) -> None:
        if listener is self._listener:
            log.warning("libvirt.lost", why=why)
            self._forget(why)

    def _forget(self, why: str) -> "list[asyncio.Future[None]]":
        """Count as not connected, and close what is idle. Calls under way close their own connections."""
        idle = [self._idle.pop() for _ in range(len(self._idle))]
        if self._listener is not None:
            idle.append(self._listener)
        self._listener = None
        self._why = why
        self._opened.clear()
        self._ended.set()
        return [in_thread(CLOSING, door.close) for door in idle]

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = FIRST_PAUSE_S
        while True:
            began = loop.time()
            self._ended.clear()
            try:
                await self._listen()
                await self._ended.wait()
            except Exception as error:  # noqa: BLE001  (the rim: libvirtd may be away in any way)
                if self._why != str(error):
                    log.warning("libvirt.unreachable", uri=self._settings.uri, why=str(error))
                self._why = str(error)
            if loop.time() - began > LASTED_S:
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _listen(self) -> None:
        """Open the listening connection. There is no time limit, and never more than one attempt: a libvirtd that
        hangs lets us in when it goes on, and one that dies says so."""
        loop = asyncio.get_running_loop()
        opened: list[Door] = []

        def heard(vm_id: UUID | None) -> None:
            if vm_id is not None:
                self._on_event(vm_id)
            elif opened:
                self._lose(opened[0], "libvirtd closed the connection")

        def from_libvirt(vm_id: UUID | None) -> None:
            try:
                loop.call_soon_threadsafe(heard, vm_id)
            except RuntimeError:
                return  # the event loop is closed

        def attempt() -> Door:
            door = self._open_door()
            try:
                door.listen(from_libvirt)
            except BaseException:
                door.close()
                raise
            return door

        opening = in_thread("libvirt-open", attempt)
        try:
            door = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_late)
            raise
        opened.append(door)
        if not door.is_alive():
            in_thread(CLOSING, door.close)
            raise ConnectionError("it ended as soon as it was open")
        self._listener = door
        self._why = ""
        self._opened.set()
        log.info("libvirt.connected", uri=self._settings.uri)
        self._on_open()


def _without_frames(error: Exception) -> Exception:
    """The error without what its frames hold on to. A domain among that keeps its connection open, which would then be
    closed where the error is dropped: on the event loop, for as long as libvirtd hangs."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:  # one may be its own cause
        one.__traceback__ = None
        chain.append(one)
        one = one.__cause__ or one.__context__
    return error


def _close_late(opening: "asyncio.Future[Door]") -> None:
    """Close a connection that came about when nobody wanted it any more."""
    if not opening.cancelled() and opening.exception() is None:
        in_thread(CLOSING, opening.result().close)
