"""Under which system account a server runs, and whether that account can reach its directory."""

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from leveret.stack.errors import StackError


class Identity(TypedDict, total=False):
    """The arguments that make `subprocess` change who it runs as."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this system with its groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def named(cls, name: str) -> "Account":
        """Look the user up; raises StackError when there is none."""
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise StackError(f"there is no user '{name}': is its package installed? Try script/setup") from None
        return cls(name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)))

    @classmethod
    def current(cls) -> "Account":
        """Return the account that runs this process."""
        uid = os.geteuid()
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:  # containers run under bare numbers
            name = str(uid)
        return cls(name, uid, os.getegid(), tuple(os.getgroups()))

    @classmethod
    def for_service(cls, name: str) -> "Account":
        """Return the service's own user when we are root, and ourselves when we are not.

        Postgres refuses to run as root, and RabbitMQ has no reason to.
        """
        return cls.named(name) if os.geteuid() == 0 else cls.current()

    def run(
        self, argv: list[str], *, env: dict[str, str], timeout_s: float, stdin: str | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command as this account from `/`, and collect its output; the caller judges the exit code.

        Raises StackError when it takes longer than `timeout_s`.
        """
        try:
            return subprocess.run(
                argv,
                env=env,
                cwd="/",
                input="" if stdin is None else stdin,
                text=True,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                **self.identity(),
            )
        except subprocess.TimeoutExpired:
            raise StackError(f"{Path(argv[0]).name} did not finish within {timeout_s:g} s") from None

    def identity(self) -> Identity:
        """Return what `subprocess` needs to run as this account: nothing when we are it already."""
        if self.uid == os.geteuid():
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": list(self.groups)}

    def can_reach(self, directory: Path) -> bool:
        """Ask the kernel whether this account may enter the directory."""
        answer = self.run(["/usr/bin/test", "-x", str(directory)], env={}, timeout_s=10)
        return answer.returncode == 0
