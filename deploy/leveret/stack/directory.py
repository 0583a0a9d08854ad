"""The directory of one private server: its facts, its lock, and the part that belongs to its account."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leveret.stack.account import Account
from leveret.stack.errors import StackError


def default_state_dir() -> Path:
    """Return where servers live unless told otherwise.

    `$LEVERET_STATE_DIR` wins. Root's servers run under other accounts, which cannot pass through /root:
    theirs is /var/lib/leveret. Everybody else's is `$XDG_STATE_HOME/leveret` (~/.local/state/leveret).
    """
    if chosen := os.environ.get("LEVERET_STATE_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/leveret")
    state_home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state_home) / "leveret"


class ServerDirectory:
    """What a later process must know about a server, in `server.json`; only the starter can read it.

    The directory and this file belong to whoever starts the server, never to the server's account: a
    process that was taken over cannot make us signal other processes or read other files.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path.absolute()
        self.kind = kind

    @property
    def facts_file(self) -> Path:
        """Return the path of the stored facts."""
        return self.path / "server.json"

    def exists(self) -> bool:
        """Tell whether this server was ever set up here."""
        return self.facts_file.exists()

    def read(self) -> dict[str, Any]:
        """Return the stored facts; raises StackError when the server was never started here."""
        try:
            facts: dict[str, Any] = json.loads(self.facts_file.read_text())
        except FileNotFoundError:
            raise StackError(f"no {self.kind} was ever started in {self.path}") from None
        if facts.pop("kind") != self.kind:
            raise StackError(f"{self.path} belongs to another kind of server than {self.kind}")
        return facts

    def write(self, facts: dict[str, Any]) -> None:
        """Replace the stored facts at once: a reader sees the old ones or the new ones."""
        pending = self.facts_file.with_suffix(".new")
        _write_private(pending, json.dumps({"kind": self.kind, **facts}, indent=1))
        pending.replace(self.facts_file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process at a time start, stop or change this server; the others wait."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def give(self, account: Account, *names: str) -> None:
        """Make subdirectories that only `account` may use.

        Raises StackError when the account cannot pass through the directories above.
        """
        self.path.chmod(0o755)
        if not account.can_reach(self.path):
            if not self.exists():
                shutil.rmtree(self.path)
            raise StackError(
                f"user '{account.name}', which runs {self.kind}, cannot enter {self.path}: "
                "choose a state directory that everybody may pass through, such as /var/lib/leveret"
            )
        for name in names:
            subdirectory = self.path / name
            subdirectory.mkdir(exist_ok=True, mode=0o700)
            os.chown(subdirectory, account.uid, account.gid)

    def share(self, name: str, text: str, account: Account) -> Path:
        """Write a file that `account` may read and not change, and return its path."""
        path = self.path / name
        pending = path.with_name(f"{path.name}.new")
        _write_private(pending, text)
        os.chown(pending, -1, account.gid)
        pending.chmod(0o640)
        return pending.replace(path)

    def remove(self) -> None:
        """Delete the directory, if it is one of ours; a missing one is fine."""
        if self.exists():
            self.read()
            shutil.rmtree(self.path)


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
