"""The parameters of every address, as models: one that is not known is an error, not a surprise."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from leveret.api.paging import CURSOR_PATTERN, after_cursor
from leveret.api.waits import Target
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.lifecycle import State

BIGINT_MAX = 2**63 - 1

Text = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]


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


class DeleteParams(WaitParams):
    wait: Literal["deleted"] | None = Field(default=None, description="Answer when the VM is gone.")


class ListParams(_Params):
    state: list[State] = Field(
        default=[], max_length=16, description="Only these. Deleted VMs are shown when asked for."
    )
    label: list[Text] = Field(
        default=[], max_length=32, description="Only those with this label: `key=value`. Give it again for more."
    )
    host: Text | None = Field(default=None, description="Only those on this host, by id or name.")
    name: Text | None = Field(default=None, description="Only the one of this name.")
    limit: int = Field(default=100, ge=1, le=1000)
    cursor: Text | None = Field(
        default=None, description="The `next` of the page before.", json_schema_extra={"pattern": CURSOR_PATTERN}
    )

    def labels(self) -> dict[str, str] | None:
        """Raises LeveretError `invalid_request` for what is no `key=value`, or a key with two values."""
        wanted: dict[str, str] = {}
        for label in self.label:
            key, equals, value = label.partition("=")
            if not key or not equals or wanted.setdefault(key, value) != value:
                raise _invalid("label", "give each key once, as key=value")
        return wanted or None

    def after(self) -> UUID | None:
        return after_cursor(self.cursor) if self.cursor is not None else None


class EventParams(_Params):
    after: Annotated[int, Field(ge=0, le=BIGINT_MAX)] | Literal["latest"] = Field(
        default=0, description="Only events with a greater `seq`; `latest` for those that are still to come."
    )
    limit: int = Field(default=100, ge=1, le=1000)
    wait_s: float = Field(default=0.0, ge=0, le=55, description="When there is none, wait this long for one.")


class ConsoleParams(_Params):
    max_bytes: int = Field(default=65536, ge=1, le=1024 * 1024, description="How much of the end of the log to give.")


def _invalid(field: str, message: str) -> LeveretError:
    errors = [{"field": field, "message": message}]
    return fail(Code.INVALID_REQUEST, "The parameters are not valid.", errors=errors)


Waiting = Annotated[WaitParams, Query()]
Creating = Annotated[CreateParams, Query()]
Deleting = Annotated[DeleteParams, Query()]
Listing = Annotated[ListParams, Query()]
Following = Annotated[EventParams, Query()]
Reading = Annotated[ConsoleParams, Query()]
