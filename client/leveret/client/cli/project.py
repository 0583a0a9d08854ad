"""`project`: who owns VMs."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli import amqp_users
from leveret.client.cli.events import DEFAULT_LINES, LAST_POSSIBLE, Writer
from leveret.client.cli.output import Column, Format, Output, emit, emit_document, paint, write_facts
from leveret.client.cli.quota import Disk, Memory, RequestBurst, RequestsPerS, Vcpus, Vms, limits, usage_rows
from leveret.client.cli.session import AnyProject, ProjectName, confirm, connect, own_project, run

if TYPE_CHECKING:
    from leveret.shared.documents import ProjectView

app = typer.Typer(help="Look after projects and their broker users.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """List the projects that this token may see, and what they use."""

    async def body() -> "tuple[ProjectView, ...]":
        async with connect(ctx) as leveret:
            return await leveret.list_projects()

    found = run(body())
    if output is Format.NAME:
        for project in found:
            print(project.id)
    else:
        emit(found, PROJECT_COLUMNS, output)


@app.command()
def show(ctx: typer.Context, project: AnyProject = None, output: Output = Format.TABLE) -> None:
    """Show a project: its limits, and what it uses of them."""

    async def body() -> "ProjectView":
        async with connect(ctx) as leveret:
            return await leveret.project(await own_project(leveret, project))

    write_project(run(body()), output)


@app.command()
def create(
    ctx: typer.Context,
    project: Annotated[str, typer.Argument(metavar="PROJECT", help="Lower-case letters, digits and '-'.")],
    vms: Vms = None,
    vcpus: Vcpus = None,
    memory: Memory = None,
    disk: Disk = None,
    requests_per_s: RequestsPerS = None,
    request_burst: RequestBurst = None,
    output: Output = Format.TABLE,
) -> None:
    """Make a project. Again with the same limits, it is the same project."""
    from leveret.client.cli.faults import checked_word
    from leveret.shared.documents import ProjectId

    checked_word(ProjectId, project, "project")
    quota = limits(vms, vcpus, memory, disk, requests_per_s, request_burst)

    async def body() -> "ProjectView":
        async with connect(ctx) as leveret:
            return await leveret.create_project(project, quota)

    made = run(body())
    print(f"{made.id}: created", file=sys.stderr)
    if output is not Format.TABLE:
        write_project(made, output)


@app.command()
def delete(
    ctx: typer.Context,
    project: ProjectName,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Close a project that has no VMs any more.

    Its tokens and broker users end, and its name is never used again.
    """
    confirm(f"Close project {project} for ever, with its tokens and broker users?", yes)

    async def body() -> None:
        async with connect(ctx) as leveret:
            await leveret.delete_project(project)

    run(body())
    print(f"{project}: closed", file=sys.stderr)


@app.command()
def events(
    ctx: typer.Context,
    project: ProjectName,
    after: Annotated[
        int | None, typer.Option(min=0, max=LAST_POSSIBLE, metavar="SEQ", help="All of those after this number.")
    ] = None,
    lines: Annotated[int, typer.Option("-n", min=1, metavar="N", help="How many of the newest.")] = DEFAULT_LINES,
    output: Output = Format.TABLE,
) -> None:
    """Show what happened in a project: for its own, `leveret events` does more."""
    writer = Writer(output, with_name=True)

    async def body() -> None:
        async with connect(ctx) as leveret:
            found = [event async for event in leveret.project_events(project, after=after or 0)]
            for event in found if after is not None else found[-lines:]:
                writer.write(event)

    run(body())


app.command("amqp-users")(amqp_users.list_)
app.command("add-amqp-user")(amqp_users.add)
app.command("remove-amqp-user")(amqp_users.remove)


def write_project(project: "ProjectView", form: Format) -> None:
    if form is Format.NAME:
        print(project.id)
    elif form is not Format.TABLE:
        emit_document(project.model_dump(mode="json"), form)
    else:
        facts = [(row["what"], f"{row['used']} of {row['limit']}") for row in usage_rows(project)]
        rate = f"{project.quota.requests_per_s} a second, {project.quota.request_burst} at once"
        created = f"{project.created_at.astimezone():%Y-%m-%d %H:%M:%S}"
        write_facts([("name", paint(project.id, "bold")), *facts, ("requests", rate), ("created", created)])


def _of(field: str, project: "ProjectView") -> str:
    row = next(row for row in usage_rows(project) if row["what"] == field)
    return row["used"] if row["limit"] == "no limit" else f"{row['used']}/{row['limit']}"


PROJECT_COLUMNS = (
    Column("NAME", lambda project: project.id, style=lambda _: "bold"),
    Column("VMS", lambda project: _of("VMs", project)),
    Column("VCPUS", lambda project: _of("vCPUs", project), rank=1),
    Column("MEMORY", lambda project: _of("memory", project), rank=2),
    Column("DISK", lambda project: _of("disk", project), rank=3),
    Column("CREATED", lambda project: f"{project.created_at.astimezone():%Y-%m-%d}", rank=4),
)
