"""The description of the API is complete, true to the routes, and shown without anything from elsewhere."""

import re
from typing import Any

import pytest

from leveret.api import examples, problems
from leveret.api.app import build
from leveret.api.pages import errors_page, operations_page
from leveret.api.routes import ROUTES, Route
from leveret.api.settings import ApiSettings
from leveret.shared.errors import Code
from leveret.shared.messages import REQUESTS

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    nowhere = {"amqp_url": "amqp://leveret-api:secret-1@127.0.0.1:1/x", "database_url": "postgresql://u:secret-2@h/d"}
    document: dict[str, Any] = build(ApiSettings.model_validate(nowhere)).openapi()
    return document


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [route.operation for route in ROUTES]
    assert len(set(names)) == len(names)
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)


def test_every_request_can_be_made_over_rest() -> None:
    taken = {route.takes for route in ROUTES}
    unsaid = {name for name, model in REQUESTS.items() if model not in taken}
    assert unsaid == {"vm.delete"}  # DELETE needs no document


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
def test_every_route_says_what_it_takes_and_gives(route: Route, description: dict[str, Any]) -> None:
    operation = description["paths"][route.path][route.method.lower()]
    assert operation["operationId"] == route.operation
    assert operation["summary"]
    success = operation["responses"][str(route.status)]
    assert success["content"]
    assert ("security" in operation) == route.path.startswith("/v1/")
    assert ("requestBody" in operation) == (route.takes is not None)
    if route.needs_token:
        assert {"401", "500", "503"} <= operation["responses"].keys()
    assert "HTTPValidationError" not in str(operation)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
def test_examples_are_valid_documents(route: Route, description: dict[str, Any]) -> None:
    for model in (route.takes, route.gives):
        if model is not None:
            shown = examples.DOCUMENTS[model.__name__]
            model.model_validate(shown)
    for status, answer in description["paths"][route.path][route.method.lower()]["responses"].items():
        for example in answer.get("content", {}).get(problems.MEDIA_TYPE, {}).get("examples", {}).values():
            assert problems.ProblemView.model_validate(example["value"]).status == int(status)


def test_every_reference_leads_somewhere(description: dict[str, Any]) -> None:
    schemas = description["components"]["schemas"]
    for name in re.findall(r"#/components/schemas/([\w.-]+)", str(description)):
        assert name in schemas


def test_problems_that_may_be_told_have_a_status() -> None:
    assert {code for route in ROUTES for code in route.problems} <= set(problems.STATUS)
    assert Code.INTERNAL in problems.STATUS


@pytest.mark.parametrize("page", ["operations", "errors"])
def test_the_pages_load_and_run_nothing(page: str, description: dict[str, Any]) -> None:
    html = errors_page() if page == "errors" else operations_page(description)
    assert "<script" not in html
    assert not re.search(r"""(src|href)=["'](https?:)?//""", html)
    for route in ROUTES if page == "operations" else ():
        assert f'id="{route.operation}"' in html


def test_no_secret_of_the_settings_is_in_the_description_or_in_their_text(description: dict[str, Any]) -> None:
    settings = ApiSettings.model_validate(
        {"amqp_url": "amqp://u:secret-1@127.0.0.1:1/x", "database_url": "postgresql://u:secret-2@h/d"}
    )
    assert "secret-2" not in repr(settings)
    assert "secret" not in str(description["paths"])
