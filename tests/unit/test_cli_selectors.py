"""Selectors mean what they mean in Kubernetes."""

import pytest
import typer

from leveret.client.cli.selectors import selector

pytestmark = pytest.mark.unit

LABELS = {"app": "web", "tier": "front", "empty": ""}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("app=web", True),
        ("app==web", True),
        ("app = web , tier = front", True),
        ("app=db", False),
        ("app!=db", True),
        ("missing!=x", True),
        ("app in (db, web)", True),
        ("app in (db)", False),
        ("missing in (x)", False),
        ("app notin (db)", True),
        ("missing notin (x)", True),
        ("app", True),
        ("!app", False),
        ("! missing", True),
        ("empty=", True),
        ("app=web,!missing,tier in (front,back)", True),
        ("example.org/role=x", False),
    ],
)
def test_selectors(text: str, expected: bool) -> None:
    assert selector([text]).matches(LABELS) is expected


def test_given_more_than_once_all_of_them_must_hold() -> None:
    assert selector(["app=web", "tier=front"]).matches(LABELS)
    assert not selector(["app=web", "tier=back"]).matches(LABELS)


def test_only_equalities_are_left_to_the_api() -> None:
    assert selector(["app=web,tier in (a,b),zone in (c),x!=y,z"]).equalities == {"app": "web", "zone": "c"}


@pytest.mark.parametrize("text", ["=x", "app=a b", "app in", "app in web", "app in (we b)", "-app", "app>1", "a=b,=c"])
def test_what_is_no_selector_is_a_usage_error_that_shows_it(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no selector"):
        selector([text])
