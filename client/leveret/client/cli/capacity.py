"""`capacity`: how many more VMs there is room for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli import values
from leveret.client.cli.output import Column, Format, Output, emit_document, write_table
from leveret.client.cli.session import complete_zone, connect, run

if TYPE_CHECKING:
    from leveret.shared.placements import CapacityReport


@dataclass(frozen=True, slots=True)
class _Row:
    zone: str
    vms: int


COLUMNS = (
    Column("ZONE", lambda row: row.zone, style=lambda text: "bold" if text == _TOTAL else ""),
    Column("VMS", lambda row: str(row.vms)),
)
_TOTAL = "all"


def capacity(
    ctx: typer.Context,
    vcpus: Annotated[int, typer.Option(metavar="N")] = 1,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="512M, 2G.")] = "1G",
    disk: Annotated[str, typer.Option(metavar="SIZE", help="10G.")] = "10G",
    zone: Annotated[
        list[str] | None,
        typer.Option(metavar="ZONE", help="Only these zones.", autocompletion=complete_zone),
    ] = None,
    require_label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Labels that a host must have.")
    ] = None,
    forbid_label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Labels that a host must not have.")
    ] = None,
    tolerate: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Count hosts with this taint too.")
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Say how many more VMs there is room for.

    It says so for VMs of this size in each zone, by the hosts as they are now; the next moment may differ. Quotas are
    not looked at.
    """
    from leveret.client.cli.faults import checked
    from leveret.shared.placements import AskCapacity

    asked = {
        "vcpus": vcpus,
        "memory_mib": values.size(memory, unit="M", option="--memory"),
        "disk_gib": values.size(disk, unit="G", option="--disk"),
        "placement": {
            "zones": zone or [],
            "require_labels": values.pairs(require_label or [], option="--require-label"),
            "forbid_labels": values.pairs(forbid_label or [], option="--forbid-label"),
            "tolerate": values.pairs(tolerate or [], option="--tolerate"),
        },
    }
    shape = checked(AskCapacity, asked)

    async def body() -> "CapacityReport":
        async with connect(ctx) as leveret:
            return await leveret.capacity(shape)

    show(run(body()), output)


def show(report: "CapacityReport", form: Format) -> None:
    if form is Format.NAME:
        print(report.total)
    elif form is not Format.TABLE:
        emit_document(report.model_dump(mode="json"), form)
    else:
        rows = [_Row(zone, vms) for zone, vms in sorted(report.zones.items())]
        write_table([*rows, _Row(_TOTAL, report.total)], COLUMNS)
