"""`--help` has to be there at once, complete, and without loading what it does not need."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from leveret.client.cli import app
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
