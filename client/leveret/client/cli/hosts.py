"""`hosts`, `images`, `version`."""

from typing import TYPE_CHECKING

import typer

from leveret.client.cli.output import Format, Output, emit, emit_document, write_facts
from leveret.client.cli.session import connect, run
from leveret.client.errors import ClientError, ConfigError

if TYPE_CHECKING:
    from leveret.shared.documents import HostView, ImageView


def hosts(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """List the hosts and what is used of them."""
    from leveret.client.cli.columns import HOST_COLUMNS

    async def body() -> "tuple[HostView, ...]":
        async with connect(ctx) as leveret:
            return await leveret.hosts()

    emit(run(body()), HOST_COLUMNS, output)


def images(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """List the registered images."""
    from leveret.client.cli.columns import IMAGE_COLUMNS

    async def body() -> "tuple[ImageView, ...]":
        async with connect(ctx) as leveret:
            return await leveret.images()

    emit(run(body()), IMAGE_COLUMNS, output)


def version(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """Show the versions of this command and of the API."""
    from importlib.metadata import version as version_of

    versions = {"client": version_of("leveret")}

    async def body() -> str:
        async with connect(ctx, retry_for_s=0.0) as leveret:
            return str((await leveret.version()).get("version", "unknown"))

    try:
        versions["api"] = run(body())
    except ConfigError:
        pass  # no API is set up yet: the client has a version all the same
    except ClientError as error:
        versions["api"] = f"({error})"
    if output in {Format.TABLE, Format.NAME}:
        write_facts(versions.items())
    else:
        emit_document(versions, output)
