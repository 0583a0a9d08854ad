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
from starlette.requests import Request

from leveret.api import headers, paging, rim
from leveret.api.params import EventParams, ListParams, WaitParams
from leveret.shared.documents import CreateVm, StopVm
from leveret.shared.errors import Code, LeveretError
from leveret.shared.examples import CREATE
from leveret.shared.messages import parse

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


@pytest.mark.parametrize("name", ["a", "shop", "k8s-" + "x" * 58])
def test_a_cursor_leads_back_to_its_name(name: str) -> None:
    cursor = paging.cursor_of_name(name)
    assert paging.after_name(cursor) == name
    assert re.fullmatch(paging.NAME_CURSOR_PATTERN, cursor)


@given(st.text(max_size=40))
def test_what_no_list_has_given_out_is_no_name_to_go_on_after(text: str) -> None:
    with pytest.raises(LeveretError) as caught:
        paging.after_name(text)
    assert caught.value.problem.code is Code.INVALID_REQUEST


def asked_with(*lines: tuple[str, str]) -> Request:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in lines]
    return Request({"type": "http", "headers": raw})


@pytest.mark.parametrize(
    ("given", "meant"), [('"3.1795339809000000"', "3.1795339809000000"), ('"3"', "3"), ("*", None), (' "3" ', "3")]
)
def test_an_etag_is_told_without_its_quotes(given: str, meant: str | None) -> None:
    assert headers.if_match(asked_with(("if-match", given))) == meant
    assert re.fullmatch(headers.IF_MATCH_PATTERN, given.strip())


def test_without_an_etag_any_vm_will_do() -> None:
    assert headers.if_match(asked_with()) is None


@pytest.mark.parametrize(
    "lines", [["3"], ['W/"3"'], ['"3", "4"'], ['"3"', '"4"'], ['"3'], [""], ['"three"'], ['"3."'], ["*, *"], ['"\xb3"']]
)
def test_anything_but_one_strong_etag_is_refused(lines: list[str]) -> None:
    with pytest.raises(LeveretError) as caught:
        headers.if_match(asked_with(*(("if-match", line) for line in lines)))
    assert caught.value.problem.details["errors"][0]["field"] == "If-Match"


def refused(body: bytes | str, model: type[CreateVm | StopVm] = CreateVm) -> list[dict[str, str]]:
    with pytest.raises(LeveretError) as caught:
        parse(model, body.encode() if isinstance(body, str) else body)
    assert caught.value.problem.code is Code.INVALID_REQUEST
    errors: list[dict[str, str]] = caught.value.problem.details["errors"]
    assert errors
    return errors


def test_a_document_is_read() -> None:
    assert parse(CreateVm, json.dumps(CREATE).encode()).vcpus == 2


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


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (ListParams, {"limit": 0}),
        (ListParams, {"limit": 100_001}),
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
