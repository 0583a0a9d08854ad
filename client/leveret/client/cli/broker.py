"""The broker's side of an AMQP client: its account there, with the rights that it needs and no others."""

import os
from typing import TYPE_CHECKING, Protocol

import typer

from leveret.client.cli.session import config
from leveret.client.config import config_path, read_contexts, state_dir_at
from leveret.client.errors import ConfigError

if TYPE_CHECKING:
    from leveret.stack.broker_admin import BrokerAdmin
    from leveret.stack.client_permissions import Role
    from leveret.stack.rabbitmq import Rabbit


class Keeper(Protocol):
    """Looks after the accounts of one broker."""

    def create(self, user: str, project: str, role: "Role", *, rotate: bool) -> str | None:
        """Make or change an account; its AMQP URL when it has a new password. Raises StackError."""

    def delete(self, user: str) -> None:
        """Unknown users are fine. Raises StackError."""


def keeper(ctx: typer.Context, admin_url: str | None) -> Keeper:
    """By the management API at this URL, else the broker that `leveret up` started for the API that is asked.

    Raises ConfigError when there is neither: before anything is recorded.
    """
    settings = config(ctx)
    # Url and token from the environment may be the local installation's: then its broker is the one that is meant.
    state_dir = settings.state_dir or state_dir_at(read_contexts(config_path(os.environ)), settings.url)
    if not admin_url and state_dir is None:
        raise ConfigError(
            "which broker? The API was not started by `leveret up` on this machine: give --broker-admin-url "
            "http://ADMIN:PASSWORD@HOST:15672/VHOST, or set LEVERET_BROKER_ADMIN_URL."
        )
    try:
        from leveret.stack.broker_admin import BrokerAdmin
        from leveret.stack.layout import Layout
        from leveret.stack.rabbitmq import Rabbit
    except ImportError as error:
        raise ConfigError(
            f"this installation has the client only ({error.name} is missing): pip install 'leveret[stack]'"
        ) from error
    if admin_url:
        return _Elsewhere(BrokerAdmin(admin_url))
    return _Private(Rabbit(Layout(state_dir).rabbitmq))


class _Private:
    """The broker that `leveret up` started."""

    def __init__(self, rabbit: "Rabbit") -> None:
        self._rabbit = rabbit

    def create(self, user: str, project: str, role: "Role", *, rotate: bool) -> str | None:
        before = self._url(user)
        after = self._rabbit.create_client(user, project, role, rotate=rotate)
        return None if after == before else after

    def delete(self, user: str) -> None:
        self._rabbit.delete_client(user)

    def _url(self, user: str) -> str | None:
        from leveret.stack.errors import StackError

        try:
            return self._rabbit.url_of(user)
        except StackError:
            return None  # it was never made here


class _Elsewhere:
    """A broker that somebody else runs, by its management API."""

    def __init__(self, admin: "BrokerAdmin") -> None:
        self._admin = admin

    def create(self, user: str, project: str, role: "Role", *, rotate: bool) -> str | None:
        with self._admin as admin:
            return admin.add_client(user, project, role, rotate=rotate)

    def delete(self, user: str) -> None:
        with self._admin as admin:
            admin.remove_client(user)
