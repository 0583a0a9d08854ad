"""`quota`: what a project may have."""

from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli import values
from leveret.client.cli.columns import memory_text
from leveret.client.cli.output import Column, Format, Output, emit_document, paint, write_table
from leveret.client.cli.session import AnyProject, connect, own_project, run

if TYPE_CHECKING:
    from leveret.shared.documents import ProjectView, UpdateQuota

Vms = Annotated[str | None, typer.Option(metavar="N|none", help="VMs.")]
Vcpus = Annotated[str | None, typer.Option(metavar="N|none", help="vCPUs of all VMs.")]
Memory = Annotated[str | None, typer.Option(metavar="SIZE|none", help="Memory of all VMs: 64G.")]
Disk = Annotated[str | None, typer.Option(metavar="SIZE|none", help="Disks of all VMs: 1T.")]
RequestsPerS = Annotated[int | None, typer.Option("--requests-per-s", metavar="N", help="Requests a second, lasting.")]
RequestBurst = Annotated[int | None, typer.Option("--request-burst", metavar="N", help="Requests at once.")]

app = typer.Typer(help="Show and set what a project may have.", no_args_is_help=True, rich_markup_mode=None)


@app.command("show")
def show(ctx: typer.Context, project: AnyProject = None, output: Output = Format.TABLE) -> None:
    """Show a project's limits, and what it uses of them."""

    async def body() -> "ProjectView":
        async with connect(ctx) as leveret:
            return await leveret.project(await own_project(leveret, project))

    found = run(body())
    if output is Format.TABLE:
        write_table(usage_rows(found), USAGE_COLUMNS)
        rate = f"{values.count(found.quota.requests_per_s, 'request')} a second, {found.quota.request_burst} at once"
        print(paint(rate, "dim"))
    elif output is Format.NAME:
        print(found.id)
    else:
        emit_document({"quota": found.quota.model_dump(), "usage": found.usage.model_dump()}, output)


@app.command("set")
def set_(
    ctx: typer.Context,
    project: AnyProject = None,
    vms: Vms = None,
    vcpus: Vcpus = None,
    memory: Memory = None,
    disk: Disk = None,
    requests_per_s: RequestsPerS = None,
    request_burst: RequestBurst = None,
    output: Output = Format.TABLE,
) -> None:
    """Set limits of a project; `none` is no limit. What is not given stays."""
    quota = limits(vms, vcpus, memory, disk, requests_per_s, request_burst)
    if not quota.model_fields_set:
        raise typer.BadParameter(
            "give at least one limit: --vms, --vcpus, --memory, --disk, --requests-per-s, --request-burst."
        )

    async def body() -> "ProjectView":
        async with connect(ctx) as leveret:
            return await leveret.set_quota(await own_project(leveret, project), quota)

    changed = run(body())
    if output is Format.TABLE:
        write_table(usage_rows(changed), USAGE_COLUMNS)
    elif output is Format.NAME:
        print(changed.id)
    else:
        emit_document(changed.model_dump(mode="json"), output)


def limits(
    vms: str | None,
    vcpus: str | None,
    memory: str | None,
    disk: str | None,
    requests_per_s: int | None,
    request_burst: int | None,
) -> "UpdateQuota":
    """The limits that were given, and only those."""
    from leveret.client.cli.faults import checked
    from leveret.shared.documents import UpdateQuota

    rates = {"requests_per_s": requests_per_s, "request_burst": request_burst}
    asked = {
        **values.limit(vms, option="--vms"),
        **values.limit(vcpus, option="--vcpus"),
        **values.limit(memory, option="--memory", unit="M"),
        **values.limit(disk, option="--disk", unit="G"),
        **{name: rate for name, rate in rates.items() if rate is not None},
    }
    return checked(UpdateQuota, asked, rename={"vcpus": "vms", "memory_mib": "vms", "disk_gib": "vms"})


def usage_rows(project: "ProjectView") -> list[dict[str, str]]:
    def text(field: str, amount: int | None) -> str:
        if amount is None:
            return "no limit"
        return {"memory_mib": memory_text(amount), "disk_gib": f"{amount}G"}.get(field, str(amount))

    names = {"vms": "VMs", "vcpus": "vCPUs", "memory_mib": "memory", "disk_gib": "disk"}
    return [
        {"what": name, "used": text(field, getattr(project.usage, field)), "limit": text(field, limit)}
        for field, name in names.items()
        for limit in [getattr(project.quota, field)]
    ]


USAGE_COLUMNS = (
    Column("", lambda row: row["what"], style=lambda _: "bold"),
    Column("USED", lambda row: row["used"]),
    Column("LIMIT", lambda row: row["limit"]),
)
