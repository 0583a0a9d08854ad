"""Fault points: every step of a process that outlives it has a name, so that it can be made to go wrong just there.

A step is one effect that lasts or is seen elsewhere: a transaction, a message handed to the broker, an acknowledgement,
a deed of the hypervisor, an answer. What lies between two steps is lost with the process, and nothing depends on it.

In production a step costs one comparison. A process that is armed with a directory does what it finds there when it
comes to a point: a file with the point's name says which deed. It takes the file away, so each is done once, by one.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Point:
    """A step. One that `commits` is a transaction, which may also end just before its COMMIT.

    One that `polls` is taken whether there is anything to do or not: only what it found goes wrong. `repeats` is false
    for the answer to a question, which cannot be given twice.
    """

    does: str
    commits: bool = False
    polls: bool = False
    repeats: bool = True


#: Every step of every handler.
POINTS: dict[str, Point] = {
    "asking.publish": Point("The API gives a request to the broker, and has it confirmed."),
    "api.answer": Point("The API answers over HTTP.", repeats=False),
    "requests.draw": Point("A batch of requests draws on its projects' allowances."),
    "requests.carry_out": Point("Requests become rows, placements and events.", commits=True),
    "requests.administer": Point("An administrator's order is carried out.", commits=True),
    "requests.rehearse": Point("A dry run is played through, and undone."),
    "requests.record": Point("Requests that cannot be read, or are too many, are written down.", commits=True),
    "requests.furnish": Point("A new project gets its exchange."),
    "requests.send": Point("Hosts are told what became of requests."),
    "requests.answer": Point("Who asked is told the verdict."),
    "requests.bury": Point("A request that nobody can be told about is kept in leveret.dead."),
    "requests.acknowledge": Point("A batch of requests is acknowledged."),
    "reports.apply": Point("What hosts saw becomes rows and events.", commits=True),
    "reports.send": Point("Hosts are told what follows from their reports."),
    "reports.bury": Point("A report that cannot be read is kept in leveret.dead."),
    "reports.acknowledge": Point("A batch of reports is acknowledged."),
    "heartbeats.take": Point("Leases are renewed, and new hosts registered.", commits=True),
    "heartbeats.send": Point("Hosts whose digest is not the expected one are asked for everything."),
    "heartbeats.bury": Point("A heartbeat that cannot be read is kept in leveret.dead."),
    "heartbeats.acknowledge": Point("A batch of heartbeats is acknowledged."),
    "sweeper.place": Point("VMs that wait for a host get one, or an end.", commits=True, polls=True),
    "sweeper.end_late": Point("VMs past their deadline are dealt with.", commits=True, polls=True),
    "sweeper.resend": Point("Commands that were not done are noted as told again.", commits=True, polls=True),
    "sweeper.silence": Point("Hosts that are not heard of get no new work.", commits=True, polls=True),
    "sweeper.settle": Point("VMs of hosts that are proven to be off are settled.", commits=True, polls=True),
    "sweeper.forget": Point("What nobody asks for any more is dropped.", commits=True, polls=True),
    "sweeper.send": Point("Hosts are told what the sweeper found."),
    "relay.number": Point("Committed events get their numbers.", commits=True, polls=True),
    "relay.publish": Point("Events are given to the broker."),
    "relay.mark": Point("Events are noted as published.", commits=True),
    "relay.furnish": Point("The projects' exchanges are declared."),
    "vm.image": Point("A host fetches an image."),
    "vm.disk": Point("A host makes a disk."),
    "vm.config_drive": Point("A host makes a config drive."),
    "vm.define": Point("A host defines a domain."),
    "vm.start": Point("A host starts a domain."),
    "vm.mark": Point("A host writes into the journal what it made true."),
    "vm.stop": Point("A host stops a domain."),
    "vm.reboot": Point("A host resets a domain."),
    "vm.remove": Point("A host removes all there is of a VM."),
    "vm.cleanup": Point("A host removes what a failed build left."),
    "host.list": Point("A host asks its hypervisor for everything."),
    "host.report": Point("A host reports what it sees."),
    "host.beat": Point("A host says that it is there."),
    "commands.bury": Point("A command that cannot be read is kept in leveret.dead."),
    "commands.acknowledge": Point("A host acknowledges commands."),
}


class Deed(StrEnum):
    """What may go wrong at a point."""

    KILL_BEFORE = "kill_before"
    KILL_AT_COMMIT = "kill_at_commit"
    KILL_AFTER = "kill_after"
    FAIL_BEFORE = "fail_before"
    FAIL_AFTER = "fail_after"
    HANG_BEFORE = "hang_before"
    HANG_AFTER = "hang_after"
    TWICE = "twice"


class Fault(Exception):
    """A failure that was asked for."""


_BEFORE = frozenset({Deed.KILL_BEFORE, Deed.FAIL_BEFORE, Deed.HANG_BEFORE})

_plans: Path | None = None
#: The point at which the present task is to die when it comes to its COMMIT.
_dying: ContextVar[str | None] = ContextVar("dying", default=None)


def arm(plans: Path | None) -> None:
    """Look into this directory from now on, whenever a step is taken; with None, never."""
    global _plans  # noqa: PLW0603  (steps are taken everywhere, and a process has one directory)
    _plans = plans


def fault_point(name: str) -> Callable[[Callable[Given, Awaitable[Result]]], Callable[Given, Awaitable[Result]]]:
    """Make a coroutine function the step of this name."""
    if name not in POINTS:
        raise ValueError(f"{name} is not in the table of fault points")

    def named(function: Callable[Given, Awaitable[Result]]) -> Callable[Given, Awaitable[Result]]:
        @wraps(function)
        async def taken(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            return await take(name, function, *args, **kwargs)

        return taken

    return named


async def take(
    name: str, function: Callable[Given, Awaitable[Result]], *args: Given.args, **kwargs: Given.kwargs
) -> Result:
    """Take the step of this name: call the function, unless something is to go wrong."""
    deed = None if _plans is None else _planned(_plans, name)
    if deed is None or (deed in _BEFORE and not _claim(name)):
        return await function(*args, **kwargs)
    await _suffer(deed, before=True)
    dying = _dying.set(name if deed is Deed.KILL_AT_COMMIT else None)
    try:
        result = await function(*args, **kwargs)
    finally:
        _dying.reset(dying)
    if deed is Deed.KILL_AT_COMMIT or (POINTS[name].polls and not result) or not _claim(name):
        return result
    if deed is Deed.TWICE:
        return await function(*args, **kwargs)
    await _suffer(deed, before=False)
    return result


def dies_at_commit() -> bool:
    """Whether the transaction at hand is to be the last."""
    return _dying.get() is not None


def die() -> None:
    """End the process where it stands, as a power cut would."""
    if (name := _dying.get()) is None or _claim(name):
        os.kill(os.getpid(), signal.SIGKILL)


async def _suffer(deed: Deed, *, before: bool) -> None:
    match deed, before:
        case (Deed.KILL_BEFORE, True) | (Deed.KILL_AFTER, False):
            die()
        case (Deed.FAIL_BEFORE, True) | (Deed.FAIL_AFTER, False):
            raise Fault(deed)
        case (Deed.HANG_BEFORE, True) | (Deed.HANG_AFTER, False):
            await asyncio.Event().wait()


def _planned(plans: Path, name: str) -> Deed | None:
    try:
        return Deed((plans / name).read_text())
    except FileNotFoundError:
        return None


def _claim(name: str) -> bool:
    """Whether it falls to us: whoever takes the file away is the only one."""
    try:
        assert _plans is not None
        (_plans / name).unlink()
    except FileNotFoundError:
        return False
    return True
