"""From the bus to the agent: what each message to a host does."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog
from pydantic import BaseModel

from leveret.compute.agent import Agent
from leveret.shared.bus import DONE, Delivery, Outcome, Reject
from leveret.shared.bus.publishing import DIRECT_REPLY
from leveret.shared.errors import LeveretError
from leveret.shared.messages import REGISTRY, AskInventory, ConsoleTail, DesiredVm, HostInventory, ListVms, ReadConsole

log = structlog.get_logger()

MESSAGES = {name: REGISTRY[name] for name in ("host.desired", "host.list", "host.console", "host.inventory")}
ANSWERS_WAITING_MAX = 32

#: Sends an answer to (reply_to, correlation_id).
Reply = Callable[[str, str | None, ConsoleTail | HostInventory], Awaitable[None]]


#: Finds out what was asked.
Find = Callable[[], Awaitable[ConsoleTail | HostInventory]]


class Commands:
    """Hands one host's messages to its agent. They are done when they are known: the sweeper repeats what is lost."""

    def __init__(self, agent: Agent, reply: Reply) -> None:
        self._agent = agent
        self._reply = reply
        self._answering: set[asyncio.Task[None]] = set()

    async def handle(self, deliveries: Sequence[Delivery]) -> list[Outcome]:
        return [self._handle_one(delivery) for delivery in deliveries]

    def _handle_one(self, delivery: Delivery) -> Outcome:
        try:
            message = delivery.decoded(among=MESSAGES)
        except LeveretError as error:
            return Reject(error.problem)
        HANDLERS[type(message)](self, message, delivery)
        return DONE

    def _on_desired(self, message: BaseModel, _delivery: Delivery) -> None:
        assert isinstance(message, DesiredVm)
        self._agent.on_command(message)

    def _on_list(self, _message: BaseModel, _delivery: Delivery) -> None:
        self._agent.on_list()

    def _on_console(self, message: BaseModel, delivery: Delivery) -> None:
        assert isinstance(message, ReadConsole)
        self._answer(delivery, partial(self._agent.on_console, message))

    def _on_inventory(self, _message: BaseModel, delivery: Delivery) -> None:
        self._answer(delivery, self._agent.on_inventory)

    def _answer(self, delivery: Delivery, find: Find) -> None:
        """Answer from a task of its own: what is slow to find out holds up no command."""
        reply_to = delivery.reply_to or ""
        if not reply_to.startswith(DIRECT_REPLY) or len(self._answering) >= ANSWERS_WAITING_MAX:
            return
        task = asyncio.create_task(self._find(delivery, reply_to, find))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _find(self, delivery: Delivery, reply_to: str, find: Find) -> None:
        try:
            await self._reply(reply_to, delivery.correlation_id, await find())
        except LeveretError as error:
            log.info("question.not_answered", type=delivery.type, host=self._agent.name, why=str(error))
        except Exception:  # the rim
            log.exception("question.failed", type=delivery.type, host=self._agent.name)


#: The table of contents.
HANDLERS: dict[type[BaseModel], Callable[[Commands, BaseModel, Delivery], None]] = {
    DesiredVm: Commands._on_desired,
    ListVms: Commands._on_list,
    ReadConsole: Commands._on_console,
    AskInventory: Commands._on_inventory,
}
