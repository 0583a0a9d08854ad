"""`db migrate` and `db status`: for those who run Leveret."""

import os
import sys
from typing import Annotated

import typer

from leveret.client.cli.output import Column, Format, Output, emit_document, write_table
from leveret.client.cli.session import run
from leveret.client.errors import ConfigError

Database = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="postgresql://... of the owner of the schema. Default: LEVERET_DATABASE_URL, then the local stack's.",
    ),
]

app = typer.Typer(
    help="Migrate the database, or say what is to be migrated.", no_args_is_help=True, rich_markup_mode=None
)


def _dsn(url: str | None) -> str:
    chosen = url or os.environ.get("LEVERET_DATABASE_URL")
    if chosen:
        return chosen
    try:
        from leveret.stack.up import local_database_url
    except ImportError:
        raise ConfigError("which database? --database-url or LEVERET_DATABASE_URL.") from None
    return local_database_url()


@app.command()
def migrate(database_url: Database = None) -> None:
    """Apply the migrations that are missing."""
    from leveret.conductor import migrate as migrations

    applied = run(migrations.migrate(_dsn(database_url)))
    for name in applied:
        print(f"applied {name}", file=sys.stderr)
    if not applied:
        print("nothing to apply", file=sys.stderr)


@app.command()
def status(database_url: Database = None, output: Output = Format.TABLE) -> None:
    """List the migrations and when each was applied."""
    from leveret.conductor import migrate as migrations

    rows = [
        {
            "name": f"{one.number:04d}_{one.name}",
            "applied_at": one.applied_at.isoformat() if one.applied_at else None,
        }
        for one in run(migrations.status(_dsn(database_url)))
    ]
    if output is Format.TABLE:
        write_table(
            rows,
            (
                Column("MIGRATION", lambda row: row["name"]),
                Column("APPLIED", lambda row: row["applied_at"] or "not yet"),
            ),
        )
    elif output is Format.NAME:
        print("\n".join(str(row["name"]) for row in rows))
    else:
        emit_document(rows, output)
