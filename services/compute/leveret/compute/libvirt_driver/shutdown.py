"""Asks guests to shut down, the way the power button of a machine does."""

import asyncio
import contextlib
from uuid import UUID

import structlog

from leveret.compute.driver import Power
from leveret.compute.libvirt_driver.connection import Connection
from leveret.compute.libvirt_driver.door import Door
from leveret.compute.libvirt_driver.settings import LibvirtSettings
from leveret.shared.errors import Code, LeveretError

log = structlog.get_logger()

#: How long a new connection may take after one was given up.
RECONNECT_S = 5.0


class Shutdown:
    """Presses the button, and again after a while: a guest that is just booting misses the first time."""

    def __init__(self, connection: Connection, settings: LibvirtSettings) -> None:
        self._connection = connection
        self._settings = settings
        self._waiting: dict[UUID, asyncio.Event] = {}

    def heard(self, vm_id: UUID | None) -> None:
        """Something happened to a guest, or may have happened to any."""
        for waiting in self._waiting.values() if vm_id is None else filter(None, (self._waiting.get(vm_id),)):
            waiting.set()

    async def ask(self, vm_id: UUID, grace_s: float) -> bool:
        """Whether the guest went off within `grace_s`. One whose QEMU does not answer is not given the rest of it."""
        changed = self._waiting[vm_id] = asyncio.Event()
        try:
            async with asyncio.timeout(grace_s):
                while True:
                    changed.clear()
                    await self._press(vm_id)
                    if await self._goes_off(vm_id, changed):
                        return True
        except TimeoutError:
            return False
        except LeveretError as error:
            if error.problem.code is not Code.HYPERVISOR_TIMEOUT:
                raise
            log.warning("guest.hangs", vm_id=str(vm_id))
            await self._connection.wait_open(RECONNECT_S)
            return False
        finally:
            del self._waiting[vm_id]

    async def _press(self, vm_id: UUID) -> None:
        await self._connection.run(
            lambda door: door.press_power_button(vm_id),
            code=Code.STOP_FAILED,
            doing="shutting it down",
            timeout_s=self._settings.button_timeout_s,
        )

    async def _goes_off(self, vm_id: UUID, changed: asyncio.Event) -> bool:
        """Whether the guest is off before the button should be pressed again."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._settings.press_again_s
        while loop.time() < until:
            seen = await self._connection.call(Door.see, vm_id)
            if seen is None or seen.power is Power.OFF:
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await changed.wait()
            changed.clear()
        return False
