"""What one API process is made of. Handlers get it from `request.app.state.service`."""

from dataclasses import dataclass

from fastapi import Request

from leveret.api.auth import Tokens
from leveret.api.database import Database
from leveret.api.eventlog import EventLog
from leveret.api.feed import EventFeed
from leveret.api.last_use import LastUse
from leveret.api.metrics import Metrics
from leveret.api.requests import Requests
from leveret.api.settings import ApiSettings
from leveret.api.streams import Streams
from leveret.api.waits import Waits
from leveret.shared.bus import Caller, Link


@dataclass(frozen=True, slots=True)
class Service:
    settings: ApiSettings
    version: str
    metrics: Metrics
    link: Link
    caller: Caller
    database: Database
    feed: EventFeed
    log: EventLog
    streams: Streams
    tokens: Tokens
    last_use: LastUse
    requests: Requests
    waits: Waits


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
