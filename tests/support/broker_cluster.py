"""Three brokers that are one: a private RabbitMQ cluster on loopback."""

import asyncio
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leveret.stack.account import Account
from leveret.stack.ports import free_port
from leveret.stack.process import Daemon
from leveret.stack.rabbitmq import Membership, Rabbit, start_epmd

NODES = ("hare", "coney", "leveret")
READY_S = 180.0


class BrokerCluster:
    """Its nodes are told to stop, freeze and come back one by one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._epmd = Daemon("epmd", directory)
        self._epmd_port = free_port()
        cookie, password = secrets.token_hex(16), secrets.token_urlsafe(24)
        self.nodes = {
            node: Rabbit(
                directory / node,
                membership=Membership(node, NODES, cookie, password, self._epmd_port),
            )
            for node in NODES
        }

    def create_user(self, name: str, configure: str, write: str, read: str) -> None:
        password = secrets.token_urlsafe(24)
        for node in self.nodes.values():
            node.create_user(name, password, configure=configure, write=write, read=read)

    def start(self) -> None:
        """The first begins the cluster, the others join it."""
        account = Account.for_service("rabbitmq")
        self._directory.mkdir(exist_ok=True)
        self._directory.chmod(0o755)
        start_epmd(self._epmd, account, self._epmd_port)
        first, *others = self.nodes.values()
        first.start()
        first.wait_ready(READY_S)
        for node in others:
            node.start()
        for node in others:
            node.wait_ready(READY_S)

    def destroy(self) -> None:
        for node in self.nodes.values():
            node.destroy()
        self._epmd.kill()

    def urls_of(self, user: str) -> str:
        """The addresses of all nodes."""
        return ",".join(node.url_of(user) for node in self.nodes.values())

    def freeze(self, node: str) -> None:
        self._signal(node, signal.SIGSTOP)

    def thaw(self, node: str) -> None:
        self._signal(node, signal.SIGCONT)

    def _signal(self, node: str, number: signal.Signals) -> None:
        process = self.nodes[node]._broker.process()
        assert process is not None
        process.send_signal(number)

    async def is_whole(self) -> bool:
        """Whether every node runs and sees all the others."""
        for node in self.nodes.values():
            answer = await asyncio.to_thread(node.ctl, "eval", "length(rabbit_nodes:all_running()).")
            if answer.strip() != str(len(NODES)):
                return False
        return True

    def leader_of(self, queue: str) -> str:
        """The node that leads a quorum queue now."""
        node = next(node for node in self.nodes.values() if node.is_running())
        table = node.ctl("list_queues", "-p", "leveret", "name", "leader")
        leaders = dict(line.split("\t") for line in table.splitlines() if "\t" in line)
        return leaders[queue].partition("@")[0]


@contextmanager
def clustered(directory: Path) -> Iterator[BrokerCluster]:
    cluster = BrokerCluster(directory)
    try:
        yield cluster
    finally:
        cluster.destroy()
