"""What commands that talk to the API share: settings, a connection, an event loop, questions, names to complete."""

import gc
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from leveret.client import config as configs
from leveret.client.errors import ClientError, ConfigError, Unreachable
from leveret.client.inputs import check_token

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret

T = TypeVar("T")

#: A person waits for the answer: an API that is being restarted is back by then.
RETRY_FOR_S = 4.0
_COMPLETION_RETRY_S = 0.0
_WONDER_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Globals:
    """The options before the command's name."""

    url: str | None = None
    token_file: Path | None = None
    context: str | None = None


def flags(ctx: typer.Context) -> Globals:
    given = ctx.find_object(Globals)
    if given is not None:
        return given
    # A shell that asks for completions runs no callback; what was typed so far is there all the same.
    typed = ctx.find_root().params
    file = typed.get("token_file")
    return Globals(typed.get("url"), Path(file) if file else None, typed.get("context"))


def config(ctx: typer.Context) -> configs.Config:
    """The settings in force. Raises ConfigError when they do not suffice."""
    chosen = flags(ctx)
    token = token_from(chosen.token_file) if chosen.token_file else None
    return configs.load(os.environ, url=chosen.url, token=token, context=chosen.context)


def token_from(file: Path) -> str:
    """The token in a file, or on standard input when that is `-`."""
    if str(file) != "-":
        return configs.read_token(file)
    return check_token(sys.stdin.readline().strip(), "the first line of standard input")


def connect(ctx: typer.Context, *, retry_for_s: float = RETRY_FOR_S) -> "Leveret":
    from leveret.client.leveret import Leveret

    gc.enable()  # from here on there may be garbage: see `main`
    settings = config(ctx)
    return Leveret(settings.url, settings.token, retry_for_s=retry_for_s, on_retry=RetryNotice())


class RetryNotice:
    """Says once on standard error that the API does not answer, when a person begins to wonder."""

    def __init__(self) -> None:
        self._told = False

    def __call__(self, failure: ClientError, failing_s: float, left_s: float) -> None:
        if self._told or failing_s < _WONDER_AFTER_S or not isinstance(failure, Unreachable):
            return
        self._told = True
        print(f"The API does not answer; trying again for {left_s:.0f} s.", file=sys.stderr, flush=True)


def run(main: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(main)


async def own_project(leveret: "Leveret", chosen: str | None) -> str:
    """The project that is meant: the one that was named, else the token's own."""
    return chosen or str((await leveret.whoami())["project"])


class NobodyToAsk(typer.BadParameter):
    """A usage error, but no value is invalid: it is told without those words."""

    def format_message(self) -> str:
        return self.message


def somebody_can_be_asked(yes: bool) -> None:
    """Raises the usage error of `confirm`, before anything else is done."""
    if not yes and not sys.stdin.isatty():
        raise NobodyToAsk("This asks before it goes on, and there is no terminal to ask on: give --yes.")


def confirm(question: str, yes: bool) -> None:
    """Ask, unless told not to. Where nobody can be asked it is a usage error."""
    somebody_can_be_asked(yes)
    if not yes and not typer.confirm(question, err=True):
        raise typer.Exit(1)


# The names of things, for the shell. A completion that cannot be made is silent.


def _completion(
    names: "Callable[[Leveret, typer.Context], AsyncIterator[str]]",
) -> Callable[[typer.Context, str], list[str]]:
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        async def ask() -> list[str]:
            async with connect(ctx, retry_for_s=_COMPLETION_RETRY_S) as leveret:
                return [name async for name in names(leveret, ctx) if name.startswith(incomplete)]

        try:
            return run(ask())
        except ClientError:
            return []

    return complete


async def _vms(leveret: "Leveret", _ctx: typer.Context) -> AsyncIterator[str]:
    async for vm in leveret.list():
        yield vm.name


async def _images(leveret: "Leveret", _ctx: typer.Context) -> AsyncIterator[str]:
    for image in await leveret.images():
        yield image.name


async def _hosts(leveret: "Leveret", _ctx: typer.Context) -> AsyncIterator[str]:
    for host in await leveret.hosts():
        yield host.name


async def _projects(leveret: "Leveret", _ctx: typer.Context) -> AsyncIterator[str]:
    for project in await leveret.list_projects():
        yield project.id


async def _tokens(leveret: "Leveret", ctx: typer.Context) -> AsyncIterator[str]:
    for token in await leveret.tokens(await own_project(leveret, ctx.params.get("project"))):
        if token.revoked_at is None:
            yield token.name


async def _amqp_users(leveret: "Leveret", ctx: typer.Context) -> AsyncIterator[str]:
    for user in await leveret.amqp_users(await own_project(leveret, ctx.params.get("project"))):
        yield user.name


async def _groups(leveret: "Leveret", _ctx: typer.Context) -> AsyncIterator[str]:
    for group in await leveret.groups():
        yield group.name


async def _zones(leveret: "Leveret", _ctx: typer.Context) -> AsyncIterator[str]:
    for zone in sorted((await leveret.capacity()).zones):
        yield zone


complete_vm = _completion(_vms)
complete_image = _completion(_images)
complete_host = _completion(_hosts)
complete_group = _completion(_groups)
complete_zone = _completion(_zones)
complete_project = _completion(_projects)
complete_token = _completion(_tokens)
complete_amqp_user = _completion(_amqp_users)


def complete_context(incomplete: str) -> list[str]:
    try:
        contexts = configs.read_contexts(configs.config_path(os.environ))
    except ConfigError:
        return []
    return [name for name in contexts.by_name if name.startswith(incomplete)]


VmName = Annotated[str, typer.Argument(metavar="VM", help="Name or id.", autocompletion=complete_vm)]
VmNames = Annotated[list[str], typer.Argument(metavar="VM", help="Names or ids.", autocompletion=complete_vm)]
HostName = Annotated[str, typer.Argument(metavar="HOST", help="Name or id.", autocompletion=complete_host)]
HostNames = Annotated[list[str], typer.Argument(metavar="HOST", help="Names or ids.", autocompletion=complete_host)]
GroupName = Annotated[str, typer.Argument(metavar="GROUP", autocompletion=complete_group)]
GroupNames = Annotated[list[str], typer.Argument(metavar="GROUP", autocompletion=complete_group)]
ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", autocompletion=complete_project)]
AnyProject = Annotated[
    str | None,
    typer.Argument(metavar="PROJECT", help="Default: the token's own.", autocompletion=complete_project),
]
InProject = Annotated[
    str | None,
    typer.Option(
        "-p", "--project", metavar="PROJECT", help="Default: the token's own.", autocompletion=complete_project
    ),
]
