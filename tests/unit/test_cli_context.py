"""`leveret context`: several installations, and no token where it does not belong."""

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from leveret.client.cli import app
from leveret.client.config import Config, read_contexts, save, state_dir_at

pytestmark = pytest.mark.unit


class Cli:
    def __init__(self, home: Path) -> None:
        self.file = home / "leveret" / "config.toml"
        self.home = home

    def __call__(self, *args: str, code: int = 0, stdin: str = "", **env: str) -> Result:
        done = CliRunner().invoke(app.build(), list(args), input=stdin, env={"XDG_CONFIG_HOME": str(self.home), **env})
        found = done.exit_code
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            from leveret.client.cli.failing import exit_code

            found = exit_code(done.exception)
        assert found == code, (args, done.output, done.exception)
        return done


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    for name in ("LEVERET_URL", "LEVERET_TOKEN", "LEVERET_CONTEXT", "LEVERET_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    made = Cli(tmp_path)
    made("context", "add", "work", "--url", "https://work.test/", stdin="s3cret-work\n")
    made("context", "add", "home", "--url", "http://127.0.0.1:8420", "--token-file", "-", stdin="s3cret-home\n")
    return made


def test_the_first_context_is_used_until_another_one_is(cli: Cli) -> None:
    assert cli("context", "show", "-o", "name").stdout == "work\n"
    cli("context", "use", "home")
    assert cli("context", "show", "-o", "name").stdout == "home\n"
    assert cli("context", "show", "-o", "name", LEVERET_CONTEXT="work").stdout == "work\n"
    assert cli("--context", "home", "context", "show", "-o", "name", LEVERET_CONTEXT="work").stdout == "home\n"


def test_the_list_marks_the_one_in_use_and_hides_every_token(cli: Cli) -> None:
    told = cli("context", "list").output
    assert [line.split()[:2] for line in told.splitlines()[1:]] == [["*", "work"], ["home", "http://127.0.0.1:8420"]]
    shown = told + cli("context", "show").output + cli("context", "show", "-o", "json").output
    assert "s3cret" not in shown + cli("context", "list", "-o", "yaml").output


def test_a_token_is_printed_alone_when_it_is_asked_for(cli: Cli) -> None:
    assert cli("context", "show", "home", "--token").stdout == "s3cret-home\n"


def test_the_file_stays_private_through_every_change(cli: Cli) -> None:
    for args in (("use", "home"), ("rename", "home", "house"), ("remove", "work")):
        cli("context", *args)
        assert stat.S_IMODE(cli.file.stat().st_mode) == 0o600
    assert list(read_contexts(cli.file).by_name) == ["house"]
    assert read_contexts(cli.file).current == "house"


def test_a_token_file_is_referred_to_and_not_copied(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "ci.token").write_text("s3cret-ci\n")
    cli("context", "add", "ci", "--url", "https://ci.test", "--token-file", str(tmp_path / "ci.token"))
    assert "s3cret-ci" not in cli.file.read_text()
    assert cli("context", "show", "ci", "--token").stdout == "s3cret-ci\n"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("use", "nobody"), 2),
        (("show", "nobody"), 2),
        (("remove", "nobody"), 2),
        (("rename", "home", "work"), 4),
        (("rename", "home", "bad name"), 2),
        (("add", "home", "--url", "http://x.test"), 4),
        (("add", "bad name", "--url", "http://x.test"), 2),
        (("add", "new", "--url", "x.test"), 2),
        (("add", "new", "--url", "http://x.test", "--token-file", "/nowhere"), 2),
    ],
)
def test_what_cannot_be_meant_changes_nothing(cli: Cli, args: tuple[str, ...], code: int) -> None:
    before = cli.file.read_text()
    cli("context", *args, code=code, stdin="token\n")
    assert cli.file.read_text() == before


def test_a_context_without_a_token_is_not_added(cli: Cli) -> None:
    cli("context", "add", "new", "--url", "http://x.test", stdin="", code=2)
    assert "new" not in read_contexts(cli.file).by_name


def test_one_is_replaced_only_when_asked(cli: Cli) -> None:
    cli("context", "add", "home", "--url", "http://other.test", "--replace", stdin="other\n")
    assert cli("context", "show", "home", "--token").stdout == "other\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(cli: Cli, shell: str) -> None:
    assert "_LEVERET_COMPLETE" in cli("completion", shell).stdout


def test_the_local_installation_is_known_by_its_url_alone(cli: Cli, tmp_path: Path) -> None:
    save(Config("http://127.0.0.1:8420", "s3cret", tmp_path / "state"), cli.file, "local")
    contexts = read_contexts(cli.file)
    assert state_dir_at(contexts, "http://127.0.0.1:8420") == tmp_path / "state"
    assert state_dir_at(contexts, "https://work.test") is None
