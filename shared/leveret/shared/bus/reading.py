"""Reading what a message says about itself, so that no client can hurt the reader.

The broker hands on whatever is well-formed AMQP: text that is not UTF-8, timestamps beyond the year 9999, tables ten
thousand levels deep, field values that take quadratic time to slice. pamqp raises at the first three, aiormq then ends
the connection, and the broker hands the same message to the next consumer: one message stops every conductor. So
this reader takes the place of pamqp's for content headers (`install`). It never raises at anything a client can
choose, takes linear time, and tells in `faults` what it could not read.

All that it returns is bounded plain data: None, bool, int, float, str, and lists and dicts of these.
"""

import math
import re
import struct
from typing import Any, Final

import pamqp.decode
from pamqp.commands import Basic
from pamqp.header import ContentHeader

#: More than this is not read at all, and said to be a fault. A request needs a few hundred bytes.
MAX_HEADER_BYTES = 16 * 1024
#: Values in all, those in inner tables and arrays included.
MAX_VALUES = 128
#: Levels of tables and arrays within the headers.
MAX_DEPTH = 4
MAX_FAULTS = 8

#: Stands for a header value that is no plain data: no check of a field lets it pass.
UNREADABLE: Final = "(unreadable)"

_FAULTS = "leveret_faults"
_HEAD = struct.Struct(">HHQH")
_LENGTH = struct.Struct(">I")
_FLAGS = struct.Struct(">H")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FIXED: dict[int, struct.Struct] = {
    ord("t"): struct.Struct(">?"),
    ord("b"): struct.Struct(">b"),
    ord("B"): struct.Struct(">B"),
    ord("s"): struct.Struct(">h"),
    ord("u"): struct.Struct(">H"),
    ord("I"): struct.Struct(">i"),
    ord("i"): struct.Struct(">I"),
    ord("l"): struct.Struct(">q"),
    ord("L"): struct.Struct(">q"),
    ord("f"): struct.Struct(">f"),
    ord("d"): struct.Struct(">d"),
    ord("T"): struct.Struct(">Q"),
    ord("D"): struct.Struct(">BI"),
}
_VOID = (ord("V"), 0)
_TEXT, _BYTES, _ARRAY, _TABLE = ord("S"), ord("x"), ord("A"), ord("F")

#: Bit, name and kind of every property in the order of the wire (AMQP 0-9-1, class basic). Of what nobody here uses
#: (`unused`) it does not matter what it says.
_PROPERTIES = (
    (15, "content_type", "text"),
    (14, "content_encoding", "text"),
    (13, "headers", "table"),
    (12, "delivery_mode", "octet"),
    (11, "priority", "octet"),
    (10, "correlation_id", "text"),
    (9, "reply_to", "text"),
    (8, "expiration", "unused"),
    (7, "message_id", "text"),
    (6, "timestamp", "timestamp"),
    (5, "message_type", "text"),
    (4, "user_id", "text"),
    (3, "app_id", "unused"),
    (2, "cluster_id", "unused"),
)
#: What AMQP calls a property that pamqp has under another name.
_NAMES = {"message_type": "type"}


def install() -> None:
    """Make every connection of this process read content headers, and the names in deliveries, in this way."""
    ContentHeader.unmarshal = _unmarshal  # type: ignore[method-assign]
    pamqp.decode.METHODS["shortstr"] = _short_text


def faults_of(header: ContentHeader) -> tuple[str, ...]:
    """What could not be read in the properties of a message; nothing of an honest client's."""
    faults: tuple[str, ...] = getattr(header, _FAULTS, ())
    return faults


class _Broken(Exception):
    """The bytes end before the value does, or no kind of value is known by this mark."""


def _unmarshal(self: ContentHeader, data: bytes) -> None:
    class_id, self.weight, self.body_size, flags = _HEAD.unpack_from(data)
    self.class_id = class_id
    faults: list[str] = []
    try:
        _read_properties(self.properties, data, flags, faults)
    except (_Broken, struct.error, IndexError):
        faults.append("the properties end too soon")
    setattr(self, _FAULTS, tuple(faults[:MAX_FAULTS]))


def _read_properties(properties: Basic.Properties, data: bytes, flags: int, faults: list[str]) -> None:
    at, more = _HEAD.size, flags
    while more & 1:
        (more,) = _FLAGS.unpack_from(data, at)
        at += _FLAGS.size
    for bit, name, kind in _PROPERTIES:
        if not flags >> bit & 1:
            continue
        match kind:
            case "text" | "unused":
                value, at, is_clean = _read_text(data, at)
                setattr(properties, name, value)
                if not is_clean and kind == "text":
                    faults.append(f"the property {_NAMES.get(name, name)} is not plain UTF-8 text")
            case "table":
                at = _read_headers(properties, data, at, faults)
            case "octet":
                setattr(properties, name, data[at])
                at += 1
            case _:
                at += 8  # a timestamp, which may be any number: nobody here believes in other people's clocks


def _read_text(data: bytes, at: int) -> tuple[str, int, bool]:
    """The short string here, where it ends, and whether it is what was sent.

    What is not UTF-8, or holds control characters, is told in ASCII with question marks: never longer than it was.
    """
    end = at + 1 + data[at]
    raw = data[at + 1 : end]
    if end > len(data):
        raise _Broken
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "\0"
    if _CONTROL.search(text):
        return "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in raw), end, False
    return text, end, True


def _short_text(value: bytes) -> tuple[int, str]:
    """A short string of a method, such as the routing key of a delivery, as `pamqp.decode` has it."""
    try:
        text, end, _ = _read_text(value, 0)
    except (_Broken, IndexError):
        raise ValueError("Could not unpack short string value") from None
    return end, text


def _read_headers(properties: Basic.Properties, data: bytes, at: int, faults: list[str]) -> int:
    size: int = _LENGTH.unpack_from(data, at)[0]
    start, end = at + 4, at + 4 + size
    if end > len(data):
        raise _Broken
    properties.headers = {}
    if size > MAX_HEADER_BYTES:
        faults.append(f"the headers have {size} bytes; {MAX_HEADER_BYTES} may be sent")
        return end
    table = _Table(data, faults)
    try:
        table.fill(properties.headers, start, end, 1)
    except (_Broken, struct.error, IndexError):
        faults.append(table.stopped or "the headers end too soon")
    return end


class _Table:
    """The headers of one message while they are read."""

    def __init__(self, data: bytes, faults: list[str]) -> None:
        self._data = data
        self._faults = faults
        self._values = 0
        self.stopped = ""

    def fill(self, found: dict[str, Any], at: int, end: int, depth: int) -> None:
        """Add the fields between these two places."""
        while at < end:
            name, at, is_clean = _read_text(self._data, at)
            value, at = self._read(at, end, depth)
            if not is_clean:
                self._faults.append("the name of a header is not plain UTF-8 text")
            elif name in found:
                self._faults.append("a header stands there twice")
            else:
                found[name] = value

    def _read(self, at: int, end: int, depth: int) -> tuple[Any, int]:
        """The value here and where it ends. Raises _Broken when there are too many, or no sense in it."""
        self._values += 1
        if self._values > MAX_VALUES:
            self._stop(f"there are more than {MAX_VALUES} headers")
        kind, at = self._data[at], at + 1
        if (fixed := _FIXED.get(kind)) is not None:
            return _plain(kind, fixed.unpack_from(self._data, at)), self._within(at + fixed.size, end)
        if kind in _VOID:
            return None, at
        if kind not in (_TEXT, _BYTES, _ARRAY, _TABLE):
            self._stop("a header has a value of an unknown kind")
        (size,) = _LENGTH.unpack_from(self._data, at)
        at, after = at + 4, self._within(at + 4 + size, end)
        if kind == _TEXT:
            return _long_text(self._data[at:after]), after
        if kind == _BYTES or depth >= MAX_DEPTH:
            return UNREADABLE, after
        if kind == _ARRAY:
            return self._list(at, after, depth + 1), after
        inner: dict[str, Any] = {}
        self.fill(inner, at, after, depth + 1)
        return inner, after

    def _list(self, at: int, end: int, depth: int) -> list[Any]:
        found = []
        while at < end:
            value, at = self._read(at, end, depth)
            found.append(value)
        return found

    def _within(self, after: int, end: int) -> int:
        if after > end:
            self._stop("a header is longer than the headers")
        return after

    def _stop(self, why: str) -> None:
        self.stopped = why
        raise _Broken


def _plain(kind: int, read: tuple[Any, ...]) -> Any:
    if kind == ord("D"):
        scale, digits = read
        return f"{digits}e-{scale}"
    (value,) = read
    fits = math.isfinite(value) if isinstance(value, float) else value < 2**63
    return value if fits else UNREADABLE


def _long_text(raw: bytes) -> str:
    """The text; without NUL, which no database takes."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return UNREADABLE
    return UNREADABLE if "\0" in text else text
