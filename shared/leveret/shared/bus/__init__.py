"""The bus: RabbitMQ as Leveret uses it, and nothing more general (there is one broker)."""

from leveret.shared.bus.answering import Answerer
from leveret.shared.bus.asking import Caller
from leveret.shared.bus.consuming import (
    DONE,
    Consumer,
    Delivery,
    Done,
    Handler,
    Outcome,
    Paused,
    Reject,
    Retry,
)
from leveret.shared.bus.link import Furniture, Link
from leveret.shared.bus.publishing import Envelope, Publisher, Refused, Unroutable

__all__ = [
    "DONE",
    "Answerer",
    "Caller",
    "Consumer",
    "Delivery",
    "Done",
    "Envelope",
    "Furniture",
    "Handler",
    "Link",
    "Outcome",
    "Paused",
    "Publisher",
    "Refused",
    "Reject",
    "Retry",
    "Unroutable",
]
