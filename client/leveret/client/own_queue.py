"""A queue of a client's own: the only thing at the broker that a client may make."""

from collections.abc import Callable
from typing import Any

import aiormq
import aiormq.exceptions

from leveret.client.errors import ApiError, refusal
from leveret.shared import topology

#: A watcher's queue keeps what comes while nobody watches: so many events, for so long after the last watcher left.
KEPT_EVENTS = 100_000
KEPT_MS = 7 * 24 * 3600 * 1000
#: A queue that only serves a running program outlives its connection just long enough to be found again.
BRIEF_MS = 60_000


_CLASSIC = {"x-queue-type": "classic", "x-max-length": KEPT_EVENTS, "x-overflow": "drop-head"}


def kept() -> dict[str, Any]:
    """Arguments of a queue that keeps events while nobody watches; when it is full the oldest go, and a gap tells.

    Classic: a quorum queue counts every lost connection against its messages, and in the end drops them.
    """
    return {**_CLASSIC, "x-expires": KEPT_MS}


def brief() -> dict[str, Any]:
    """Arguments of a queue that ends soon after its program."""
    return {**_CLASSIC, "x-expires": BRIEF_MS}


class OwnQueue:
    """Declares `client.<user>.<name>` and binds it to a project's events, each time its link comes up.

    Nothing else is declared: the exchange is Leveret's. `on_refusal` hears what will not get better by itself.
    """

    def __init__(
        self,
        user: str,
        name: str,
        project: str,
        key: str,
        arguments: dict[str, Any],
        *,
        on_refusal: Callable[[ApiError], None],
    ) -> None:
        exchange = topology.events_exchange(project)
        self.queue = topology.Queue(f"client.{user}.{name}", "events", arguments, ((exchange, key),))
        self._on_refusal = on_refusal

    async def attach(self, connection: Any) -> None:
        channel = await (await connection.channel(publisher_confirms=False)).get_underlay_channel()
        try:
            await channel.queue_declare(self.queue.name, durable=True, arguments=self.queue.arguments)
            for exchange, key in self.queue.bindings:
                await channel.queue_bind(self.queue.name, exchange.name, routing_key=key)
        except aiormq.exceptions.ChannelAccessRefused as error:
            message = f"The broker does not let this user have {self.queue.name}, or not of this project: {error}"
            self._on_refusal(refusal("forbidden", message))
            raise
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            message = f"There is a queue {self.queue.name} of another kind: {error}"
            self._on_refusal(refusal("state_conflict", message, hint="Delete that queue, or take another name."))
            raise
        await channel.close()

    def detach(self) -> None:
        """Nothing to forget."""
