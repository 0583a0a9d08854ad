"""Label selectors as Kubernetes reads them."""

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.api import selectors
from leveret.api.selectors import Requirement
from leveret.shared.errors import Code, LeveretError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("selector", "meant"),
    [
        ("a=b", [("a", ("b",), True)]),
        ("a==b", [("a", ("b",), True)]),
        ("a = b", [("a", ("b",), True)]),
        ("a=", [("a", ("",), True)]),
        ("a!=b", [("a", ("b",), False)]),
        ("a", [("a", None, True)]),
        ("!a", [("a", None, False)]),
        ("! a ", [("a", None, False)]),
        ("a in (x)", [("a", ("x",), True)]),
        ("a in(x,y)", [("a", ("x", "y"), True)]),
        ("a  notin  ( x , y-1 , z_2.3 )", [("a", ("x", "y-1", "z_2.3"), False)]),
        ("a in (,x)", [("a", ("", "x"), True)]),
        ("example.org/tier=web", [("example.org/tier", ("web",), True)]),
        ("in", [("in", None, True)]),
        ("in in (in)", [("in", ("in",), True)]),
        ("notin notin (notin)", [("notin", ("notin",), False)]),
        (
            "a=1,b!=2 , c,!d,e in (3, 4),f notin (5)",
            [
                ("a", ("1",), True),
                ("b", ("2",), False),
                ("c", None, True),
                ("d", None, False),
                ("e", ("3", "4"), True),
                ("f", ("5",), False),
            ],
        ),
    ],
)
def test_a_selector_means(selector: str, meant: list[tuple[str, tuple[str, ...] | None, bool]]) -> None:
    assert selectors.parse([selector]) == tuple(Requirement(*each) for each in meant)


def test_all_selectors_must_be_met() -> None:
    assert selectors.parse(["a", "b,c"]) == selectors.parse(["a,b,c"])
    assert selectors.parse([]) == ()


def why(*texts: str) -> str:
    with pytest.raises(LeveretError) as caught:
        selectors.parse(texts)
    assert caught.value.problem.code is Code.INVALID_REQUEST
    [error] = caught.value.problem.details["errors"]
    assert error["field"] == "label"
    return str(error["message"])


@pytest.mark.parametrize(
    ("selector", "at"),
    [
        ("", 1),
        (" ", 1),
        ("=b", 1),
        ("!", 1),
        ("!a=b", 1),
        ("!a in (b)", 1),
        ("a b", 1),
        ("a=b c", 1),
        ("a>1", 1),
        ("a=b=c", 1),
        ("a in b", 1),
        ("a in (b", 1),
        ("a in b)", 1),
        ("a in (b c)", 1),
        ("ain (b)", 1),
        ("a=\u00e4", 1),
        ("-a", 1),
        ("a" * 64, 1),
        ("a=" + "b" * 64, 1),
        ("a,", 3),
        ("a,,b", 3),
        ("ab=c,d e", 6),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place_and_what_could_be_written(selector: str, at: int) -> None:
    told = why(selector)
    assert f"from character {at} on" in told
    assert selectors.FORMS in told


def test_a_refusal_never_repeats_what_was_given() -> None:
    assert "hunter2" not in why("password=hunter2 hunter2")


def test_there_may_be_so_many_requirements() -> None:
    assert len(selectors.parse(["a"] * selectors.REQUIREMENTS_MAX)) == selectors.REQUIREMENTS_MAX
    assert str(selectors.REQUIREMENTS_MAX) in why(*["a,b"] * selectors.REQUIREMENTS_MAX)


@given(st.text(alphabet="ab=!,() \tin", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(LeveretError):
        assert selectors.parse([text])


@pytest.mark.parametrize("text", ["a in (" + "  ," * 600 + "x y", "a in (" + " " * 2000, "a" + " " * 2000 + "?"])
def test_no_text_takes_long_to_refuse(text: str) -> None:
    began = time.perf_counter()
    why(text)
    assert time.perf_counter() - began < 0.5
