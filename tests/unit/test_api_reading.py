"""What the API makes of what it is sent: bodies, parameters, cursors, ids."""

import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from leveret.api import bodies, paging, rim
from leveret.api.examples import CREATE
from leveret.api.params import EventParams, ListParams, WaitParams
from leveret.shared.documents import CreateVm, StopVm
from leveret.shared.errors import Code, LeveretError

pytestmark = pytest.mark.unit


@given(st.uuids())
def test_a_cursor_leads_back_to_its_id(vm_id: uuid.UUID) -> None:
    cursor = paging.cursor_of(vm_id)
    assert paging.after_cursor(cursor) == vm_id
    assert re.fullmatch(paging.CURSOR_PATTERN, cursor)


@given(st.text(max_size=40))
def test_what_no_list_has_given_out_is_no_cursor(text: str) -> None:
    with pytest.raises(LeveretError) as caught:
        paging.after_cursor(text)
    assert caught.value.problem.code is Code.INVALID_REQUEST


@pytest.mark.parametrize(
    "change",
    [str.lower, lambda cursor: cursor + " ", lambda cursor: cursor + "=", lambda cursor: cursor[3:]],
)
def test_a_cursor_that_was_changed_is_none(change: Callable[[str], str]) -> None:
    cursor = paging.cursor_of(uuid.UUID(int=0xABCDEF << 96))
    with pytest.raises(LeveretError):
        paging.after_cursor(change(cursor))


def refused(body: bytes | str, model: type[CreateVm | StopVm] = CreateVm) -> list[dict[str, str]]:
    with pytest.raises(LeveretError) as caught:
        bodies.parse(model, body.encode() if isinstance(body, str) else body)
    assert caught.value.problem.code is Code.INVALID_REQUEST
    errors: list[dict[str, str]] = caught.value.problem.details["errors"]
    assert errors
    return errors


def test_a_document_is_read() -> None:
    assert bodies.parse(CreateVm, json.dumps(CREATE).encode()).vcpus == 2


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "{} {}",
        b"\xff\xfe{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"image": {"name": "x"}, "vcpus": NaN}',
        '{"image": {"name": "x"}, "vcpus": 1e999}',
        '{"image": {"name": "x"}, "vcpus": "2"}',
        '{"image": {"name": "x"}, "vcpus": true}',
        '{"image": {"name": "x"}, "user_data": "\\ud800"}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_is_not_one_valid_document_is_refused(body: bytes | str) -> None:
    refused(body)


@pytest.mark.parametrize(
    "body",
    [
        '{"image": {"name": "x"}, "vcpus": 1, "vcpus": 2}',
        '{"image": {"name": "x", "name": "y"}}',
        '{"image": {"name": "x"}, "labels": {"a": "1", "a": "2"}}',
    ],
)
def test_a_field_that_stands_there_twice_is_refused(body: str) -> None:
    assert refused(body) == [{"field": "(document)", "message": "a field stands there twice"}]


def test_an_unknown_field_is_named() -> None:
    assert refused('{"grace_ms": 5}', StopVm) == [{"field": "grace_ms", "message": "Extra inputs are not permitted"}]


SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "document",
    [
        {"image": {"name": "x"}, "user_data": {"password": SECRET}},
        {"image": {"name": "x"}, "user_data_base64": f"!{SECRET}"},
        {"image": {"name": "x"}, "ssh_keys": [SECRET * 3]},
        {"image": {"url": f"http://me:{SECRET}@host/x", "sha256": "0" * 64}},
        {"image": {"name": "x"}, "name": SECRET.upper()},
    ],
)
def test_a_refusal_never_repeats_a_value(document: dict[str, Any]) -> None:
    assert SECRET.lower() not in json.dumps(refused(json.dumps(document))).lower()


def test_labels_are_asked_for_as_key_equals_value() -> None:
    assert ListParams(label=["a=1", "b=", "c=x=y", "a=1"]).labels() == {"a": "1", "b": "", "c": "x=y"}
    assert ListParams().labels() is None


@pytest.mark.parametrize("labels", [["a"], ["=1"], [""], ["a=1", "a=2"]])
def test_other_labels_are_refused(labels: list[str]) -> None:
    with pytest.raises(LeveretError) as caught:
        ListParams(label=labels).labels()
    assert caught.value.problem.details["errors"][0]["field"] == "label"


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (ListParams, {"limit": 0}),
        (ListParams, {"limit": 1001}),
        (ListParams, {"name": "a\x00b"}),
        (ListParams, {"stat": "running"}),
        (EventParams, {"wait_s": 56}),
        (EventParams, {"after": -1}),
        (EventParams, {"after": 2**63}),
        (EventParams, {"after": "newest"}),
        (WaitParams, {"wait": "paused"}),
        (WaitParams, {"timeout_s": "nan"}),
        (WaitParams, {"timeout_s": -1}),
    ],
)
def test_parameters_have_bounds(model: type[ListParams], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(values)


@pytest.mark.parametrize("given_id", ["abc", "a.b:c_d-1", "x" * 64])
def test_a_plain_request_id_is_kept(given_id: str) -> None:
    assert rim.request_id_from(given_id) == given_id


@pytest.mark.parametrize("given_id", [None, "", "a b", 'a"b', "x" * 65, "a\n", "é"])
def test_any_other_request_id_is_replaced(given_id: str | None) -> None:
    assert uuid.UUID(rim.request_id_from(given_id)).version == 7
