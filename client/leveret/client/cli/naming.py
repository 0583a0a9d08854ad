"""`rename` and `label`: what a VM is called."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.output import Format, Output, emit
from leveret.client.cli.session import VmName, complete_vm, connect, run
from leveret.client.cli.together import outcome

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret
    from leveret.shared.documents import UpdateVm, VmView


def rename(
    ctx: typer.Context,
    vm: VmName,
    new_name: Annotated[str, typer.Argument(metavar="NEW")],
    output: Output = Format.TABLE,
) -> None:
    """Call a VM otherwise. Its guest keeps the hostname that it was made with."""
    from leveret.client.cli.faults import checked
    from leveret.shared.documents import UpdateVm

    _update(ctx, [vm], checked(UpdateVm, {"name": new_name}, rename={"name": "new_name"}), output)


def label(
    ctx: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="VM|KEY=VALUE|KEY-",
            help="KEY=VALUE sets a label, KEY- removes it.",
            autocompletion=complete_vm,
        ),
    ],
    output: Output = Format.TABLE,
) -> None:
    """Set and remove labels of VMs.

    Other labels stay: leveret label web db tier=front old-
    """
    from leveret.client.cli.faults import checked
    from leveret.client.cli.values import label_changes
    from leveret.shared.documents import UpdateVm

    # No name of a VM has '=' in it or ends with '-'.
    names = [word for word in words if "=" not in word and not word.endswith("-")]
    changes = label_changes([word for word in words if word not in names])
    if not names or not changes:
        raise typer.BadParameter("give VMs and labels: leveret label web tier=front old-")
    _update(ctx, names, checked(UpdateVm, {"labels": changes}), output)


def _update(ctx: typer.Context, names: list[str], change: "UpdateVm", form: Format) -> None:
    import asyncio

    async def one(leveret: "Leveret", name: str) -> "VmView":
        vm = await leveret.find(name)
        receipt = await leveret.update(vm.id, change)
        after = receipt.vm or vm
        if receipt.verdict == "queued":
            print(f"{vm.name}: queued; Leveret will do it as soon as it can", file=sys.stderr)
        elif change.name:
            print(f"{vm.name}: renamed to {after.name}", file=sys.stderr)
        else:
            print(f"{vm.name}: {labels_text(after)}", file=sys.stderr)
        return after

    async def all_of_them() -> "list[VmView | BaseException]":
        async with connect(ctx) as leveret:
            return await asyncio.gather(*(one(leveret, name) for name in names), return_exceptions=True)

    found = run(all_of_them())
    if form is not Format.TABLE:
        emit([vm for vm in found if not isinstance(vm, BaseException)], (), form)
    outcome(found)


def labels_text(vm: "VmView") -> str:
    return ", ".join(f"{key}={value}" if value else key for key, value in sorted(vm.labels.items())) or "no labels"
