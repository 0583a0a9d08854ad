"""What every command that talks to the API needs: settings, a connection, an event loop."""

import gc
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from leveret.client import config as configs
from leveret.client.errors import ClientError, ConfigError

if TYPE_CHECKING:
    from leveret.client.leveret import Leveret

T = TypeVar("T")

#: A person waits for the answer: an API that is being restarted is back by then.
RETRY_FOR_S = 4.0
_COMPLETION_RETRY_S = 0.0


@dataclass(frozen=True, slots=True)
class Globals:
    """The options before the command's name."""

    url: str | None = None
    token_file: Path | None = None


def config(ctx: typer.Context) -> configs.Config:
    chosen = ctx.find_object(Globals) or Globals()
    token = None
    if chosen.token_file:
        try:
            token = chosen.token_file.read_text().strip()
        except OSError as error:
            raise ConfigError(f"cannot read the token: {error}") from error
    return configs.load(os.environ, url=chosen.url, token=token)


def connect(ctx: typer.Context, *, retry_for_s: float = RETRY_FOR_S) -> "Leveret":
    # pydantic would look through every installed distribution for plug-ins, for longer than the API takes to answer.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from leveret.client.leveret import Leveret

    gc.enable()  # from here on there may be garbage: see `main`
    settings = config(ctx)
    return Leveret(settings.url, settings.token, retry_for_s=retry_for_s)


def run(main: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(main)


def complete_vm(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of VMs, for the shell. A completion that cannot be made is silent."""

    async def names() -> list[str]:
        async with connect(ctx, retry_for_s=_COMPLETION_RETRY_S) as leveret:
            return [vm.name async for vm in leveret.list() if vm.name.startswith(incomplete)]

    try:
        return run(names())
    except ClientError:
        return []


VmName = Annotated[str, typer.Argument(metavar="VM", help="Name or id.", autocompletion=complete_vm)]
VmNames = Annotated[list[str], typer.Argument(metavar="VM...", help="Names or ids.", autocompletion=complete_vm)]
