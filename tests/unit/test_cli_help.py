"""`--help` has to be there at once, complete, and without loading what it does not need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from leveret.client.cli import app, reference
from leveret.client.cli.look import StateChoice
from leveret.shared.lifecycle import State

pytestmark = pytest.mark.unit

HEAVY = ("httpx2", "pydantic", "rich", "asyncpg", "aio_pika", "leveret.shared", "leveret.stack", "asyncio")


def test_help_loads_no_client_no_models_and_no_services() -> None:
    code = f"""
import sys
from leveret.client.cli import main
sys.argv = ["leveret", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "create" in done.stdout


def test_listing_loads_no_servers(tmp_path: Path) -> None:
    servers = ("asyncpg", "aio_pika", "fastapi", "rich", "yaml", "leveret.stack", "leveret.conductor", "leveret.api")
    code = f"""
import sys
from leveret.client.cli import main
sys.argv = ["leveret", "list"]
try:
    main()
except SystemExit as stop:
    assert stop.code == 2, stop.code
assert "leveret.client.leveret" in sys.modules
loaded = [name for name in {servers!r} if name in sys.modules]
assert not loaded, loaded
"""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "leveret context add" in done.stderr


def test_the_reference_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
    told = "run: python -m leveret.client.cli.reference docs/cli.md"
    assert page.read_text() == reference.markdown(), told


@pytest.mark.parametrize(
    "args",
    [("wait", "--for", "dancing", "x"), ("create", "--vcpus", "two"), ("events", "-n", "-1"), ("list", "-o", "x")],
)
def test_usage_errors_do_not_speak_like_a_library(args: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app.build(), list(args))
    assert done.exit_code == 2
    assert "Input should" not in done.output
    assert "Value error" not in done.output


def test_every_command_is_in_a_section_and_has_a_line_of_help() -> None:
    text = CliRunner().invoke(app.build(), ["--help"]).output
    for title, commands in app.SECTIONS.items():
        assert f"{title}:" in text
        for name in commands:
            line = next(line for line in text.splitlines() if line.split()[:1] == [name])
            assert len(line.split()) > 2, line
            assert not line.endswith("..."), line


@pytest.mark.parametrize("name", [name for commands in app.SECTIONS.values() for name in commands])
def test_every_command_explains_itself(name: str) -> None:
    done = CliRunner().invoke(app.build(), [name, "--help"])
    assert done.exit_code == 0
    assert "Usage: " in done.output


def test_a_misspelt_command_is_a_usage_error_that_names_the_right_one() -> None:
    done = CliRunner().invoke(app.build(), ["craete"])
    assert done.exit_code == 2
    assert "create" in done.output


def test_the_states_to_list_by_are_those_of_the_life_cycle() -> None:
    assert {choice.value for choice in StateChoice} == {state.value for state in State}


def test_a_question_that_nobody_can_answer_says_which_option_answers_it() -> None:
    done = CliRunner().invoke(app.build(), ["project", "delete", "blue"])
    assert done.exit_code == 2
    assert "give --yes" in done.output
    assert "Invalid value" not in done.output
