"""The headers of a request that mean the same over REST and AMQP: one pattern for each, with its words."""

import re
from uuid import UUID

#: As a JSON schema has it.
REQUEST_ID_PATTERN = r"^[!-~]{1,128}$"
REQUEST_ID_WORDS = "give 1 to 128 printable ASCII characters without spaces"

#: W3C Trace Context. Plain, since not every language's expressions can look ahead: see `traceparent_in` for the rest.
TRACEPARENT_PATTERN = r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"

#: A generation, or generation and revision: an ETag without its quotes.
IF_MATCH_PATTERN = r"^[0-9]{1,19}(\.[0-9]{1,19})?$"
#: Ends the ETag of a VM while its host is silent: its document says so, though the VM is the same.
SILENT_MARK = "-silent"

# To be matched in full, since `$` alone would let a line feed pass.
_REQUEST_ID = re.compile(REQUEST_ID_PATTERN)
_TRACEPARENT = re.compile(TRACEPARENT_PATTERN)
_IF_MATCH = re.compile(IF_MATCH_PATTERN)
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def is_request_id(text: str | None) -> bool:
    """Whether a request may be called this. It ends up in logs, events and message headers."""
    return text is not None and _REQUEST_ID.fullmatch(text) is not None


def uuid_in(text: str | None) -> UUID | None:
    """The id, or None for what is none as ids are written: Python would take `urn:uuid:` and braces for one too."""
    return UUID(text) if text is not None and _UUID.fullmatch(text) else None


def is_if_match(text: str) -> bool:
    """Whether a VM could be held against this."""
    return _IF_MATCH.fullmatch(text) is not None


def traceparent_in(text: str | None) -> str | None:
    """The trace context, or None: what cannot be read is left out, as the W3C has it, and never refused.

    Version ff is forbidden, and an id of nothing but zeros is none.
    """
    if text is None or not _TRACEPARENT.fullmatch(text):
        return None
    version, trace_id, parent_id, _ = text.split("-")
    return text if version != "ff" and trace_id.strip("0") and parent_id.strip("0") else None


def trace_id_in(text: str | None) -> str | None:
    """The id of the whole trace, in hex."""
    traceparent = traceparent_in(text)
    return traceparent.split("-")[1] if traceparent else None
