"""`delete`, `start`, `stop`, `reboot`, `retry`: one or many VMs at once."""

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.guest import known_hosts
from leveret.client.cli.output import Format, Output, emit
from leveret.client.cli.session import VmNames, connect, run
from leveret.client.cli.together import outcome

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret, Receipt, Target
    from leveret.shared.documents import VmView

    Verb = Callable[[Leveret, VmView], Awaitable[Receipt]]

Wait = Annotated[bool, typer.Option("--wait", help="Return when it is done.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait.", min=1, metavar="SECONDS")]


def delete(
    ctx: typer.Context, vms: VmNames, wait: Wait = False, timeout: Timeout = 120, output: Output = Format.TABLE
) -> None:
    """Delete VMs, whatever state they are in."""
    _change(
        ctx, vms, "deleting", lambda leveret, vm: leveret.delete(vm.id), "deleted" if wait else None, timeout, output
    )


def start(
    ctx: typer.Context, vms: VmNames, wait: Wait = False, timeout: Timeout = 120, output: Output = Format.TABLE
) -> None:
    """Start stopped VMs."""
    _change(
        ctx, vms, "starting", lambda leveret, vm: leveret.start(vm.id), "running" if wait else None, timeout, output
    )


def stop(
    ctx: typer.Context,
    vms: VmNames,
    force: Annotated[bool, typer.Option("--force", help="Switch off at once, as by pulling the plug.")] = False,
    grace: Annotated[
        int, typer.Option(help="Seconds for the guest to shut down.", min=0, max=600, metavar="SECONDS")
    ] = 60,
    wait: Wait = False,
    timeout: Timeout = 120,
    output: Output = Format.TABLE,
) -> None:
    """Shut VMs down, and switch off those that have not in time."""
    grace_s = 0 if force else grace
    _change(
        ctx,
        vms,
        "stopping",
        lambda leveret, vm: leveret.stop(vm.id, grace_s=grace_s),
        "stopped" if wait else None,
        timeout,
        output,
    )


def reboot(
    ctx: typer.Context, vms: VmNames, wait: Wait = False, timeout: Timeout = 120, output: Output = Format.TABLE
) -> None:
    """Reset VMs, as the button on a machine does."""
    _change(
        ctx, vms, "rebooting", lambda leveret, vm: leveret.reboot(vm.id), "running" if wait else None, timeout, output
    )


def retry(
    ctx: typer.Context, vms: VmNames, wait: Wait = False, timeout: Timeout = 300, output: Output = Format.TABLE
) -> None:
    """Try VMs in `error` again, on any host."""
    _change(
        ctx, vms, "trying again", lambda leveret, vm: leveret.retry(vm.id), "running" if wait else None, timeout, output
    )


def _change(
    ctx: typer.Context,
    names: list[str],
    doing: str,
    verb: "Verb",
    wait: "Target | None",
    timeout_s: float,
    form: Format,
) -> None:
    """Do one thing to every VM, at the same time; a failure with one does not keep the others from it."""
    import asyncio

    async def one(leveret: "Leveret", name: str) -> "VmView | None":
        vm = await leveret.find(name)
        receipt = await verb(leveret, vm)
        if receipt.verdict == "queued":
            print(f"{vm.name}: queued; Leveret will do it as soon as it can", file=sys.stderr)
        elif not wait:
            print(f"{vm.name}: {doing}", file=sys.stderr)
        if doing == "deleting":
            known_hosts(vm.id).unlink(missing_ok=True)
        if wait:
            done = await leveret.wait(receipt, wait, timeout_s=timeout_s)
            print(f"{vm.name}: {done.state}", file=sys.stderr)
            return done
        return receipt.vm or vm

    async def all_of_them() -> "list[VmView | BaseException | None]":
        async with connect(ctx) as leveret:
            return await asyncio.gather(*(one(leveret, name) for name in names), return_exceptions=True)

    results = run(all_of_them())
    if form is not Format.TABLE:
        emit([vm for vm in results if vm is not None and not isinstance(vm, BaseException)], (), form)
    outcome(results)
