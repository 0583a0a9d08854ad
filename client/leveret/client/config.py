"""Where the API is and how to prove who is asking: flags, then the environment, then a file with named contexts.

The file is `$XDG_CONFIG_HOME/leveret/config.toml`, or the one that LEVERET_CONFIG names. It may hold tokens, so it is
written for its owner alone:

    current = "local"

    [contexts.local]
    url = "http://127.0.0.1:8420"
    token = "lv_..."

    [contexts.work]
    url = "https://leveret.example.org"
    token_file = "work.token"           # beside this file, unless the path is absolute

A file without `[contexts]` holds the settings of one, which is called `default`.
"""

import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leveret.client.errors import ConfigError
from leveret.client.inputs import check_token, check_url

#: What the settings of a file without contexts are called.
DEFAULT = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Config:
    """The settings in force. `state_dir` and `ssh_key` (a private key) are set when `leveret up` made them.

    `context` is the one they came from, wholly or in part.
    """

    url: str
    token: str
    state_dir: Path | None = None
    ssh_key: Path | None = None
    context: str | None = None

    def __repr__(self) -> str:
        return f"Config(url={self.url!r}, token='...', state_dir={self.state_dir!r}, context={self.context!r})"


@dataclass(frozen=True, slots=True)
class Context:
    """One API and the token for it: in the file, or in a file of its own."""

    url: str
    token: str | None = None
    token_file: Path | None = None
    state_dir: Path | None = None
    ssh_key: Path | None = None

    def __repr__(self) -> str:
        return f"Context(url={self.url!r}, token_file={self.token_file!r}, state_dir={self.state_dir!r})"

    def secret(self, beside: Path) -> str | None:
        """The token. `beside` is the configuration file. Raises ConfigError when its file cannot be read."""
        if self.token or self.token_file is None:
            return self.token.strip() if self.token else None
        return read_token(beside.parent / self.token_file.expanduser())


@dataclass(frozen=True, slots=True)
class Contexts:
    """What a configuration file says; `current` is the context that is meant when none is named."""

    current: str | None = None
    by_name: Mapping[str, Context] = field(default_factory=dict)

    def get(self, name: str, path: Path) -> Context:
        """Raises ConfigError with the names that there are."""
        if name not in self.by_name:
            known = ", ".join(self.by_name) or "none yet: `leveret context add` makes one"
            raise ConfigError(f"there is no context {name!r} in {path}; there is {known}.")
        return self.by_name[name]

    def with_context(self, name: str, context: Context, *, use: bool = False) -> "Contexts":
        """With this one added or replaced. The first one is used from then on."""
        return Contexts(name if use or not self.by_name else self.current, {**self.by_name, name: context})

    def without(self, name: str) -> "Contexts":
        left = {other: context for other, context in self.by_name.items() if other != name}
        return Contexts(None if self.current == name else self.current, left)

    def renamed(self, name: str, new: str) -> "Contexts":
        by_name = {new if other == name else other: context for other, context in self.by_name.items()}
        return Contexts(new if self.current == name else self.current, by_name)


def config_path(environ: Mapping[str, str]) -> Path:
    if environ.get("LEVERET_CONFIG"):
        return Path(environ["LEVERET_CONFIG"])
    home = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "/")) / ".config"
    return Path(home) / "leveret" / "config.toml"


def state_home(environ: Mapping[str, str]) -> Path:
    """Where this user's own state is kept, such as the host keys of guests."""
    return Path(environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/")) / ".local/state") / "leveret"


def read_token(path: Path) -> str:
    """The token in a file. Raises ConfigError when there is none."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the token: {error}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read the token: {path} is not a text.") from None
    return check_token(text.strip(), f"what {path} holds")


def read_contexts(path: Path) -> Contexts:
    """What a file says; nothing when there is no file. Raises ConfigError when it cannot be read."""
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return Contexts()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not a TOML document: {error}") from error
    tables = document.get("contexts", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"{path}: `contexts` must be tables, such as [contexts.work].")
    if "url" in document or "token" in document:
        tables = {DEFAULT: document} | tables
    by_name = {name: _context(name, table, path) for name, table in tables.items()}
    current = document.get("current") or (next(iter(by_name)) if len(by_name) == 1 else None)
    if current is None and "url" in document:
        current = DEFAULT
    return Contexts(None if current is None else str(current), by_name)


def _context(name: str, table: dict[str, Any], path: Path) -> Context:
    check_name(name)
    known = ("url", "token", "token_file", "state_dir", "ssh_key")
    for key in known:
        if key in table and not isinstance(table[key], str):
            raise ConfigError(f"{path}: `{key}` of context {name} must be a text in quotes.")
    url, token, token_file, state_dir, ssh_key = (table.get(key) or None for key in known)
    return Context(
        url or "",
        token,
        Path(token_file) if token_file else None,
        Path(state_dir) if state_dir else None,
        Path(ssh_key) if ssh_key else None,
    )


def check_name(name: str) -> None:
    """Raises ConfigError for what cannot be the name of a context."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be the name of a context: letters, digits, '.', '_' and '-', at most 63.")


def load(
    environ: Mapping[str, str], *, url: str | None = None, token: str | None = None, context: str | None = None
) -> Config:
    """The settings in force. A token from the file is only sent to the url of its context: it belongs to that one.

    A context that was named as a flag goes before the environment; one that LEVERET_CONTEXT names does not.
    Raises ConfigError when url or token is in none of the three places.
    """
    path = config_path(environ)
    asked_url = url or (None if context else environ.get("LEVERET_URL"))
    asked_token = token or (None if context else _token_in(environ))
    if asked_url and asked_token:
        return Config(check_url(asked_url), check_token(asked_token))
    contexts = read_contexts(path)
    name = context or environ.get("LEVERET_CONTEXT") or contexts.current
    kept = contexts.get(name, path) if name else None
    if not asked_url and kept is None and contexts.by_name:
        raise ConfigError(f"which context? `leveret context use NAME`, one of: {', '.join(contexts.by_name)}.")
    if not asked_url and (kept is None or not kept.url):
        raise ConfigError(
            f"where is Leveret? {path} does not say. Run `leveret up`, add one with `leveret context add`, "
            "or set LEVERET_URL and LEVERET_TOKEN."
        )
    chosen_url = check_url(asked_url or (kept.url if kept else ""))
    same = kept if kept is not None and chosen_url == kept.url.rstrip("/") else None
    chosen_token = asked_token or (same.secret(path) if same else None)
    if chosen_token is None:
        where = f"to context {name} of {path}" if same else f"with `leveret context add NAME --url {chosen_url}`"
        raise ConfigError(f"no token for {chosen_url}. Set LEVERET_TOKEN, or add one {where}.")
    check_token(chosen_token, "the token" if asked_token else f"the token of context {name} in {path}")
    if same is None:
        return Config(chosen_url, chosen_token)
    return Config(chosen_url, chosen_token, same.state_dir, same.ssh_key, name)


def _token_in(environ: Mapping[str, str]) -> str | None:
    """An empty variable is none; what `$(cat FILE)` leaves of a file's lines is not part of the token."""
    given = environ.get("LEVERET_TOKEN")
    return check_token(given.strip(), "what LEVERET_TOKEN holds") if given else None


def save(config: Config, path: Path, name: str = DEFAULT) -> None:
    """Keep these settings as a context, the one in use from then on; the others stay."""
    made = Context(config.url, config.token, None, config.state_dir, config.ssh_key)
    write_contexts(read_contexts(path).with_context(name, made, use=True), path)


def write_contexts(contexts: Contexts, path: Path) -> None:
    """Write a file that only its owner can read, whole or not at all. A link to a file stays a link."""
    import tomli_w

    document: dict[str, Any] = {"current": contexts.current} if contexts.current else {}
    document["contexts"] = {name: _table(context) for name, context in contexts.by_name.items()}
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            tomli_w.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _table(context: Context) -> dict[str, str]:
    fields = ("url", "token", "token_file", "state_dir", "ssh_key")
    return {name: str(getattr(context, name)) for name in fields if getattr(context, name)}


def owned_by(contexts: Contexts, state_dir: Path) -> str | None:
    """The context that `leveret up` made for the installation in this directory."""
    return next((name for name, one in contexts.by_name.items() if one.state_dir == state_dir), None)


def state_dir_at(contexts: Contexts, url: str) -> Path | None:
    """The directory of the installation that `leveret up` started and that answers at this url."""
    same = (one.state_dir for one in contexts.by_name.values() if one.state_dir and one.url.rstrip("/") == url)
    return next(same, None)
