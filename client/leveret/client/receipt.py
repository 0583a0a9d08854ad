"""What Leveret says to a write, and how a caller says which state of things a write is meant for."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address
from typing import Literal
from uuid import UUID

from pydantic import ConfigDict, PrivateAttr, model_validator

from leveret.client.errors import ClientError, Unavailable, Unreachable, WaitTimedOut
from leveret.shared.documents import Document, RequestView, VmView, revision_of
from leveret.shared.headers import SILENT_MARK, is_if_match
from leveret.shared.ids import ids_of
from leveret.shared.lifecycle import State

WaitOutcome = Literal["reached", "failed", "timed_out"]

#: A VM as it was read, its ETag, or its generation alone: a write is refused when it is not that any more. `*`: it is
#: enough that the VM is there.
IfMatch = VmView | str | int
#: The if_match that any VM meets.
ANY = "*"

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 3.0


class MadeVm(Document):
    """One of the VMs that a request for several made, as it was right after."""

    model_config = ConfigDict(extra="ignore")

    id: UUID
    name: str
    state: State
    address: IPv4Address | None = None


class Receipt(RequestView):
    """`accepted` is committed. `queued`: the broker has it safe, and the conductor has not answered yet.

    Give it to `wait`: that waits for what this very request asked for. `wait` is set when the API was asked to wait. A
    verdict over AMQP has no `vm`; what it tells of the VM stands in the next four fields, which REST fills too. One for
    several VMs (`count`) has `made` instead: each of them, in order.
    """

    wait: WaitOutcome | None = None
    generation: int | None = None
    state: State | None = None
    name: str | None = None
    address: IPv4Address | None = None
    count: int = 1
    made: tuple[MadeVm, ...] = ()
    _ask_again: "Callable[[], Awaitable[Receipt]] | None" = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_the_vm(cls, values: dict[str, object]) -> dict[str, object]:
        if values.get("vms") and not values.get("made"):
            values = {**values, "made": values["vms"]}
        vm = values.get("vm")
        if not isinstance(vm, dict):
            return values
        return {key: vm.get(key) for key in ("generation", "state", "name", "address")} | values

    @property
    def vm_ids(self) -> tuple[UUID, ...]:
        """The VMs that the request is about: known before there is a verdict."""
        return ids_of(self.vm_id, self.count)

    def asked_again_by(self, ask: "Callable[[], Awaitable[Receipt]]") -> "Receipt":
        """The same receipt, which knows how to ask: with the same ids, so that it is carried out once."""
        if self.verdict == "queued":
            self._ask_again = ask
        return self

    async def judged(self) -> "Receipt":
        """This receipt, or while it is queued the one of the same request asked again until there is a verdict.

        It ends in no other way: put a time limit on it. Raises the refusal.
        """
        receipt, pause_s = self, _FIRST_PAUSE_S
        while receipt.verdict == "queued":
            if self._ask_again is None:
                raise ClientError("this receipt does not know its request: repeat the request under its request_id")
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            try:
                receipt = await self._ask_again()
            except (Unavailable, Unreachable) as error:
                # What is queued outlasts an API or a broker that is away.
                await asyncio.sleep((error.retry_after_s or 0.0) if isinstance(error, Unavailable) else 0.0)
        if receipt.verdict == "would_be_accepted":
            raise ValueError("a dry run asks for nothing: there is nothing to wait for")
        return receipt


def tag_of(if_match: IfMatch) -> str:
    """The ETag without its quotes: GENERATION.UPDATED_MICROS, GENERATION alone, or `*`. Raises ValueError."""
    if isinstance(if_match, VmView):
        return revision_of(if_match.generation, if_match.updated_at)
    tag = str(if_match).strip().removeprefix("W/").strip('"').removesuffix(SILENT_MARK)
    if tag != ANY and not is_if_match(tag):
        raise ValueError("if_match is a VM as it was read, its ETag, its generation, or *")
    return tag


def one_of(vm: UUID | Receipt) -> UUID:
    """The VM that is meant. Raises ValueError for a receipt of several."""
    if not isinstance(vm, Receipt):
        return vm
    if vm.count > 1:
        raise ValueError("this receipt is for several VMs: give it to `wait_all`")
    return vm.vm_id


async def all_of(vms: Sequence[UUID] | Receipt, target: str, timeout_s: float) -> Sequence[UUID]:
    """The VMs that are meant, once a request for them is judged. Raises its refusal, or WaitTimedOut."""
    if not isinstance(vms, Receipt):
        return vms
    try:
        async with asyncio.timeout(timeout_s):
            return (await vms.judged()).vm_ids
    except TimeoutError:
        raise WaitTimedOut(None, target, timeout_s) from None
