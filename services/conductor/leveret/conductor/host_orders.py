"""What administrators ask of hosts. An order changes one row; what follows for VMs, the sweeper does (law 5)."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from leveret.conductor.database import Connection
from leveret.conductor.order import Order
from leveret.conductor.rows import Fact
from leveret.shared.errors import Code, LeveretError, fail
from leveret.shared.messages import Cordon, Fence, Retire, Uncordon

#: Who was heard of so lately is not off: that is the wrong host, or one that still has to be switched off.
HEARD_LATELY_S = 10.0


@dataclass(frozen=True, slots=True)
class _Host:
    """A host that is locked now. `heard_s` ago it was heard of; `vms` are placed on it.

    `is_back` when a later incarnation of its worker was heard than the one that was declared off.
    """

    id: UUID
    name: str
    state: str
    heard_s: float
    vms: int
    is_clean: bool
    is_back: bool

    @property
    def is_heard(self) -> bool:
        return self.heard_s < HEARD_LATELY_S


async def cordon(connection: Connection, order: Order, body: Cordon) -> list[Fact]:
    host = await _lock(connection, body.host_id)
    if host.state not in {"up", "silent", "cordoned"}:
        raise _conflict(host, "it cannot be cordoned")
    if host.state == "cordoned":
        return []
    await _set(connection, host, "cordoned", body.reason)
    return [_fact(order, host, "host.cordoned", reason=body.reason)]


async def uncordon(connection: Connection, order: Order, body: Uncordon) -> list[Fact]:
    host = await _lock(connection, body.host_id)
    if host.state in {"up", "silent"}:
        return []
    if host.state == "retired":
        raise _conflict(host, "it does not come back", hint="Remove its id file, and it joins as a new host.")
    if host.state == "fenced" and not host.is_clean:
        raise fail(
            Code.HOST_CONFLICT,
            f"Host {host.name} is fenced, and has not yet shown that nothing is left on it of what is over.",
            hint="Start it and its worker; it is cleaned up by itself, which takes some seconds. Then ask again.",
        )
    await _set(connection, host, *(("up", None) if host.is_heard else ("silent", "not heard of since it was cordoned")))
    return [_fact(order, host, "host.uncordoned")]


async def fence(connection: Connection, order: Order, body: Fence) -> list[Fact]:
    host = await _lock(connection, body.host_id)
    if host.state == "fenced" and not host.is_back:
        return []
    if host.state == "retired":
        raise _conflict(host, "it need not be fenced any more")
    if host.state != "silent" and host.is_heard:
        raise fail(
            Code.HOST_CONFLICT,
            f"Host {host.name} was heard of {max(host.heard_s, 0.0):.1f} s ago: it is not off.",
            hint="Make sure that this is the host you mean. Switch it off, and ask again some seconds later.",
        )
    await _set(connection, host, "fenced", body.proof)
    return [_fact(order, host, "host.fenced", proof=body.proof)]


async def retire(connection: Connection, order: Order, body: Retire) -> list[Fact]:
    host = await _lock(connection, body.host_id)
    if host.state == "retired":
        return []
    if host.vms and host.state != "fenced":
        raise _conflict(
            host, f"it has {host.vms} VMs", hint="Delete them first; or, if the host is off for good, fence it."
        )
    await _set(connection, host, "retired", None)
    return [_fact(order, host, "host.retired")]


async def _lock(connection: Connection, host_id: UUID) -> _Host:
    row = await connection.fetchrow(
        """SELECT id, name, state, extract(epoch FROM clock_timestamp() - heartbeat_at)::float8 AS heard_s,
                  (SELECT count(*) FROM vms WHERE host_id = h.id) AS vms,
                  clean_epoch IS NOT DISTINCT FROM epoch AS is_clean,
                  epoch > coalesce(fenced_epoch, epoch) AS is_back
        FROM hosts h WHERE id = $1 FOR NO KEY UPDATE""",
        host_id,
    )
    if row is None:
        raise fail(Code.HOST_NOT_FOUND, f"There is no host {host_id}.")
    return _Host(**row)


async def _set(connection: Connection, host: _Host, state: str, reason: str | None) -> None:
    """Another state, and nothing known any more of what the earlier one was about."""
    await connection.execute(
        """UPDATE hosts SET state = $2, state_reason = $3, failures = 0, clean_epoch = NULL,
                         fenced_epoch = CASE WHEN $2 IN ('fenced', 'retired') THEN epoch END
        WHERE id = $1""",
        host.id,
        state,
        reason,
    )


def _conflict(host: _Host, why: str, hint: str | None = None) -> LeveretError:
    return fail(Code.HOST_CONFLICT, f"Host {host.name} is {host.state}: {why}.", hint=hint)


def _fact(order: Order, host: _Host, kind: str, **data: Any) -> Fact:
    return order.fact(kind, host=host.name, host_id=str(host.id), **data)
