"""Does what the schedule says, and writes down what it did."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

from chaos.history import Entry, History, Told
from chaos.house import Component, Keeper, Lines
from chaos.looking import qemus
from chaos.schedule import Deed, Fault
from leveret.stack.libvirtd import Libvirtd


class Nemesis:
    """Hits components of a house. `done` and `skipped` count faults by (component, deed).

    A component that is still down is not hit: that is what `skipped` counts, and guests when there are none. `over_at`
    is when the last fault was over, by the monotonic clock.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        components: Mapping[str, Component],
        keeper: Keeper,
        lines: Lines,
        history: History,
        libvirtd: Libvirtd | None,
    ) -> None:
        self._faults = faults
        self._components = components
        self._keeper = keeper
        self._lines = lines
        self._history = history
        self._libvirtd = libvirtd
        self._began = keeper.began
        self.done: Counter[tuple[str, str]] = Counter()
        self.skipped: Counter[tuple[str, str]] = Counter()
        self.over_at = keeper.began

    async def run(self) -> None:
        """Every fault at its time; returns when the last one is over."""
        async with asyncio.TaskGroup() as group:
            for fault in self._faults:
                await asyncio.sleep(max(0.0, self._began + fault.at_s - time.monotonic()))
                group.create_task(self._hit(fault))

    async def _hit(self, fault: Fault) -> None:
        done = await (self._hit_guest(fault) if fault.component == "qemu" else self._hit_component(fault))
        (self.done if done else self.skipped)[fault.component, fault.deed.value] += 1
        if not done:
            self._note(fault, "skipped")
        elif fault.deed is not Deed.KILL:
            # A killed process has to come up by itself: that is part of what it takes to be well again.
            self.over_at = time.monotonic()

    async def _hit_component(self, fault: Fault) -> bool:
        name = fault.component
        component = self._components[name]
        if not await self._keeper.may_be_hit(name):
            return False
        self._keeper.held.add(name)
        self._note(fault)
        self.over_at = time.monotonic()
        try:
            match fault.deed:
                case Deed.KILL:
                    await asyncio.to_thread(component.kill)
                    await asyncio.sleep(fault.for_s)
                case Deed.RESTART:
                    await asyncio.to_thread(component.stop)
                case Deed.FREEZE:
                    await _freeze(await asyncio.to_thread(component.processes), fault.for_s)
                case _:
                    await self._trouble_line(fault)
            if fault.deed in {Deed.KILL, Deed.RESTART}:
                await self._keeper.start(name)
        finally:
            self._keeper.held.discard(name)
        return True

    async def _trouble_line(self, fault: Fault) -> None:
        proxy = self._lines.proxies[fault.component, fault.link]
        match fault.deed:
            case Deed.CUT:
                proxy.cut()
            case Deed.PART:
                await proxy.close()
                await asyncio.sleep(fault.for_s)
                await proxy.open()
            case Deed.HANG:
                proxy.swallow()
                await asyncio.sleep(fault.for_s)
                proxy.swallow(swallowing=False)

    async def _hit_guest(self, fault: Fault) -> bool:
        guests = await asyncio.to_thread(qemus, self._libvirtd) if self._libvirtd else []
        if not guests:
            return False
        vm_id, process = guests[int(fault.pick * len(guests))]
        self._note(fault, vm_id=vm_id)
        if fault.deed is Deed.KILL:
            self.over_at = time.monotonic()
            _signal(process, signal.SIGKILL)
        else:
            await _freeze([process], fault.for_s)
        return True

    def _note(self, fault: Fault, note: str = "", vm_id: str = "") -> None:
        at_s = round(time.monotonic() - self._began, 3)
        self._history.add(
            Entry(at_s, Told.NEMESIS, op=fault.deed.value, via=fault.component, vm_id=vm_id, note=note or str(fault))
        )


async def _freeze(processes: Sequence[psutil.Process], for_s: float) -> None:
    for process in processes:
        _signal(process, signal.SIGSTOP)
    try:
        await asyncio.sleep(for_s)
    finally:
        for process in processes:
            _signal(process, signal.SIGCONT)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    """It may have ended; a pid that is another's by now is left alone."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
