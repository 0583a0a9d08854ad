"""Settings: read once at the composition root, passed on, never global.

Every setting is an environment variable `LEVERET_<NAME>`; each service's table of them is its `settings.py`.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from leveret.shared.addresses import addresses_in, user_of


class ServiceSettings(BaseSettings):
    """What every service needs."""

    model_config = SettingsConfigDict(env_prefix="LEVERET_", frozen=True, extra="ignore")

    amqp_url: str = Field(
        description="Broker, with user, password and vhost: amqp://user:password@host:5672/leveret. Of a cluster the"
        " addresses of all nodes, comma-separated."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    drain_s: float = Field(default=10.0, ge=0, description="Time to finish what is in flight after SIGTERM.")
    step_timeout_s: float = Field(
        default=60.0, gt=0, description="After which a step that should be quick is taken to hang, and tried again."
    )
    faults: Path | None = Field(default=None, description="For tests: a directory that says what is to go wrong.")
    metrics_port: int = Field(default=0, ge=0, le=65535, description="Port of /metrics on loopback; 0 for none.")

    @property
    def amqp_user(self) -> str:
        """The broker user, which the broker holds every message's `user_id` against."""
        return user_of(addresses_in(self.amqp_url)[0])

    @field_validator("amqp_url")
    @classmethod
    def _is_one_user(cls, value: str) -> str:
        if not addresses_in(value):
            raise ValueError("there is no address in it")
        return value
