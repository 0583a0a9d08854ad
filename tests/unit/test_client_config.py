"""Where the API is: flags, environment, contexts in a file; and what must not happen to the token."""

import stat
from pathlib import Path

import pytest

from leveret.client.config import (
    Config,
    Context,
    Contexts,
    config_path,
    load,
    owned_by,
    read_contexts,
    save,
    write_contexts,
)
from leveret.client.errors import ConfigError
from leveret.client.inputs import check_amqp_url, check_url

pytestmark = pytest.mark.unit


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def kept(environ: dict[str, str]) -> Config:
    config = Config(
        "http://127.0.0.1:8420", "from-file", Path("/var/lib/leveret"), Path("/var/lib/leveret/ssh/id"), "local"
    )
    save(config, config_path(environ), "local")
    return config


@pytest.fixture
def two(environ: dict[str, str], kept: Config) -> Contexts:
    contexts = read_contexts(config_path(environ)).with_context("work", Context("https://work.test", "work-token"))
    write_contexts(contexts, config_path(environ))
    return contexts


def test_what_was_saved_is_loaded(environ: dict[str, str], kept: Config) -> None:
    assert load(environ) == kept


def test_a_file_without_contexts_is_one_context(environ: dict[str, str]) -> None:
    path = config_path(environ)
    path.parent.mkdir(parents=True)
    path.write_text('url = "http://127.0.0.1:8420"\ntoken = "old"\nstate_dir = "/var/lib/leveret"\n')
    assert load(environ) == Config("http://127.0.0.1:8420", "old", Path("/var/lib/leveret"), None, "default")
    write_contexts(read_contexts(path).with_context("work", Context("https://work.test", "new")), path)
    assert load(environ).token == "old"
    assert load(environ, context="work").token == "new"


def test_the_file_is_readable_for_its_owner_alone(environ: dict[str, str], kept: Config) -> None:
    assert stat.S_IMODE(config_path(environ).stat().st_mode) == 0o600
    assert stat.S_IMODE(config_path(environ).parent.stat().st_mode) == 0o700


def test_saving_again_leaves_one_file(environ: dict[str, str], kept: Config) -> None:
    save(Config("http://127.0.0.1:1", "other"), config_path(environ))
    assert [file.name for file in config_path(environ).parent.iterdir()] == ["config.toml"]
    assert load(environ).token == "other"
    assert load(environ, context="local").token == "from-file"


def test_writing_through_a_link_keeps_the_link(environ: dict[str, str], tmp_path: Path) -> None:
    path = config_path(environ)
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "elsewhere.toml")
    save(Config("http://127.0.0.1:1", "other"), path)
    assert path.is_symlink()
    assert load(environ).token == "other"


def test_flags_go_before_the_environment_and_that_before_the_file(environ: dict[str, str], kept: Config) -> None:
    environ |= {"LEVERET_URL": "http://env.test", "LEVERET_TOKEN": "from-env"}
    assert load(environ) == Config("http://env.test", "from-env")
    assert load(environ, url="http://flag.test", token="from-flag") == Config("http://flag.test", "from-flag")


def test_a_context_given_as_a_flag_goes_before_the_environment(environ: dict[str, str], two: Contexts) -> None:
    environ |= {"LEVERET_URL": "http://env.test", "LEVERET_TOKEN": "from-env", "LEVERET_CONTEXT": "local"}
    assert load(environ, context="work") == Config("https://work.test", "work-token", context="work")


def test_a_context_in_the_environment_goes_before_the_one_in_use(environ: dict[str, str], two: Contexts) -> None:
    assert load(environ).context == "local"
    environ["LEVERET_CONTEXT"] = "work"
    assert load(environ).context == "work"
    environ["LEVERET_TOKEN"] = "from-env"
    assert load(environ) == Config("https://work.test", "from-env", context="work")


def test_the_token_in_the_file_goes_only_to_the_url_in_the_file(environ: dict[str, str], two: Contexts) -> None:
    with pytest.raises(ConfigError, match=r"no token for http://elsewhere\.test"):
        load(environ, url="http://elsewhere.test")
    with pytest.raises(ConfigError, match=r"no token for https://work\.test"):
        load(environ, url="https://work.test", context="local")
    assert load(environ, url="http://127.0.0.1:8420/").token == "from-file"


def test_a_token_may_lie_in_a_file_beside_the_configuration(environ: dict[str, str]) -> None:
    path = config_path(environ)
    write_contexts(Contexts("work", {"work": Context("https://work.test", token_file=Path("work.token"))}), path)
    with pytest.raises(ConfigError, match=r"work\.token"):
        load(environ)
    (path.parent / "work.token").write_text("in-a-file\n")
    assert load(environ).token == "in-a-file"
    (path.parent / "work.token").write_text("two words\n")
    with pytest.raises(ConfigError, match="cannot be a token") as caught:
        load(environ)
    assert "two words" not in str(caught.value)


def test_another_file_can_be_named(environ: dict[str, str], tmp_path: Path) -> None:
    save(Config("http://127.0.0.1:2", "second"), tmp_path / "second.toml")
    assert load(environ | {"LEVERET_CONFIG": str(tmp_path / "second.toml")}).token == "second"


def test_without_any_the_error_says_what_to_do(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="leveret up"):
        load(environ)


def test_with_several_and_none_in_use_the_error_names_them(environ: dict[str, str], two: Contexts) -> None:
    write_contexts(Contexts(None, two.by_name), config_path(environ))
    with pytest.raises(ConfigError, match="local, work"):
        load(environ)
    with pytest.raises(ConfigError, match=r"no context 'home'.*local, work"):
        load(environ, context="home")


@pytest.mark.parametrize(
    "text",
    ["url = ", "contexts = 3", "[contexts]\na = 3", '[contexts."a b"]\nurl = "http://x"', "[contexts.a]\nurl = 3"],
)
def test_a_file_that_cannot_be_meant_is_an_error(environ: dict[str, str], text: str) -> None:
    path = config_path(environ)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_contexts(path)


@pytest.mark.parametrize("url", ["", "leveret", "ftp://x", "http://", "http://a b", "http://x:99999", "http://me:pw@x"])
def test_what_is_no_address_of_an_api_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        check_url(url)


def test_a_context_that_goes_is_in_use_no_longer(two: Contexts) -> None:
    assert two.current == "local"
    assert two.without("local").current is None
    assert two.renamed("local", "home").current == "home"
    assert list(two.renamed("local", "home").by_name) == ["home", "work"]
    assert owned_by(two, Path("/var/lib/leveret")) == "local"
    assert owned_by(two, Path("/elsewhere")) is None


def test_a_directory_that_cannot_be_written_is_told(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a file where a directory should be")
    with pytest.raises(ConfigError, match="cannot"):
        write_contexts(Contexts(), config_path(environ))


def test_the_token_is_not_in_the_configurations_text(kept: Config, two: Contexts) -> None:
    assert "from-file" not in repr(kept)
    assert "work-token" not in repr(two)


def test_a_line_break_at_the_end_of_a_token_does_not_belong_to_it(environ: dict[str, str], kept: Config) -> None:
    environ |= {"LEVERET_URL": "http://env.test", "LEVERET_TOKEN": "lv_env\n"}
    assert load(environ).token == "lv_env"
    path = config_path(environ)
    path.write_text(path.read_text().replace('"from-file"', '"from-file\\n"'))
    assert load(environ, context="local").token == "from-file"


@pytest.mark.parametrize("token", [" ", "\n", "lv_secret x", "lv_s\u00e9cret", "lv_secret\r\nX: y"])
def test_a_token_that_cannot_be_sent_is_not_told(environ: dict[str, str], token: str) -> None:
    for given in ({"LEVERET_URL": "http://env.test", "LEVERET_TOKEN": token}, {}):
        save(Config("http://127.0.0.1:8420", token), config_path(environ))
        with pytest.raises(ConfigError, match=r"cannot be a token|no token") as caught:
            load(environ | given)
        assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "lv_secret",
        "http://u:secret@broker",
        "amqp://broker",
        "amqp://u@broker",
        "amqp://u:secret@",
        "amqp://u:secret@broker:0",
        "amqp://u:secret@broker:x",
        "amqp://u:secret @broker",
    ],
)
def test_what_is_no_address_of_a_broker_is_refused_and_not_told(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_amqp_url(url)
    assert "secret" not in str(caught.value)


def test_the_address_of_a_broker_may_say_little() -> None:
    for url in ("amqp://u:p@broker", "amqps://u:p%2F@broker:5671/leveret", "amqp://u:p@[::1]:5672/%2F"):
        assert check_amqp_url(url) == url
