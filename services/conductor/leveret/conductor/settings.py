"""The conductor's settings."""

from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from leveret.shared.settings import ServiceSettings


class ConductorSettings(ServiceSettings):
    """What a conductor needs to know. Several may run with the same settings: none of them leads."""

    database_url: str = Field(description="Postgres, as a role that is a member of leveret_conductor.")
    db_pool_max: int = Field(default=8, ge=3, le=100)
    gateway_users: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("leveret-api",), description="Broker users, comma-separated, whose `project` header is believed."
    )
    batch_max: int = Field(default=200, ge=1, le=1000, description="Messages in one transaction.")
    request_batch_max: int = Field(
        default=64, ge=1, le=1000, description="Requests in one transaction. Twice as many, of 2 MiB each, may be held."
    )
    sweep_s: float = Field(default=1.0, gt=0, description="How often the sweeper looks.")
    resend_s: float = Field(default=10.0, gt=0, description="How often a command is repeated until it is done.")
    #: Longer than the broker takes to see that another conductor hangs and to give others what that one had in hand.
    lease_s: float = Field(default=30.0, gt=0, description="Silence after which a host gets no new VMs.")
    build_timeout_s: float = Field(default=200.0, gt=0, description="From accepted to running, over all hosts tried.")
    capacity_timeout_s: float = Field(
        default=3600.0, gt=0, description="How long a VM that is to wait for room does so."
    )
    change_timeout_s: float = Field(
        default=120.0, gt=0, description="For a start or reboot, and a stop beyond its grace."
    )
    delete_timeout_s: float = Field(default=60.0, gt=0, description="After which a delete that goes on says why.")
    max_attempts: int = Field(default=3, ge=1, le=10, description="Hosts on which a build is tried.")
    cordon_after_failures: int = Field(default=5, ge=1, description="Failed builds in a row that cordon a host.")
    check_s: float = Field(default=60.0, gt=0, description="How often the rows and the broker are checked.")
    check_hosts_s: float = Field(
        default=300.0, gt=0, description="How often the event log and what hosts have are checked."
    )
    check_confirm_s: float = Field(
        default=5.0, ge=0, le=6, description="After which the checker looks again at what seems to be wrong."
    )
    keep_deleted_days: int = Field(default=30, ge=1, description="How long deleted VMs and their events can be read.")

    @field_validator("gateway_users", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
