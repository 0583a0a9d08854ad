"""The broker users that speak for projects: `project amqp-users`, `add-amqp-user`, `remove-amqp-user`."""

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.output import Column, Format, Output, emit, emit_document, paint
from leveret.client.cli.session import (
    AnyProject,
    ProjectName,
    complete_amqp_user,
    connect,
    own_project,
    run,
)

if TYPE_CHECKING:
    from leveret.shared.documents import AmqpUserView

User = Annotated[str, typer.Argument(metavar="USER", help="Name of the broker user.")]
KnownUser = Annotated[
    str, typer.Argument(metavar="USER", help="Name of the broker user.", autocompletion=complete_amqp_user)
]
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


def list_(ctx: typer.Context, project: AnyProject = None, output: Output = Format.TABLE) -> None:
    """List the broker users that speak for a project."""

    async def body() -> "tuple[AmqpUserView, ...]":
        async with connect(ctx) as leveret:
            return await leveret.amqp_users(await own_project(leveret, project))

    emit(run(body()), AMQP_USER_COLUMNS, output)


def add(
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


def remove(ctx: typer.Context, project: ProjectName, user: KnownUser, broker_admin_url: BrokerAdminUrl = None) -> None:
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


AMQP_USER_COLUMNS = (
    Column("NAME", lambda user: user.name, style=lambda _: "bold"),
    Column("PROJECT", lambda user: user.project, rank=2),
    Column("ROLE", lambda user: user.role),
    Column("CREATED", lambda user: f"{user.created_at.astimezone():%Y-%m-%d %H:%M}", rank=1),
    Column("BY", lambda user: user.created_by or "-", rank=3),
)
