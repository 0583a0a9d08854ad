"""`completion`: what a shell needs to complete commands, options and names."""

from enum import StrEnum
from typing import Annotated

import typer

COMPLETE_VARIABLE = "_LEVERET_COMPLETE"


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", show_default=False)],
) -> None:
    """Print what lets a shell complete commands, options and names.

    bash: source <(leveret completion bash), in ~/.bashrc.

    zsh: source <(leveret completion zsh), in ~/.zshrc after compinit.

    fish: leveret completion fish > ~/.config/fish/completions/leveret.fish.
    """
    from typer._completion_shared import get_completion_script

    print(get_completion_script(prog_name="leveret", complete_var=COMPLETE_VARIABLE, shell=shell.value))


def prepare() -> None:
    """Let the shell's questions be answered; without the options of typer's own that write to people's files."""
    from typer._completion_classes import completion_init

    completion_init()
