"""`group`: VMs that are placed with regard to each other."""

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.output import Column, Format, Output, emit, emit_document, paint, write_facts
from leveret.client.cli.session import GroupName, GroupNames, connect, run
from leveret.client.cli.together import outcome

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret
    from leveret.shared.groups import GroupView


class PolicyChoice(StrEnum):
    """`leveret.shared.groups.Policy`; a test compares them."""

    SPREAD = "spread"
    PACK = "pack"


class TopologyChoice(StrEnum):
    """`leveret.shared.groups.Topology`; a test compares them."""

    HOST = "host"
    ZONE = "zone"


app = typer.Typer(
    help="Keep VMs apart, or together.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """List the groups."""

    async def body() -> "tuple[GroupView, ...]":
        async with connect(ctx) as leveret:
            return await leveret.groups()

    emit(run(body()), COLUMNS, output)


@app.command()
def show(ctx: typer.Context, group: GroupName, output: Output = Format.TABLE) -> None:
    """Show a group."""

    async def body() -> "GroupView":
        async with connect(ctx) as leveret:
            return await leveret.group(group)

    found = run(body())
    if output is Format.TABLE:
        write_facts(facts(found))
    else:
        _emit(found, output)


@app.command()
def create(
    ctx: typer.Context,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="Lower-case letters, digits and '-'.")],
    policy: Annotated[
        PolicyChoice, typer.Option(metavar="spread|pack", help="Keep its VMs apart, or together.")
    ] = PolicyChoice.SPREAD,
    topology: Annotated[
        TopologyChoice, typer.Option(metavar="host|zone", help="Apart or together on hosts, or in zones.")
    ] = TopologyChoice.HOST,
    soft: Annotated[
        bool,
        typer.Option("--soft", help="As near to it as there is room. Default: refuse a VM that would break it."),
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Make a group. Made again as it was made, it is the same group."""
    from leveret.client.cli.faults import checked
    from leveret.shared.groups import CreateGroup

    asked = {
        "name": group,
        "policy": policy.value,
        "topology": topology.value,
        "enforcement": "soft" if soft else "hard",
    }
    wish = checked(CreateGroup, asked, rename={"name": "group_name"})

    async def body() -> "GroupView":
        async with connect(ctx) as leveret:
            return await leveret.create_group(wish)

    made = run(body())
    print(f"{made.name}: created; join it with `leveret create --group {made.name}`", file=sys.stderr)
    _emit(made, output)


@app.command()
def delete(ctx: typer.Context, groups: GroupNames) -> None:
    """Forget groups that have no VMs any more."""

    import asyncio

    async def one(leveret: "Leveret", name: str) -> None:
        await leveret.delete_group(name)
        print(f"{name}: deleted", file=sys.stderr)

    async def all_of_them() -> list[BaseException | None]:
        async with connect(ctx) as leveret:
            return await asyncio.gather(*(one(leveret, name) for name in groups), return_exceptions=True)

    outcome(run(all_of_them()))


def _emit(group: "GroupView", form: Format) -> None:
    if form is Format.NAME:
        print(group.name)
    elif form is not Format.TABLE:
        emit_document(group.model_dump(mode="json"), form)


#: What a group does, in words, by policy and topology.
_RULES = {
    ("spread", "host"): "no two on one host",
    ("spread", "zone"): "no two in one zone",
    ("pack", "host"): "all on one host",
    ("pack", "zone"): "all in one zone",
}


def rule_text(group: "GroupView") -> str:
    rule = _RULES[group.policy, group.topology]
    return rule if group.enforcement == "hard" else f"{rule}, as far as there is room"


def facts(group: "GroupView") -> list[tuple[str, str]]:
    return [
        ("name", paint(group.name, "bold")),
        ("rule", rule_text(group)),
        ("policy", f"{group.policy}, {group.enforcement}, by {group.topology}"),
        ("VMs", str(group.vms)),
        ("created", f"{group.created_at.astimezone():%Y-%m-%d %H:%M:%S}"),
    ]


COLUMNS = (
    Column("NAME", lambda group: group.name, style=lambda _: "bold"),
    Column("POLICY", lambda group: group.policy),
    Column("ENFORCEMENT", lambda group: group.enforcement, rank=2),
    Column("TOPOLOGY", lambda group: group.topology, rank=1),
    Column("VMS", lambda group: str(group.vms)),
    Column("CREATED", lambda group: f"{group.created_at.astimezone():%Y-%m-%d}", rank=3),
)
