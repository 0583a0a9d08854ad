"""What Leveret says to a write, and how a caller says which state of things a write is meant for."""

from ipaddress import IPv4Address
from typing import Literal

from pydantic import model_validator

from leveret.shared.documents import RequestView, VmView, revision_of
from leveret.shared.lifecycle import State

WaitOutcome = Literal["reached", "failed", "timed_out"]

#: A VM as it was read, its ETag, or its generation alone: a write is refused when it is not that any more.
IfMatch = VmView | str | int


class Receipt(RequestView):
    """`accepted` is committed. `queued`: the broker has it safe, and the conductor has not answered yet.

    `wait` is set when the API was asked to wait. A verdict over AMQP has no `vm`; what it tells of the VM stands in the
    last four fields, which REST fills too.
    """

    wait: WaitOutcome | None = None
    generation: int | None = None
    state: State | None = None
    name: str | None = None
    address: IPv4Address | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_the_vm(cls, values: dict[str, object]) -> dict[str, object]:
        vm = values.get("vm")
        if not isinstance(vm, dict):
            return values
        return {key: vm.get(key) for key in ("generation", "state", "name", "address")} | values


def tag_of(if_match: IfMatch) -> str:
    """The ETag without its quotes: GENERATION.UPDATED_MICROS, or GENERATION alone."""
    if isinstance(if_match, VmView):
        return revision_of(if_match.generation, if_match.updated_at)
    return str(if_match).strip().removeprefix("W/").strip('"')
