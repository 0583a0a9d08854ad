"""The API's settings: every one is an environment variable `LEVERET_<NAME>`."""

from pydantic import Field

from leveret.shared.settings import ServiceSettings


class ApiSettings(ServiceSettings):
    """What the API needs beside the broker."""

    database_url: str = Field(repr=False, description="Postgres, as a user that may only read: postgresql://...")
    listen_host: str = Field(default="127.0.0.1", description="Address to listen on.")
    listen_port: int = Field(default=8420, ge=0, le=65535, description="Port to listen on.")
    verdict_wait_s: float = Field(default=1.0, ge=0, le=10, description="How long a write waits for its verdict.")
    db_pool_max: int = Field(
        default=8, ge=1, le=100, description="Connections to Postgres, beside the one that listens."
    )
    max_in_flight: int = Field(
        default=5000, ge=1, description="Requests at once, waiting ones included; more are answered with 503."
    )
    heartbeat_s: float = Field(
        default=15.0, gt=0, le=300, description="A stream of events that has nothing to tell says so this often."
    )
    streams_max: int = Field(
        default=1000, ge=1, description="Streams of events that a project may have at once; more are answered with 429."
    )
    docs_url: str = Field(
        default="/docs/errors", description="The page that explains every error code: the `type` of a problem."
    )
