"""`token` and `whoami`: who may ask."""

import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leveret.client.cli.output import Column, Format, Output, emit, emit_document, paint, write_facts
from leveret.client.cli.session import InProject, complete_token, config, connect, own_project, run
from leveret.client.errors import Ambiguous, NotFound

if TYPE_CHECKING:
    from leveret.shared.documents import NewTokenView, TokenView


class RoleChoice(StrEnum):
    """`leveret.shared.documents.Role`, which would load pydantic for `--help`; a test compares them."""

    ADMIN = "admin"
    MEMBER = "member"
    READER = "reader"


app = typer.Typer(help="Make, list and revoke tokens.", no_args_is_help=True, rich_markup_mode=None)


def whoami(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """Show whose token is used, where, and what it may do."""
    settings = config(ctx)

    async def body() -> dict[str, Any]:
        async with connect(ctx) as leveret:
            return await leveret.whoami()

    found = run(body())
    token = found.get("token") or {}
    expires_at = datetime.fromisoformat(token["expires_at"]) if token.get("expires_at") else None
    if output is Format.NAME:
        print(token.get("name", ""))
    elif output is Format.TABLE:
        write_facts(
            [
                ("token", paint(str(token.get("name", "")), "bold")),
                ("project", str(found.get("project", ""))),
                ("role", str(found.get("role", ""))),
                ("expires", _when(expires_at, "never")),
                ("url", settings.url),
                ("context", settings.context or ""),
            ]
        )
    else:
        emit_document(found | {"url": settings.url, "context": settings.context}, output)


@app.command("list")
def list_(
    ctx: typer.Context,
    project: InProject = None,
    everything: Annotated[bool, typer.Option("-a", "--all", help="Those that are revoked or expired, too.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """List tokens; never their secrets."""

    async def body() -> "list[TokenView]":
        async with connect(ctx) as leveret:
            found = await leveret.tokens(await own_project(leveret, project))
            return [token for token in found if everything or standing(token) == "valid"]

    emit(run(body()), TOKEN_COLUMNS, output)


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Says who or what will hold it.")],
    role: Annotated[
        RoleChoice, typer.Option(metavar="ROLE", help="reader looks, member changes VMs, admin does everything.")
    ] = RoleChoice.MEMBER,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="30d, 12h, or a date such as 2027-01-31. Default: never.")
    ] = None,
    project: InProject = None,
    output: Output = Format.TABLE,
) -> None:
    """Make a token. Its secret is printed this once, and stored nowhere.

    With -o name the secret stands alone on standard output: leveret token create ci -o name > ci.token
    """
    from leveret.client.cli.faults import checked
    from leveret.client.cli.values import expiry
    from leveret.shared.documents import CreateToken

    at = expiry(expires, datetime.now(UTC)) if expires else None
    asked = checked(CreateToken, {"name": name, "role": role.value, "expires_at": at}, rename={"name": "token_name"})

    async def body() -> "NewTokenView":
        async with connect(ctx) as leveret:
            return await leveret.create_token(await own_project(leveret, project), asked)

    made = run(body())
    if output in {Format.JSON, Format.YAML}:
        emit_document(made.model_dump(mode="json"), output)
        return
    until = f" until {made.expires_at.astimezone():%Y-%m-%d %H:%M}" if made.expires_at else ""
    told = f"Token {made.name} of project {made.project}: {made.role}{until}. It is shown this once:"
    if output is Format.TABLE:
        print(paint(told, "dim", sys.stderr), file=sys.stderr, flush=True)
    print(made.token)


@app.command()
def revoke(
    ctx: typer.Context,
    tokens: Annotated[list[str], typer.Argument(metavar="TOKEN", help="Names or ids.", autocompletion=complete_token)],
    project: InProject = None,
) -> None:
    """End tokens. They work nowhere five seconds later."""

    async def body() -> None:
        async with connect(ctx) as leveret:
            home = await own_project(leveret, project)
            known = await leveret.tokens(home)
            for found in [one_of(known, text) for text in tokens]:  # none is revoked when one is not there
                await leveret.revoke_token(home, found.id)
                print(f"{found.name}: revoked", file=sys.stderr)

    run(body())


def one_of(known: "tuple[TokenView, ...]", text: str) -> "TokenView":
    """The token that is meant. Raises NotFound, or Ambiguous."""
    found = [token for token in known if str(token.id) == text.lower()]
    found = found or [token for token in known if token.name == text and token.revoked_at is None]
    if not found:
        raise NotFound("token", text)
    if len(found) > 1:
        raise Ambiguous(text, [str(token.id) for token in found])
    return found[0]


def standing(token: "TokenView", now: datetime | None = None) -> str:
    if token.revoked_at is not None:
        return "revoked"
    return "expired" if token.expires_at is not None and token.expires_at <= (now or datetime.now(UTC)) else "valid"


def _when(at: datetime | None, otherwise: str) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M}" if at else otherwise


TOKEN_COLUMNS = (
    Column("NAME", lambda token: token.name, style=lambda _: "bold"),
    Column("ROLE", lambda token: token.role),
    Column("STATE", standing, style=lambda text: {"valid": "green", "expired": "magenta"}.get(text, "dim")),
    Column("EXPIRES", lambda token: _when(token.expires_at, "never"), rank=1),
    Column("USED", lambda token: _when(token.last_used_at, "never"), rank=2),
    Column("CREATED", lambda token: _when(token.created_at, "-"), rank=3),
    Column("BY", lambda token: token.created_by or "-", rank=4),
    Column("ID", lambda token: str(token.id), rank=5),
)
