"""Every exchange, queue and key, with their arguments: the one place that names them.

Law 2 decides the kinds. What a client or a host says must survive a broker's restart: quorum queues. What the
conductor says to a host is repeated until it is done, so its queue need not live longer than the connection that
consumes it. There is nothing between these two: a durable classic queue cannot be had, nor made anew, while the node
of a cluster that holds it is down.
"""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import aio_pika
from aio_pika.abc import AbstractChannel


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    kind: aio_pika.ExchangeType


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue, and in one word what its messages are.

    An exclusive one belongs to the connection that declares it, and goes with it.
    """

    name: str
    carries: str
    arguments: dict[str, Any] = field(default_factory=dict)
    bindings: tuple[tuple[Exchange, str], ...] = ()
    exclusive: bool = False


REQUESTS = Exchange("leveret.requests", aio_pika.ExchangeType.TOPIC)
HOSTS = Exchange("leveret.hosts", aio_pika.ExchangeType.DIRECT)
REPORTS = Exchange("leveret.reports", aio_pika.ExchangeType.DIRECT)
HEARTBEATS = Exchange("leveret.heartbeats", aio_pika.ExchangeType.DIRECT)
DEAD = Exchange("leveret.dead", aio_pika.ExchangeType.FANOUT)

#: Redeliveries after which a message counts as one that kills its consumer: the next consumer buries it unread. Every
#: lost connection counts as one for all that was prefetched, so it is generous: what merely crashes a handler is found
#: out after three attempts.
REDELIVERIES_MAX = 900

#: Without a dead-letter exchange, since the broker's own dead-lettering cannot be trusted with what strangers send: on
#: RabbitMQ 3.10 one expired message with a malformed `x-death` header stops it for the queue, for good. What is to be
#: kept, a consumer buries. The broker's limit (20 in 4.x unless it is set) only stands behind `REDELIVERIES_MAX`.
_QUORUM: dict[str, Any] = {
    "x-queue-type": "quorum",
    "x-delivery-limit": REDELIVERIES_MAX + 100,
    "x-overflow": "reject-publish",
    "x-max-length": 200_000,
    "x-max-length-bytes": 1024 * 1024 * 1024,
}

REQUESTS_QUEUE = Queue("leveret.conductor.requests", "requests", _QUORUM, ((REQUESTS, "#"),))
REPORTS_QUEUE = Queue("leveret.conductor.reports", "reports", _QUORUM, ((REPORTS, "report"),))
HEARTBEATS_QUEUE = Queue(
    "leveret.conductor.beats",
    "heartbeats",
    {"x-queue-type": "quorum", "x-message-ttl": 15_000, "x-max-length": 10_000, "x-overflow": "drop-head"},
    ((HEARTBEATS, "heartbeat"),),
)
#: The newest are kept. What a consumer buries is cut to a few KiB; this bound holds whatever anybody sends.
DEAD_QUEUE = Queue(
    "leveret.dead",
    "letters",
    {"x-queue-type": "quorum", "x-max-length": 100_000, "x-max-length-bytes": 256 * 1024 * 1024},
    ((DEAD, ""),),
)


def host_queue(host_id: UUID) -> Queue:
    """A host's own queue, which nobody else can consume. The sweeper repeats what is lost with it."""
    return Queue(
        f"leveret.host.{host_id}.commands",
        "commands",
        {"x-max-length": 10_000, "x-overflow": "drop-head"},
        ((HOSTS, str(host_id)),),
        exclusive=True,
    )


def events_exchange(project: str) -> Exchange:
    """Where a project's events are published, with key `vm.<id>.<state>`."""
    return Exchange(f"leveret.events.{project}", aio_pika.ExchangeType.TOPIC)


#: What conductors and the API need to exist; a host adds its own queue.
CORE_EXCHANGES = (REQUESTS, HOSTS, REPORTS, HEARTBEATS, DEAD)
CORE_QUEUES = (REQUESTS_QUEUE, REPORTS_QUEUE, HEARTBEATS_QUEUE, DEAD_QUEUE)


async def declare(channel: AbstractChannel, *, queues: tuple[Queue, ...] = CORE_QUEUES) -> None:
    """Declare every exchange and these queues with their bindings. Declaring again changes nothing."""
    for exchange in CORE_EXCHANGES:
        await channel.declare_exchange(exchange.name, exchange.kind, durable=True)
    for queue in queues:
        declared = await channel.declare_queue(
            queue.name, durable=not queue.exclusive, exclusive=queue.exclusive, arguments=queue.arguments
        )
        for exchange, key in queue.bindings:
            await declared.bind(exchange.name, key)
