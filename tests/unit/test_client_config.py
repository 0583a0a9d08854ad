"""Where the API is: flags, environment, file; and what must not happen to the token."""

import stat
from pathlib import Path

import pytest

from leveret.client.config import Config, config_path, load, read_file, save
from leveret.client.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def kept(environ: dict[str, str]) -> Config:
    config = Config("http://127.0.0.1:8420", "from-file", Path("/var/lib/leveret"), Path("/var/lib/leveret/ssh/id"))
    save(config, config_path(environ))
    return config


def test_what_was_saved_is_loaded(environ: dict[str, str], kept: Config) -> None:
    assert load(environ) == kept


def test_the_file_is_readable_for_its_owner_alone(environ: dict[str, str], kept: Config) -> None:
    assert stat.S_IMODE(config_path(environ).stat().st_mode) == 0o600
    assert stat.S_IMODE(config_path(environ).parent.stat().st_mode) == 0o700


def test_saving_again_leaves_one_file(environ: dict[str, str], kept: Config) -> None:
    save(Config("http://127.0.0.1:1", "other"), config_path(environ))
    assert [file.name for file in config_path(environ).parent.iterdir()] == ["config.toml"]
    assert load(environ).token == "other"


def test_flags_go_before_the_environment_and_that_before_the_file(environ: dict[str, str], kept: Config) -> None:
    environ |= {"LEVERET_URL": "http://env.test", "LEVERET_TOKEN": "from-env"}
    assert load(environ) == Config("http://env.test", "from-env")
    assert load(environ, url="http://flag.test", token="from-flag") == Config("http://flag.test", "from-flag")


def test_the_token_in_the_file_goes_only_to_the_url_in_the_file(environ: dict[str, str], kept: Config) -> None:
    with pytest.raises(ConfigError, match=r"no token for http://elsewhere\.test"):
        load(environ, url="http://elsewhere.test")
    assert load(environ, url="http://127.0.0.1:8420/").token == "from-file"


def test_another_file_can_be_named(environ: dict[str, str], tmp_path: Path) -> None:
    save(Config("http://127.0.0.1:2", "second"), tmp_path / "second.toml")
    assert load(environ | {"LEVERET_CONFIG": str(tmp_path / "second.toml")}).token == "second"


def test_without_any_the_error_says_what_to_do(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="leveret up"):
        load(environ)


def test_a_file_that_is_no_toml_is_named(environ: dict[str, str]) -> None:
    path = config_path(environ)
    path.parent.mkdir(parents=True)
    path.write_text("url = ")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        read_file(path)


def test_the_token_is_not_in_the_configurations_text(kept: Config) -> None:
    assert "from-file" not in repr(kept)
