"""`wait`: until VMs are what is wanted."""

import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.output import Format, Output, emit
from leveret.client.cli.session import VmNames, connect, run
from leveret.client.cli.together import outcome
from leveret.client.cli.values import duration
from leveret.client.errors import NotFound

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret
    from leveret.shared.documents import VmView


class Goal(StrEnum):
    """The targets of `leveret.client.Leveret.wait`; a test compares them."""

    RUNNING = "running"
    READY = "ready"
    STOPPED = "stopped"
    DELETED = "deleted"


def wait(
    ctx: typer.Context,
    vms: VmNames,
    target: Annotated[
        Goal, typer.Option("--for", metavar="STATE", help="running, ready (its guest said so), stopped or deleted.")
    ],
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How long to wait.")] = 300,
    output: Output = Format.TABLE,
) -> None:
    """Wait until every one of these VMs is so.

    One that cannot get there by itself makes the exit code 5, one that is late makes it 6.
    """
    import asyncio

    started = time.monotonic()

    async def one(leveret: "Leveret", name: str) -> "VmView | None":
        try:
            vm = await leveret.find(name)
        except NotFound:
            if target is not Goal.DELETED:
                raise
            print(f"{name}: there is none", file=sys.stderr)
            return None
        done = await leveret.wait(vm.id, target.value, timeout_s=timeout)
        print(f"{vm.name}: {target.value} ({duration(time.monotonic() - started)})", file=sys.stderr)
        return done

    async def all_of_them() -> "list[VmView | BaseException | None]":
        async with connect(ctx) as leveret:
            return await asyncio.gather(*(one(leveret, name) for name in dict.fromkeys(vms)), return_exceptions=True)

    found = run(all_of_them())
    if output is not Format.TABLE:
        emit([vm for vm in found if vm is not None and not isinstance(vm, BaseException)], (), output)
    outcome(found)
