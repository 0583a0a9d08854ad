"""From the bus to the agent: what each message to a host does."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog
from pydantic import BaseModel

from leveret.compute.agent import Agent
from leveret.shared.bus import DONE, Delivery, Outcome, Reject
from leveret.shared.bus.publishing import DIRECT_REPLY
from leveret.shared.errors import LeveretError
from leveret.shared.messages import REGISTRY, ConsoleTail, DesiredVm, ListVms, ReadConsole

log = structlog.get_logger()

MESSAGES = {name: REGISTRY[name] for name in ("host.desired", "host.list", "host.console")}
CONSOLES_WAITING_MAX = 32

#: Sends an answer to (reply_to, correlation_id).
Reply = Callable[[str, str | None, ConsoleTail], Awaitable[None]]


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
        """Answer from a task of its own: a console that is slow to read holds up no command."""
        assert isinstance(message, ReadConsole)
        reply_to = delivery.reply_to or ""
        if not reply_to.startswith(DIRECT_REPLY) or len(self._answering) >= CONSOLES_WAITING_MAX:
            return
        task = asyncio.create_task(self._answer(message, reply_to, delivery.correlation_id))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, ask: ReadConsole, reply_to: str, correlation_id: str | None) -> None:
        try:
            await self._reply(reply_to, correlation_id, await self._agent.on_console(ask))
        except LeveretError as error:
            log.info("console.not_answered", vm_id=str(ask.vm_id), why=str(error))
        except Exception:  # the rim
            log.exception("console.failed", vm_id=str(ask.vm_id))


#: The table of contents.
HANDLERS: dict[type[BaseModel], Callable[[Commands, BaseModel, Delivery], None]] = {
    DesiredVm: Commands._on_desired,
    ListVms: Commands._on_list,
    ReadConsole: Commands._on_console,
}
