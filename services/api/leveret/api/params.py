"""The parameters of every address, as models: one that is not known is an error, not a surprise."""

import re
from datetime import datetime
from typing import Annotated, Literal, get_origin
from uuid import UUID

from fastapi import Path, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from leveret.api import selectors
from leveret.api.paging import (
    AGE_CURSOR_PATTERN,
    CURSOR_PATTERN,
    NAME_CURSOR_PATTERN,
    after_age,
    after_cursor,
    after_name,
)
from leveret.shared.documents import Placement, ShortName
from leveret.shared.errors import Code, fail
from leveret.shared.headers import uuid_in
from leveret.shared.lifecycle import State
from leveret.shared.placements import AskCapacity
from leveret.shared.waiting import Target

BIGINT_MAX = 2**63 - 1

_DIGITS = re.compile(r"-?[0-9]{1,19}")
_DECIMAL = re.compile(r"-?[0-9]{1,19}(\.[0-9]{1,19})?([eE][+-]?[0-9]{1,3})?")


def _in_digits(value: object) -> object:
    """Python would read `1_0`, ` 5` and `5.0` too; nobody else does."""
    if isinstance(value, str) and not _DIGITS.fullmatch(value):
        raise ValueError("give a whole number, in digits")
    return value


def _in_decimals(value: object) -> object:
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        raise ValueError("give a number, as 2 or 2.5")
    return value


def _as_ids_are_written(value: object) -> object:
    if isinstance(value, str) and uuid_in(value) is None:
        raise ValueError("give a UUID, as 0198c5a2-6d4f-7c31-9d0e-3f6f0b8f2a10")
    return value


def _a_place(value: object) -> object:
    """One message for what is neither of two things."""
    if value == "latest" or (isinstance(value, int) and 0 <= value <= BIGINT_MAX):
        return value
    if isinstance(value, str) and _DIGITS.fullmatch(value) and 0 <= int(value) <= BIGINT_MAX:
        return int(value)
    raise ValueError(f"give the `seq` of an event, 0 to {BIGINT_MAX}, or latest")


Whole = Annotated[int, BeforeValidator(_in_digits)]
Number = Annotated[float, BeforeValidator(_in_decimals)]
VmId = Annotated[UUID, Path(), BeforeValidator(_as_ids_are_written)]
TokenId = Annotated[UUID, Path(), BeforeValidator(_as_ids_are_written)]
Place = Annotated[Annotated[int, Field(ge=0, le=BIGINT_MAX)] | Literal["latest"], BeforeValidator(_a_place)]

Text = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]
#: All of them, written out as bytes, fit into what a web server takes for an address (64 KiB).
Selector = Annotated[
    str, Field(max_length=512, pattern=r"^[^\x00]*$", json_schema_extra={"pattern": selectors.PATTERN})
]

LabelText = Annotated[
    str, Field(max_length=127, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?=[A-Za-z0-9._-]{0,63}$")
]


class _Params(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WaitParams(_Params):
    """Waiting for a VM. `ready` is running, and the guest said that it is up."""

    wait: Target | None = Field(default=None, description="Answer when the VM is there, or cannot get there.")
    timeout_s: Number = Field(default=30.0, ge=0, le=3600, description="Answer after this time whatever was reached.")


class CreateParams(WaitParams):
    wait: Literal["running", "ready", "stopped"] | None = Field(
        default=None, description="Answer when the VM is there, or cannot get there."
    )
    dry_run: bool = Field(
        default=False, description="Only say whether it would be accepted. Nothing is made, and nothing waited for."
    )


class DeleteParams(WaitParams):
    wait: Literal["deleted"] | None = Field(default=None, description="Answer when the VM is gone.")


class ListParams(_Params):
    state: list[State] = Field(
        default=[], max_length=16, description="Only these. Deleted VMs are shown when asked for."
    )
    label: list[Selector] = Field(
        default=[],
        max_length=8,
        description=f"Only those with such labels: {selectors.FORMS}. Of several, given again or after commas, "
        "all must be met.",
    )
    host: Text | None = Field(default=None, description="Only those on this host, by id or name.")
    name: Text | None = Field(default=None, description="Only the one of this name.")
    group: Text | None = Field(default=None, description="Only those of this group.")
    limit: Whole = Field(default=100, ge=1, le=100_000, description="The answer is streamed, so it may be a long one.")
    cursor: Text | None = Field(
        default=None, description="The `next` of the page before.", json_schema_extra={"pattern": CURSOR_PATTERN}
    )

    def labels(self) -> list[dict[str, object]] | None:
        """Requirements as the list query reads them. Raises LeveretError `invalid_request`."""
        return [requirement.row() for requirement in selectors.parse(self.label)] or None

    def after(self) -> UUID | None:
        return after_cursor(self.cursor) if self.cursor is not None else None


class EventParams(_Params):
    after: Place = Field(
        default=0, description="Only events with a greater `seq`; `latest` for those that are still to come."
    )
    limit: Whole = Field(default=100, ge=1, le=1000, description="Events in one page; a stream has no end.")
    wait_s: Number = Field(
        default=0.0, ge=0, le=55, description="When there is none, wait this long for one; a stream always waits."
    )


def _label_pairs(texts: list[str], field: str) -> dict[str, str]:
    """`key=value`s as labels. Raises LeveretError `invalid_request` for two values of one key."""
    labels = dict(text.split("=", 1) for text in texts)
    if len(labels) < len(set(texts)):
        errors = [{"field": field, "message": "give each key once"}]
        raise fail(Code.INVALID_REQUEST, "The parameters are not valid.", errors=errors)
    return labels


class CapacityParams(_Params):
    """The shape of a VM, and which hosts it may have: what a create says of that, and the same when it is left out."""

    vcpus: Whole = Field(default=1, ge=1, le=256, description="Virtual processors.")
    memory_mib: Whole = Field(default=1024, ge=64, le=4 * 1024 * 1024, description="Memory in MiB.")
    disk_gib: Whole = Field(default=10, ge=1, le=64 * 1024, description="Size of the disk in GiB.")
    zones: list[ShortName] = Field(
        default=[], max_length=32, description="Only hosts of these zones. Give it once for each."
    )
    require_labels: list[LabelText] = Field(
        default=[], max_length=32, description="Only hosts that have all of these labels, as key=value."
    )
    forbid_labels: list[LabelText] = Field(
        default=[], max_length=32, description="No host that has any of these labels, as key=value."
    )
    tolerate: list[LabelText] = Field(
        default=[], max_length=32, description="Hosts with these taints too, as key=value."
    )

    def question(self) -> AskCapacity:
        """As the conductor is asked. Raises LeveretError `invalid_request`."""
        labels = {
            field: _label_pairs(getattr(self, field), field)
            for field in ("require_labels", "forbid_labels", "tolerate")
        }
        placement = Placement.model_validate({"zones": self.zones, **labels})
        sizes = self.model_dump(include={"vcpus", "memory_mib", "disk_gib"})
        return AskCapacity(**sizes, placement=placement)


class ConsoleParams(_Params):
    max_bytes: Whole = Field(default=65536, ge=1, le=1024 * 1024, description="How much of the end of the log to give.")


Waiting = Annotated[WaitParams, Query()]
Creating = Annotated[CreateParams, Query()]
Deleting = Annotated[DeleteParams, Query()]
Listing = Annotated[ListParams, Query()]
Following = Annotated[EventParams, Query()]
Reading = Annotated[ConsoleParams, Query()]
Asking = Annotated[CapacityParams, Query()]


class NoParams(_Params):
    """Nothing may be asked for."""


class AgePageParams(_Params):
    limit: Whole = Field(default=100, ge=1, le=1000)
    cursor: Text | None = Field(
        default=None, description="The `next` of the page before.", json_schema_extra={"pattern": AGE_CURSOR_PATTERN}
    )

    def after(self) -> tuple[datetime, UUID] | tuple[None, None]:
        return after_age(self.cursor) if self.cursor is not None else (None, None)


class NamePageParams(_Params):
    limit: Whole = Field(default=100, ge=1, le=1000)
    cursor: Text | None = Field(
        default=None, description="The `next` of the page before.", json_schema_extra={"pattern": NAME_CURSOR_PATTERN}
    )

    def after(self) -> str | None:
        return after_name(self.cursor) if self.cursor is not None else None


Nothing = Annotated[NoParams, Query()]
ByAge = Annotated[AgePageParams, Query()]
ByName = Annotated[NamePageParams, Query()]

#: What may be given more than once.
REPEATED = frozenset(
    name
    for params in (ListParams, CapacityParams)
    for name, field in params.model_fields.items()
    if get_origin(field.annotation) is list
)
