"""What a message says about itself, read whatever it is."""

import struct
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from leveret.shared.bus import Delivery
from leveret.shared.bus.reading import MAX_FAULTS, MAX_VALUES, faults_of, install
from leveret.shared.errors import LeveretError
from leveret.shared.messages import REQUESTS

install()

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)  # all that pamqp writes
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(NAMES, SCALARS, max_size=4)


def read(raw: bytes) -> ContentHeader:
    header = ContentHeader()
    header.unmarshal(raw)
    return header


@given(st.dictionaries(NAMES, VALUES, max_size=12), NAMES)
def test_what_an_honest_client_writes_is_read_as_it_was_written(headers: dict[str, Any], text: str) -> None:
    written = Basic.Properties(
        content_type="application/json",
        headers=headers,
        delivery_mode=2,
        priority=7,
        correlation_id=text,
        message_id="m",
        timestamp=datetime(2026, 1, 1, tzinfo=UTC),
        message_type="vm.start.v1",
        user_id="ada",
        app_id="shop",
    )
    header = read(ContentHeader(0, 17, written).marshal())
    assert header.body_size == 17
    assert not faults_of(header)
    for name in ("content_type", "headers", "delivery_mode", "priority", "message_id", "message_type", "user_id"):
        assert getattr(header.properties, name) == getattr(written, name)
    assert (header.properties.correlation_id or "") == text


@given(st.integers(0, 0xFFFF), st.binary(max_size=600))
def test_no_bytes_make_the_reader_fail(flags: int, raw: bytes) -> None:
    header = read(struct.pack(">HHQH", 60, 0, 5, flags) + raw)
    assert len(faults_of(header)) <= MAX_FAULTS
    for _, value in header.properties:
        assert value is None or isinstance(value, str | int | dict)
        str(value).encode()


@given(st.binary(max_size=2000))
def test_no_table_makes_the_reader_fail(inner: bytes) -> None:
    header = read(struct.pack(">HHQHI", 60, 0, 5, 1 << 13, len(inner)) + inner)
    headers = header.properties.headers
    assert headers is not None
    assert len(headers) <= MAX_VALUES
    repr(headers).encode()


def delivery(**more: Any) -> Delivery:
    plain: dict[str, Any] = {
        "queue": "q",
        "body": b"{}",
        "type": "vm.start.v1",
        "content_type": "application/json",
        "headers": {},
        "message_id": None,
        "user_id": None,
        "reply_to": None,
        "correlation_id": None,
    }
    return Delivery(**(plain | more))


@pytest.mark.parametrize(
    ("content_type", "content_encoding"),
    [
        ("application/json", None),
        ("Application/JSON", ""),
        ("application/json; charset=utf-8", "utf-8"),
        ('application/json;charset="UTF-8"', "UTF-8"),
        ("application/json;", "identity"),
    ],
)
def test_json_in_utf8_is_taken(content_type: str, content_encoding: str | None) -> None:
    delivery(content_type=content_type, content_encoding=content_encoding).decoded(among=REQUESTS)


@pytest.mark.parametrize(
    "said",
    [
        {"content_type": None},
        {"content_type": ""},
        {"content_type": "text/json"},
        {"content_type": "application/json; charset=latin-1"},
        {"content_type": "application/json; charset=utf-8; v=2"},
        {"content_type": "application/jsonx"},
        {"content_encoding": "gzip"},
        {"content_encoding": "latin-1"},
    ],
)
def test_anything_else_is_not(said: dict[str, str | None]) -> None:
    with pytest.raises(LeveretError) as caught:
        delivery(**said).decoded(among=REQUESTS)
    assert caught.value.problem.code == "unsupported_content_type"
