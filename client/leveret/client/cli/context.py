"""`context`: which of several installations is meant."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from leveret.client import config as configs
from leveret.client.cli.failing import Exit
from leveret.client.cli.output import Column, Format, Output, emit_document, paint, write_facts, write_table
from leveret.client.cli.session import complete_context, flags, token_from
from leveret.client.errors import ConfigError
from leveret.client.inputs import check_token, check_url

Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_context)]
NewName = Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '.', '_' and '-'.")]

app = typer.Typer(help="Choose between several installations.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """List the contexts; `*` marks the one in use."""
    path, contexts = _read()
    used = flags(ctx).context or os.environ.get("LEVERET_CONTEXT") or contexts.current
    rows = [
        {"name": name, "url": one.url, "token": _where(one, path), "current": name == used}
        for name, one in contexts.by_name.items()
    ]
    if output is Format.NAME:
        for row in rows:
            print(row["name"])
    elif output is not Format.TABLE:
        emit_document(rows, output)
    else:
        write_table(
            rows,
            (
                Column("", lambda row: "*" if row["current"] else " ", style=lambda _: "green"),
                Column("NAME", lambda row: row["name"], style=lambda _: "bold"),
                Column("URL", lambda row: row["url"]),
                Column("TOKEN", lambda row: row["token"], rank=1),
            ),
        )
    if os.environ.get("LEVERET_URL"):
        print("LEVERET_URL is set: it goes before the contexts of the file.", file=sys.stderr)


@app.command()
def show(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Default: the one in use.", autocompletion=complete_context)
    ] = None,
    token: Annotated[bool, typer.Option("--token", help="Print the token, and nothing else.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Show a context, without its token unless asked."""
    path, contexts = _read()
    chosen = name or flags(ctx).context or os.environ.get("LEVERET_CONTEXT") or contexts.current
    if chosen is None:
        raise ConfigError(f"no context is in use: `leveret context use NAME`. The file is {path}.")
    one = contexts.get(chosen, path)
    if token:
        secret = one.secret(path)
        if not secret:
            raise ConfigError(f"context {chosen} has no token.")
        print(secret)
        return
    facts = {
        "name": chosen,
        "url": one.url,
        "token": _where(one, path),
        "state_dir": str(one.state_dir) if one.state_dir else None,
        "ssh_key": str(one.ssh_key) if one.ssh_key else None,
        "file": str(path),
    }
    if output is Format.NAME:
        print(chosen)
    elif output is Format.TABLE:
        write_facts((key.replace("_", " "), value or "") for key, value in facts.items())
    else:
        emit_document(facts, output)


@app.command()
def use(name: Name) -> None:
    """Use this context from now on."""
    path, contexts = _read()
    one = contexts.get(name, path)
    configs.write_contexts(configs.Contexts(name, contexts.by_name), path)
    print(f"{paint(name, 'bold', sys.stderr)} is in use: {one.url}", file=sys.stderr)


@app.command()
def add(
    name: NewName,
    url: Annotated[str, typer.Option(metavar="URL", help="Of the API.")],
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Refer to this file; - reads the token from standard input. Default: it is asked for."
        ),
    ] = None,
    ssh_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Private key with which `leveret ssh` logs in.")
    ] = None,
    use_it: Annotated[bool, typer.Option("--use", help="Use it from now on.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the one of this name.")] = False,
) -> None:
    """Add a context. The token is never taken from the command line, where others could read it."""
    configs.check_name(name)
    url = check_url(url)
    path, contexts = _read()
    if name in contexts.by_name and not replace:
        _conflict(f"there is a context {name!r} already: --replace replaces it.")
    if token_file is not None and str(token_file) != "-":
        file = token_file.expanduser().absolute()
        configs.read_token(file)
        token, kept_in = None, file
    else:
        token, kept_in = _ask_for_token(url, token_file), None
    key = ssh_key.expanduser().absolute() if ssh_key else None
    made = configs.Context(url, token, kept_in, None, key)
    contexts = contexts.with_context(name, made, use=use_it)
    configs.write_contexts(contexts, path)
    used = "is in use" if contexts.current == name else f"`leveret context use {name}` uses it"
    print(f"{paint(name, 'bold', sys.stderr)} is added: {used}.", file=sys.stderr)


def _ask_for_token(url: str, token_file: Path | None) -> str:
    if token_file is None and sys.stdin.isatty():
        from getpass import getpass

        return check_token(getpass(f"Token for {url}: ").strip(), "what was given")
    return token_from(Path("-"))


@app.command()
def remove(name: Name) -> None:
    """Forget a context, and the token in it."""
    path, contexts = _read()
    contexts.get(name, path)
    configs.write_contexts(contexts.without(name), path)
    if contexts.current == name and len(contexts.by_name) > 2:
        print("No context is in use now: leveret context use NAME", file=sys.stderr)


@app.command()
def rename(name: Name, new_name: Annotated[str, typer.Argument(metavar="NEW")]) -> None:
    """Call a context otherwise."""
    configs.check_name(new_name)
    path, contexts = _read()
    contexts.get(name, path)
    if new_name in contexts.by_name and new_name != name:
        _conflict(f"there is a context {new_name!r} already.")
    configs.write_contexts(contexts.renamed(name, new_name), path)


def _read() -> tuple[Path, configs.Contexts]:
    path = configs.config_path(os.environ)
    return path, configs.read_contexts(path)


def _where(one: configs.Context, path: Path) -> str:
    if one.token:
        return f"in {path}"
    return f"in {one.token_file}" if one.token_file else "none"


def _conflict(message: str) -> None:
    print(f"{paint('error:', 'bold red', sys.stderr)} {message}", file=sys.stderr)
    raise typer.Exit(Exit.CONFLICT)
