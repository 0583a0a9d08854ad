"""Watches guests that run and have not yet said that they are up."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

import structlog

from leveret.shared.errors import LeveretError

log = structlog.get_logger()

POLL_S = 0.25
#: A guest that has been silent for long is looked at less often: it may never say anything.
POLL_MAX_S = 5.0
PATIENCE = 20


@dataclass(slots=True)
class _Watched:
    since: float
    due: float


class Readiness:
    """Asks `is_ready` of every watched VM and calls `on_ready` once. Has a task only while a VM is watched."""

    def __init__(self, is_ready: Callable[[UUID], Awaitable[bool]], on_ready: Callable[[UUID], None]) -> None:
        self._is_ready = is_ready
        self._on_ready = on_ready
        self._watched: dict[UUID, _Watched] = {}
        self._task: asyncio.Task[None] | None = None

    def watch(self, vm_id: UUID) -> None:
        """Begin to watch, or go on watching."""
        if vm_id in self._watched:
            return
        now = asyncio.get_running_loop().time()
        self._watched[vm_id] = _Watched(now, now)
        if self._task is None:
            self._task = asyncio.create_task(self._loop(), name="readiness")

    def forget(self, vm_id: UUID) -> None:
        self._watched.pop(vm_id, None)

    async def poll_once(self) -> None:
        """Look at every guest that is due."""
        now = asyncio.get_running_loop().time()
        for vm_id, watched in list(self._watched.items()):
            if watched.due > now or vm_id not in self._watched:
                continue
            watched.due = now + min(max(POLL_S, (now - watched.since) / PATIENCE), POLL_MAX_S)
            try:
                ready = await self._is_ready(vm_id)
            except LeveretError as error:
                log.debug("guest.not_asked", vm_id=str(vm_id), why=str(error))
                continue
            if ready and self._watched.get(vm_id) is watched:
                self.forget(vm_id)
                self._on_ready(vm_id)

    def stop(self) -> None:
        self._watched.clear()
        if self._task is not None:
            self._task.cancel()

    async def _loop(self) -> None:
        try:
            while self._watched:
                try:
                    await self.poll_once()
                except Exception:  # the rim
                    log.exception("readiness.failed")
                await asyncio.sleep(POLL_S)
        finally:
            self._task = None
