"""Where the API is and how to prove who is asking: flags, then the environment, then a file.

The file is `$XDG_CONFIG_HOME/leveret/config.toml`, or the one that LEVERET_CONFIG names. It holds a token, so it is
written for its owner alone.
"""

import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from leveret.client.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Config:
    """`state_dir` and `ssh_key` (a private key) are set when the file was written by `leveret up`."""

    url: str
    token: str
    state_dir: Path | None = None
    ssh_key: Path | None = None

    def __repr__(self) -> str:
        return f"Config(url={self.url!r}, token='...', state_dir={self.state_dir!r})"


def config_path(environ: Mapping[str, str]) -> Path:
    if environ.get("LEVERET_CONFIG"):
        return Path(environ["LEVERET_CONFIG"])
    home = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "/")) / ".config"
    return Path(home) / "leveret" / "config.toml"


def state_home(environ: Mapping[str, str]) -> Path:
    """Where this user's own state is kept, such as the host keys of guests."""
    return Path(environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/")) / ".local/state") / "leveret"


def read_file(path: Path) -> dict[str, str]:
    """The settings in a file; none when there is no file. Raises ConfigError when it cannot be read."""
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not a TOML document: {error}") from error
    return {key: str(value) for key, value in document.items()}


def load(environ: Mapping[str, str], *, url: str | None = None, token: str | None = None) -> Config:
    """The settings in force. A token from the file is only sent to the url of the file: it belongs to that one.

    Raises ConfigError when url or token is in none of the three places.
    """
    path = config_path(environ)
    chosen_url = url or environ.get("LEVERET_URL")
    chosen_token = token or environ.get("LEVERET_TOKEN")
    kept = {} if chosen_url and chosen_token else read_file(path)
    if not chosen_url and not kept.get("url"):
        raise ConfigError(
            f"where is Leveret? {path} does not say. Run `leveret up`, or set LEVERET_URL and LEVERET_TOKEN."
        )
    same = not chosen_url or chosen_url.rstrip("/") == kept.get("url", "").rstrip("/")
    chosen_token = chosen_token or (kept.get("token") if same else None)
    if not chosen_token:
        raise ConfigError(f"no token for {chosen_url or kept['url']}. Set LEVERET_TOKEN or write one to {path}.")
    local = kept if same else {}
    return Config(
        url=(chosen_url or kept["url"]).rstrip("/"),
        token=chosen_token,
        state_dir=Path(local["state_dir"]) if local.get("state_dir") else None,
        ssh_key=Path(local["ssh_key"]) if local.get("ssh_key") else None,
    )


def save(config: Config, path: Path) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    import tomli_w

    document = {"url": config.url, "token": config.token}
    if config.state_dir:
        document["state_dir"] = str(config.state_dir)
    if config.ssh_key:
        document["ssh_key"] = str(config.ssh_key)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "wb") as file:
            tomli_w.dump(document, file)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
