"""`project` and `quota`: projects, their limits, and the broker users that speak for them."""

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli import values
from leveret.client.cli.columns import memory_text
from leveret.client.cli.events import DEFAULT_LINES, Writer
from leveret.client.cli.output import Column, Format, Output, emit, emit_document, paint, write_facts, write_table
from leveret.client.cli.session import ProjectName, complete_project, connect, run
from leveret.client.cli.token import own_project

if TYPE_CHECKING:
    from leveret.shared.documents import AmqpUserView, ProjectView, UpdateQuota

AnyProject = Annotated[
    str | None,
    typer.Argument(metavar="PROJECT", help="Default: the token's own.", autocompletion=complete_project),
]
User = Annotated[str, typer.Argument(metavar="USER", help="Name of the broker user.")]
Vms = Annotated[str | None, typer.Option(metavar="N|none", help="VMs.")]
Vcpus = Annotated[str | None, typer.Option(metavar="N|none", help="vCPUs of all VMs.")]
Memory = Annotated[str | None, typer.Option(metavar="SIZE|none", help="Memory of all VMs: 64G.")]
Disk = Annotated[str | None, typer.Option(metavar="SIZE|none", help="Disks of all VMs: 1T.")]
RequestsPerS = Annotated[int | None, typer.Option("--requests-per-s", metavar="N", help="Requests a second, lasting.")]
RequestBurst = Annotated[int | None, typer.Option("--request-burst", metavar="N", help="Requests at once.")]
BrokerAdminUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="LEVERET_BROKER_ADMIN_URL",
        show_envvar=False,
        help="Of RabbitMQ's management API: http://ADMIN:PASSWORD@HOST:15672/VHOST. Better set as "
        "LEVERET_BROKER_ADMIN_URL, where others cannot read it. Default: the broker that `leveret up` started.",
    ),
]


class AmqpRoleChoice(StrEnum):
    """`leveret.shared.documents.AmqpRole`; a test compares them."""

    MEMBER = "member"
    READER = "reader"


app = typer.Typer(help="Look after projects and their broker users.", no_args_is_help=True, rich_markup_mode=None)
quota_app = typer.Typer(help="Show and set what a project may have.", no_args_is_help=True, rich_markup_mode=None)


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
    _show(_project(ctx, project), output)


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
    quota = _quota(vms, vcpus, memory, disk, requests_per_s, request_burst)

    async def body() -> "ProjectView":
        async with connect(ctx) as leveret:
            return await leveret.create_project(project, quota)

    made = run(body())
    print(f"{made.id}: created", file=sys.stderr)
    if output is not Format.TABLE:
        _show(made, output)


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
    after: Annotated[int | None, typer.Option(min=0, metavar="SEQ", help="All of those after this number.")] = None,
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


@app.command("amqp-users")
def amqp_users(ctx: typer.Context, project: AnyProject = None, output: Output = Format.TABLE) -> None:
    """List the broker users that speak for a project."""

    async def body() -> "tuple[AmqpUserView, ...]":
        async with connect(ctx) as leveret:
            return await leveret.amqp_users(await own_project(leveret, project))

    emit(run(body()), AMQP_USER_COLUMNS, output)


@app.command("add-amqp-user")
def add_amqp_user(
    ctx: typer.Context,
    project: ProjectName,
    user: User,
    role: Annotated[
        AmqpRoleChoice, typer.Option(metavar="ROLE", help="member asks for VMs, reader only follows events.")
    ] = AmqpRoleChoice.MEMBER,
    rotate: Annotated[bool, typer.Option("--rotate", help="Give it a new password; the old one ends.")] = False,
    broker_admin_url: BrokerAdminUrl = None,
    output: Output = Format.TABLE,
) -> None:
    """Let a broker user speak for a project, and make it at the broker with just the rights it needs.

    Its AMQP URL, with the password, is printed this once. Run again, it sets role and rights anew and leaves the
    password alone, unless --rotate is given.
    """
    from leveret.client.cli import broker
    from leveret.client.cli.faults import checked_word
    from leveret.shared.documents import AmqpUserName

    checked_word(AmqpUserName, user, "user")
    keeper = broker.keeper(ctx, broker_admin_url)

    async def body() -> None:
        async with connect(ctx) as leveret:
            await leveret.add_amqp_user(project, user, role=role.value)

    run(body())
    url = keeper.create(user, project, role.value, rotate=rotate)
    if output in {Format.JSON, Format.YAML}:
        emit_document({"name": user, "project": project, "role": role.value, "url": url}, output)
    elif url is None:
        print(f"{user} speaks for {project} as {role}. Its password stays; --rotate gives a new one.", file=sys.stderr)
    else:
        if output is Format.TABLE:
            told = f"{user} speaks for {project} as {role}. Its address is shown this once:"
            print(paint(told, "dim", sys.stderr), file=sys.stderr, flush=True)
        print(url)


@app.command("remove-amqp-user")
def remove_amqp_user(
    ctx: typer.Context, project: ProjectName, user: User, broker_admin_url: BrokerAdminUrl = None
) -> None:
    """Let a broker user speak for nobody, and delete it at the broker."""
    from leveret.client.cli import broker
    from leveret.client.errors import NotFound

    keeper = broker.keeper(ctx, broker_admin_url)

    async def body() -> None:
        async with connect(ctx) as leveret:
            # A broker user of another project must not be deleted, and this must be repeatable after any failure.
            if user not in {known.name for known in await leveret.amqp_users(project)}:
                raise NotFound("broker user", user)
            keeper.delete(user)
            await leveret.remove_amqp_user(project, user)

    run(body())
    print(f"{user}: removed", file=sys.stderr)


@quota_app.command("show")
def quota_show(ctx: typer.Context, project: AnyProject = None, output: Output = Format.TABLE) -> None:
    """Show a project's limits, and what it uses of them."""
    found = _project(ctx, project)
    if output is Format.TABLE:
        write_table(_usage_rows(found), USAGE_COLUMNS)
        rate = f"{found.quota.requests_per_s} requests a second, {found.quota.request_burst} at once"
        print(paint(rate, "dim"))
    elif output is Format.NAME:
        print(found.id)
    else:
        emit_document({"quota": found.quota.model_dump(), "usage": found.usage.model_dump()}, output)


@quota_app.command("set")
def quota_set(
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
    quota = _quota(vms, vcpus, memory, disk, requests_per_s, request_burst)
    if not quota.model_fields_set:
        raise typer.BadParameter(
            "give at least one limit: --vms, --vcpus, --memory, --disk, --requests-per-s, --request-burst."
        )

    async def body() -> "ProjectView":
        async with connect(ctx) as leveret:
            return await leveret.set_quota(await own_project(leveret, project), quota)

    changed = run(body())
    if output is Format.TABLE:
        write_table(_usage_rows(changed), USAGE_COLUMNS)
    else:
        _show(changed, output)


def confirm(question: str, yes: bool) -> None:
    """Ask, unless told not to. Where nobody can be asked it is a usage error."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody is there to be asked.", param_hint="--yes")
    if not typer.confirm(question, err=True):
        raise typer.Exit(1)


def _project(ctx: typer.Context, project: str | None) -> "ProjectView":
    async def body() -> "ProjectView":
        async with connect(ctx) as leveret:
            return await leveret.project(await own_project(leveret, project))

    return run(body())


def _quota(
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


def _show(project: "ProjectView", form: Format) -> None:
    if form is Format.NAME:
        print(project.id)
    elif form is not Format.TABLE:
        emit_document(project.model_dump(mode="json"), form)
    else:
        facts = [(row["what"], f"{row['used']} of {row['limit']}") for row in _usage_rows(project)]
        rate = f"{project.quota.requests_per_s} a second, {project.quota.request_burst} at once"
        created = f"{project.created_at.astimezone():%Y-%m-%d %H:%M:%S}"
        write_facts([("name", paint(project.id, "bold")), *facts, ("requests", rate), ("created", created)])


def _usage_rows(project: "ProjectView") -> list[dict[str, str]]:
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


def _of(field: str, project: "ProjectView") -> str:
    row = next(row for row in _usage_rows(project) if row["what"] == field)
    return row["used"] if row["limit"] == "no limit" else f"{row['used']}/{row['limit']}"


USAGE_COLUMNS = (
    Column("", lambda row: row["what"], style=lambda _: "bold"),
    Column("USED", lambda row: row["used"]),
    Column("LIMIT", lambda row: row["limit"]),
)

PROJECT_COLUMNS = (
    Column("NAME", lambda project: project.id, style=lambda _: "bold"),
    Column("VMS", lambda project: _of("VMs", project)),
    Column("VCPUS", lambda project: _of("vCPUs", project), rank=1),
    Column("MEMORY", lambda project: _of("memory", project), rank=2),
    Column("DISK", lambda project: _of("disk", project), rank=3),
    Column("CREATED", lambda project: f"{project.created_at.astimezone():%Y-%m-%d}", rank=4),
)

AMQP_USER_COLUMNS = (
    Column("NAME", lambda user: user.name, style=lambda _: "bold"),
    Column("PROJECT", lambda user: user.project, rank=2),
    Column("ROLE", lambda user: user.role),
    Column("CREATED", lambda user: f"{user.created_at.astimezone():%Y-%m-%d %H:%M}", rank=1),
    Column("BY", lambda user: user.created_by or "-", rank=3),
)
