"""The parameters of every address, as models: one that is not known is an error, not a surprise."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from leveret.api import selectors
from leveret.api.paging import CURSOR_PATTERN, NAME_CURSOR_PATTERN, after_cursor, after_name
from leveret.api.waits import Target
from leveret.shared.lifecycle import State

BIGINT_MAX = 2**63 - 1

Text = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]
Selector = Annotated[
    str, Field(max_length=2048, pattern=r"^[^\x00]*$", json_schema_extra={"pattern": selectors.PATTERN})
]


class _Params(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WaitParams(_Params):
    """Waiting for a VM. `ready` is running, and the guest said that it is up."""

    wait: Target | None = Field(default=None, description="Answer when the VM is there, or cannot get there.")
    timeout_s: float = Field(default=30.0, ge=0, le=3600, description="Answer after this time whatever was reached.")


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
        max_length=32,
        description=f"Only those with such labels: {selectors.FORMS}. Of several, given again or after commas, "
        "all must be met.",
    )
    host: Text | None = Field(default=None, description="Only those on this host, by id or name.")
    name: Text | None = Field(default=None, description="Only the one of this name.")
    limit: int = Field(default=100, ge=1, le=100_000, description="The answer is streamed, so it may be a long one.")
    cursor: Text | None = Field(
        default=None, description="The `next` of the page before.", json_schema_extra={"pattern": CURSOR_PATTERN}
    )

    def labels(self) -> list[dict[str, object]] | None:
        """Requirements as the list query reads them. Raises LeveretError `invalid_request`."""
        return [requirement.row() for requirement in selectors.parse(self.label)] or None

    def after(self) -> UUID | None:
        return after_cursor(self.cursor) if self.cursor is not None else None


class EventParams(_Params):
    after: Annotated[int, Field(ge=0, le=BIGINT_MAX)] | Literal["latest"] = Field(
        default=0, description="Only events with a greater `seq`; `latest` for those that are still to come."
    )
    limit: int = Field(default=100, ge=1, le=1000, description="Events in one page; a stream has no end.")
    wait_s: float = Field(
        default=0.0, ge=0, le=55, description="When there is none, wait this long for one; a stream always waits."
    )


class ConsoleParams(_Params):
    max_bytes: int = Field(default=65536, ge=1, le=1024 * 1024, description="How much of the end of the log to give.")


Waiting = Annotated[WaitParams, Query()]
Creating = Annotated[CreateParams, Query()]
Deleting = Annotated[DeleteParams, Query()]
Listing = Annotated[ListParams, Query()]
Following = Annotated[EventParams, Query()]
Reading = Annotated[ConsoleParams, Query()]


class NoParams(_Params):
    """Nothing may be asked for."""


class IdPageParams(_Params):
    limit: int = Field(default=100, ge=1, le=1000)
    cursor: Text | None = Field(
        default=None, description="The `next` of the page before.", json_schema_extra={"pattern": CURSOR_PATTERN}
    )

    def after(self) -> UUID | None:
        return after_cursor(self.cursor) if self.cursor is not None else None


class NamePageParams(_Params):
    limit: int = Field(default=100, ge=1, le=1000)
    cursor: Text | None = Field(
        default=None, description="The `next` of the page before.", json_schema_extra={"pattern": NAME_CURSOR_PATTERN}
    )

    def after(self) -> str | None:
        return after_name(self.cursor) if self.cursor is not None else None


Nothing = Annotated[NoParams, Query()]
ById = Annotated[IdPageParams, Query()]
ByName = Annotated[NamePageParams, Query()]
