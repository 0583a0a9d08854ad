"""The `leveret` command: its table of contents."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from leveret.client.cli import (
    apply,
    capacity,
    change,
    check,
    completion,
    context,
    create,
    db,
    doctor,
    events,
    failing,
    group,
    guest,
    host,
    hosts,
    look,
    naming,
    project,
    quota,
    stack,
    token,
    wait,
)
from leveret.client.cli.session import Globals, complete_context

_EPILOG = (
    "Exit codes: 0 ok, 1 unexpected, 2 usage (or a token that is refused), 3 not found, 4 conflict, 5 failed, "
    "6 time-out, 7 unreachable, 130 interrupted."
)


class _Sections(TyperGroup):
    """Lists the commands by what one wants, in the order of the table below, instead of by alphabet."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with failing.plain_usage_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with failing.plain_usage_errors():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  (the base's signature)
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(len(name) for name in self.commands)
        for title, commands in SECTIONS.items():
            rows = []
            for name in commands:
                command = self.get_command(ctx, name)
                assert command is not None
                rows.append((name.ljust(width), command.get_short_help_str(limit=formatter.width - width - 6)))
            with formatter.section(title):
                formatter.write_dl(rows)


def _globals(
    ctx: typer.Context,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of `leveret context list`. Default: LEVERET_CONTEXT, then the one in use.",
            autocompletion=complete_context,
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="The API. Default: LEVERET_URL, then the context's.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Holds the token; - is standard input. Default: LEVERET_TOKEN, then the context's."
        ),
    ] = None,
) -> None:
    """Get me a VM."""
    ctx.obj = Globals(url, token_file, context)


SECTIONS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "This machine": {"up": stack.up, "status": stack.status, "down": stack.down},
    "VMs": {
        "create": create.create,
        "apply": apply.apply,
        "list": look.list_,
        "show": look.show,
        "wait": wait.wait,
        "ssh": guest.ssh,
        "stop": change.stop,
        "start": change.start,
        "reboot": change.reboot,
        "rename": naming.rename,
        "label": naming.label,
        "group": group.app,
        "delete": change.delete,
    },
    "When something is not as it should be": {
        "doctor": doctor.doctor,
        "check": check.check,
        "explain": look.explain,
        "events": events.events,
        "timeline": events.timeline,
        "console-log": guest.console_log,
        "retry": change.retry,
    },
    "Projects, and who may do what": {
        "project": project.app,
        "quota": quota.app,
        "token": token.app,
        "whoami": token.whoami,
    },
    "The installation": {
        "capacity": capacity.capacity,
        "hosts": hosts.hosts,
        "host": host.app,
        "images": hosts.images,
        "db": db.app,
        "version": hosts.version,
    },
    "This command": {
        "context": context.app,
        "completion": completion.completion,
    },
}


def build() -> typer.Typer:
    """The whole command, without rich's help: `--help` has to be there at once."""
    app = typer.Typer(
        cls=_Sections,
        add_completion=False,
        callback=_globals,
        epilog=_EPILOG,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    for commands in SECTIONS.values():
        for name, command in commands.items():
            if isinstance(command, typer.Typer):
                app.add_typer(command, name=name)
            else:
                app.command(name)(command)
    return app


def main() -> None:
    """Run the command and turn what went wrong into words and an exit code."""
    if completion.COMPLETE_VARIABLE in os.environ:
        completion.prepare()
    # pydantic would look through every installed distribution for plug-ins, for longer than the API takes to answer.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    gc.disable()  # loading modules makes no garbage, and looking for it takes a tenth of the time of `leveret list`
    try:
        build()(prog_name="leveret")
    except Exception as error:  # noqa: BLE001  (the rim: a person or a script reads it from here)
        sys.exit(failing.report(error))
