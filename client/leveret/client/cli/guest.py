"""`console-log` and `ssh`: closer to the guest."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.failing import Exit
from leveret.client.cli.session import VmName, config, connect, run
from leveret.client.errors import ClientError, ConfigError, VmFailed

if TYPE_CHECKING:
    from uuid import UUID

    from leveret.shared.documents import VmView

_FOLLOW_S = 0.5
#: As much as an anchor needs to be found only where it was: console lines carry times and numbers.
_ANCHOR_CHARS = 256

#: Escape sequences of ECMA-48: control strings, control sequences, and the short ones.
_ESCAPE = re.compile(r"\x1b(?:[PX^_\]].*?(?:\x1b\\|\x07|$)|\[[0-?]*[ -/]*[@-~]|[ -/]*[0-~])", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console_log(
    ctx: typer.Context,
    vm: VmName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows, until Ctrl-C.")] = False,
    max_bytes: Annotated[int, typer.Option("--bytes", min=1, max=1024 * 1024, help="How much of its end.")] = 65536,
    raw: Annotated[bool, typer.Option("--raw", help="With the guest's escape sequences: not for a terminal.")] = False,
) -> None:
    """Print the end of a guest's serial console."""
    import asyncio

    async def body() -> None:
        async with connect(ctx) as leveret:
            vm_id = (await leveret.find(vm)).id
            seen = await leveret.console_log(vm_id, max_bytes=max_bytes)
            show = str if raw else plain  # a pipe may well end on a terminal, too
            sys.stdout.write(show(seen if not seen or seen.endswith("\n") or follow else seen + "\n"))
            while follow:
                sys.stdout.flush()
                await asyncio.sleep(_FOLLOW_S)
                text = await leveret.console_log(vm_id, max_bytes=max_bytes)
                sys.stdout.write(show(grown(seen, text)))
                seen = text

    run(body())


def plain(text: str) -> str:
    """Text that does nothing to the terminal it is shown on: what a guest writes is not to be trusted."""
    return _CONTROL.sub("", _ESCAPE.sub("", text))


def grown(seen: str, text: str) -> str:
    """What the console's end has now that it had not before; all of it when it began anew."""
    if not seen:
        return text
    anchor = seen[-_ANCHOR_CHARS:]
    at = text.rfind(anchor)
    return text[at + len(anchor) :] if at >= 0 else text


def ssh(
    ctx: typer.Context,
    vm: VmName,
    command: Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND", help="Run this there.")] = None,
    login: Annotated[str, typer.Option("-l", "--login", help="User in the guest.")] = "root",
    identity: Annotated[Path | None, typer.Option("-i", "--identity", help="Private key.", metavar="FILE")] = None,
    timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for a guest that is still booting.")
    ] = 60,
) -> None:
    """Log in to a VM, or run a command there."""
    program = shutil.which("ssh")
    if not program:
        raise ConfigError("there is no ssh on this machine: install openssh-client.")

    async def body() -> "VmView":
        async with connect(ctx) as leveret:
            found = await leveret.find(vm)
            if found.guest_ready or timeout == 0:
                return found
            print(f"{found.name} is {found.state}: waiting until its guest is ready ...", file=sys.stderr)
            try:
                return await leveret.wait(found.id, "ready", timeout_s=timeout)
            except ClientError as error:
                if isinstance(error, VmFailed):
                    raise
                # A guest need not announce itself to be reachable: ssh itself tells more.
                return await leveret.find(vm)

    found = run(body())
    key = identity or config(ctx).ssh_key
    hosts_file = known_hosts(found.id)
    hosts_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    argv = ssh_argv(found, login=login, key=key, hosts_file=hosts_file, command=command or [])
    sys.stdout.flush()
    try:
        os.execv(program, argv)  # noqa: S606  (a vector, no shell: nothing in it is interpreted)
    except OSError as error:
        raise typer.Exit(Exit.UNEXPECTED) from error


def ssh_argv(vm: "VmView", *, login: str, key: Path | None, hosts_file: Path, command: list[str]) -> list[str]:
    """The system's ssh, told who is at the other end.

    Every VM has a file of known hosts of its own under its id: an address that another VM had before is no alarm, and
    a guest whose key changes is one.
    """
    if vm.ssh is None:
        raise ConfigError(f"nobody can log in to {vm.name}: it is {vm.state}, or its host is a simulated one.")
    options = {
        "UserKnownHostsFile": f'"{hosts_file}"',
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": str(vm.id),
        "StrictHostKeyChecking": "accept-new",
        "LogLevel": "ERROR",
        "ConnectTimeout": "15",
    }
    argv = ["ssh", *(f"-o{name}={value}" for name, value in options.items()), "-p", str(vm.ssh.port), "-l", login]
    if key and os.access(key, os.R_OK):
        argv += ["-i", str(key)]
    return [*argv, vm.ssh.host, *(["--", *command] if command else [])]


def known_hosts(vm_id: "UUID") -> Path:
    """Where the host key of one VM is kept."""
    from leveret.client.config import state_home

    return state_home(os.environ) / "known_hosts" / str(vm_id)
