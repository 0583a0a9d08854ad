"""Data on standard output: for people, for programs, for pipes."""

import json
from dataclasses import dataclass

import pytest
from pydantic import BaseModel

from leveret.client.cli.output import Column, Format, emit, emit_document, paint, write_facts, write_table, yaml_lines

pytestmark = pytest.mark.unit


class Thing(BaseModel):
    name: str
    size: int


COLUMNS = (
    Column("NAME", lambda thing: thing.name),
    Column("SIZE", lambda thing: str(thing.size), rank=1),
    Column("LONG", lambda _: "x" * 30, rank=2),
)
THINGS = [Thing(name="one", size=1), Thing(name="three", size=3)]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_into_a_pipe_every_column_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    write_table(THINGS, COLUMNS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NAME   SIZE  LONG"
    assert lines[1] == f"one    1     {'x' * 30}"


@pytest.mark.parametrize(("columns", "titles"), [(80, "NAME   SIZE  LONG"), (30, "NAME   SIZE"), (6, "NAME")])
def test_a_narrow_terminal_leaves_out_what_matters_least(
    columns: int, titles: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    write_table(THINGS, COLUMNS)
    assert capsys.readouterr().out.splitlines()[0] == titles


def test_an_empty_table_has_its_titles(capsys: pytest.CaptureFixture[str]) -> None:
    emit([], COLUMNS, Format.TABLE)
    assert capsys.readouterr().out == "NAME  SIZE  LONG\n"


def test_json_is_an_array_even_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    emit([], COLUMNS, Format.JSON)
    assert json.loads(capsys.readouterr().out) == []


def test_names_stand_alone(capsys: pytest.CaptureFixture[str]) -> None:
    emit(THINGS, COLUMNS, Format.NAME)
    assert capsys.readouterr().out == "one\nthree\n"


def test_there_is_no_colour_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print(paint("text", "bold red"))
    assert capsys.readouterr().out == "text\n"


def test_no_color_goes_before_force_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in paint("text", "bold")
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("text", "bold") == "text"


def test_facts_without_a_value_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    write_facts([("name", "web"), ("problem", ""), ("labels", "a=1\nb=2")])
    assert capsys.readouterr().out == "name    web\nlabels  a=1\n        b=2\n"


@dataclass(frozen=True)
class Case:
    value: object
    text: str


@pytest.mark.parametrize(
    "case",
    [
        Case({"a": 1, "b": None, "c": True}, "a: 1\nb: null\nc: true"),
        Case({"list": [1, {"x": "a", "z": []}], "empty": {}}, "list:\n  - 1\n  - x: a\n    z: []\nempty: {}"),
        Case([["a", "b"], "c"], "- - a\n  - b\n- c"),
        Case([], "[]"),
        Case({"version": "1.0", "yes": "no", "colon": "a: b"}, 'version: "1.0"\n"yes": "no"\ncolon: "a: b"'),
        Case({"text": "two\nlines", "hash": "#1", "dash": "- x"}, 'text: "two\\nlines"\nhash: "#1"\ndash: "- x"'),
        Case("2026-11-22", '"2026-11-22"'),
    ],
)
def test_yaml_means_what_the_json_means(case: Case) -> None:
    assert "\n".join(yaml_lines(case.value)) == case.text


def test_a_yaml_document_ends_with_a_line_end(capsys: pytest.CaptureFixture[str]) -> None:
    emit_document({"a": "b"}, Format.YAML)
    assert capsys.readouterr().out == "a: b\n"
