"""The description of the API is complete, true to the routes, and shown without anything from elsewhere."""

import re
from typing import Any

import pytest

from leveret.api import examples, openapi, problems
from leveret.api.app import build
from leveret.api.pages import errors_page, operations_page
from leveret.api.routes import ROUTES, Route
from leveret.api.settings import ApiSettings
from leveret.shared.errors import Code
from leveret.shared.messages import ADMINISTRATION, GROUPS, REQUESTS

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
    unsaid = {name for name, model in (REQUESTS | GROUPS).items() if model not in taken}
    assert unsaid == {"vm.delete.v1", "group.delete.v1"}  # DELETE needs no document


def test_everything_an_administrator_may_order_can_be_ordered_over_rest() -> None:
    taken = {route.takes for route in ROUTES if route.takes is not None}
    unsaid = {name for name, model in ADMINISTRATION.items() if not taken & set(model.__mro__)}
    # What ends something needs no document, use is noted by the API itself, and the question for room has parameters.
    ended = {"project.delete.v1", "token.revoke.v1", "amqp_user.remove.v1"}
    assert unsaid == ended | {"token.used.v1", "capacity.ask.v1"}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
def test_every_parameter_and_header_of_a_route_is_described(route: Route, description: dict[str, Any]) -> None:
    operation = description["paths"][route.path][route.method.lower()]
    parameters = [resolved(parameter, description) for parameter in operation["parameters"]]
    places = {(parameter["in"], parameter["name"]) for parameter in parameters}
    assert len(places) == len(parameters)
    assert {("header", name) for name in ("X-Request-Id", *route.reads)} <= places
    assert {name for place, name in places if place == "path"} == set(re.findall(r"{(\w+)}", route.path))
    assert all(parameter.get("description") for parameter in parameters if parameter["in"] == "header")
    for answer in operation["responses"].values():
        assert "X-Request-Id" in answer["headers"]
        assert all(resolved(header, description)["schema"] for header in answer["headers"].values())
    assert set(route.tells) <= set(operation["responses"][str(route.status)]["headers"])


def test_a_patch_may_be_called_what_it_is(description: dict[str, Any]) -> None:
    patches = [route for route in ROUTES if route.method == "PATCH"]
    assert patches
    for route in patches:
        body = description["paths"][route.path]["patch"]["requestBody"]
        assert set(body["content"]) == {"application/merge-patch+json", "application/json"}


def test_every_link_leads_to_an_operation_that_takes_its_parameters() -> None:
    paths = {route.operation: route.path for route in ROUTES}
    for origin, (operations, parameters) in openapi.LINKS.items():
        assert origin in paths
        for operation in operations:
            assert set(re.findall(r"{(\w+)}", paths[operation])) >= set(parameters)


def test_events_are_described_as_a_page_and_as_a_stream(description: dict[str, Any]) -> None:
    content = description["paths"]["/v1/events"]["get"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    assert content["text/event-stream"]["example"].startswith("id: ")


def resolved(item: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in item:
        return item
    found: Any = description
    for name in item["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
def test_every_route_says_what_it_takes_and_gives(route: Route, description: dict[str, Any]) -> None:
    operation = description["paths"][route.path][route.method.lower()]
    assert operation["operationId"] == route.operation
    assert operation["summary"]
    success = operation["responses"][str(route.status)]
    assert ("content" in success) == (route.status != 204)
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
    assert "secret-1" not in str(description)
    assert "secret-2" not in str(description)
