"""Settings: read once at the composition root, passed on, never global.

Every setting is an environment variable `LEVERET_<NAME>`; each service's table of them is its `settings.py`.
"""

from typing import Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """What every service needs."""

    model_config = SettingsConfigDict(env_prefix="LEVERET_", frozen=True, extra="ignore")

    amqp_url: str = Field(description="Broker, with user, password and vhost: amqp://user:password@host:5672/leveret")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    drain_s: float = Field(default=10.0, ge=0, description="Time to finish what is in flight after SIGTERM.")
    metrics_port: int = Field(default=0, ge=0, le=65535, description="Port of /metrics on loopback; 0 for none.")

    @property
    def amqp_user(self) -> str:
        """The broker user, which the broker holds every message's `user_id` against."""
        return unquote(urlsplit(self.amqp_url).username or "guest")
