"""Cursors: where a list goes on. They name the last id that was shown, so that changes between pages move nothing."""

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

from leveret.shared.errors import Code, fail

_PREFIX = "v1."

#: What a cursor looks like: a version, and the 16 bytes of an id.
CURSOR_PATTERN = r"^v1\.[A-Za-z0-9_-]{21}[AQgw]$"
#: The same in a list that is ordered by name.
NAME_CURSOR_PATTERN = r"^v1\.[a-z][a-z0-9-]{0,62}$"
#: The same in a list that is ordered by age: 8 bytes of time in microseconds, and the 16 of an id.
AGE_CURSOR_PATTERN = r"^v1\.[A-Za-z0-9_-]{32}$"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIRST_MICROS = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LAST_MICROS = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND


def cursor_of(vm_id: UUID) -> str:
    return _PREFIX + base64.urlsafe_b64encode(vm_id.bytes).rstrip(b"=").decode()


def after_cursor(cursor: str) -> UUID:
    """The id to go on after. Raises LeveretError `invalid_request` for what no list has given out."""
    try:
        raw = base64.b64decode(cursor.removeprefix(_PREFIX) + "==", altchars=b"-_", validate=True)
        vm_id = UUID(bytes=raw)
    except (ValueError, binascii.Error) as error:
        raise _bad() from error
    if cursor_of(vm_id) != cursor:
        raise _bad()
    return vm_id


def cursor_of_name(name: str) -> str:
    return _PREFIX + name


def after_name(cursor: str) -> str:
    """The name to go on after. Raises LeveretError `invalid_request` for what no list has given out."""
    if not re.fullmatch(NAME_CURSOR_PATTERN, cursor):
        raise _bad()
    return cursor.removeprefix(_PREFIX)


def cursor_of_age(made_at: datetime, its_id: UUID) -> str:
    micros = (made_at - _EPOCH) // _MICROSECOND
    return _PREFIX + base64.urlsafe_b64encode(micros.to_bytes(8, "big", signed=True) + its_id.bytes).decode()


def after_age(cursor: str) -> tuple[datetime, UUID]:
    """The time and the id to go on after. Raises LeveretError `invalid_request` for what no list has given out."""
    if not re.fullmatch(AGE_CURSOR_PATTERN, cursor):
        raise _bad()
    raw = base64.urlsafe_b64decode(cursor.removeprefix(_PREFIX))
    # What nobody gave out may say any time: one that no date can be is before or after everything, too.
    micros = min(max(int.from_bytes(raw[:8], "big", signed=True), _FIRST_MICROS), _LAST_MICROS)
    return _EPOCH + micros * _MICROSECOND, UUID(bytes=raw[8:])


def _bad() -> Exception:
    errors = [{"field": "cursor", "message": "give the `next` of the page before, unchanged"}]
    return fail(Code.INVALID_REQUEST, "The parameters are not valid.", errors=errors)
