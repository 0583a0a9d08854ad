"""The API process: everything it is made of is put together here, and nothing is opened before it starts."""

import argparse
import math
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from importlib import metadata
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server
from pydantic import ValidationError

from leveret.api import openapi, problems, routes
from leveret.api.auth import Tokens
from leveret.api.database import Database
from leveret.api.eventlog import EventLog
from leveret.api.feed import EventFeed
from leveret.api.last_use import LastUse
from leveret.api.metrics import Metrics
from leveret.api.requests import Requests
from leveret.api.rim import Rim
from leveret.api.service import Service
from leveret.api.settings import ApiSettings
from leveret.api.streams import Streams
from leveret.api.waits import Waits
from leveret.shared import fault_points, logs
from leveret.shared.bus import Caller, Furniture, Link
from leveret.shared.messages import explain

log = structlog.get_logger()

KEEP_ALIVE_S = 30
EXIT_USAGE = 2


def build(settings: ApiSettings) -> FastAPI:
    """The application. It starts, and stays up, without broker and database: /readyz says what is missing."""
    service = compose(settings)
    app = FastAPI(
        title="Leveret",
        version=service.version,
        lifespan=_lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    routes.install(app)
    problems.install(app)
    app.add_middleware(Rim, api=app, metrics=service.metrics, max_in_flight=settings.max_in_flight)

    @cache
    def description() -> dict[str, Any]:
        return openapi.describe(app, version=service.version, docs_url=settings.docs_url)

    app.openapi = description  # type: ignore[method-assign]
    return app


def compose(settings: ApiSettings) -> Service:
    """Every part, connected to nothing yet."""
    version = metadata.version("leveret")
    metrics = Metrics(version)
    database = Database(settings.database_url, connections_max=settings.db_pool_max)
    feed = EventFeed(database)
    link = Link(settings.amqp_url, "leveret-api")
    event_log = EventLog(database)
    caller = Caller(settings.amqp_user)
    last_use = LastUse(caller.publisher, link)
    link.add(Furniture())
    link.add(caller)
    return Service(
        settings=settings,
        version=version,
        metrics=metrics,
        link=link,
        caller=caller,
        database=database,
        feed=feed,
        log=event_log,
        streams=Streams(event_log, feed, heartbeat_s=settings.heartbeat_s, most=settings.streams_max),
        tokens=Tokens(database, on_use=last_use.note),
        last_use=last_use,
        requests=Requests(caller, link, metrics, verdict_wait_s=settings.verdict_wait_s),
        waits=Waits(database, feed),
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    await service.database.open()
    service.link.start()
    service.feed.start()
    service.last_use.start()
    log.info("api.started", version=service.version)
    yield
    await service.last_use.stop()
    await service.feed.stop()
    await service.link.stop()
    await service.database.close()
    log.info("api.stopped")


class _Server(uvicorn.Server):
    """Ends waits and long polls before it waits for the requests under way, so that they do not hold it up."""

    def __init__(self, config: uvicorn.Config, feed: EventFeed) -> None:
        super().__init__(config)
        self._feed = feed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("api.stopping", requests=len(self.server_state.tasks))
        self._feed.close()
        await super().shutdown(sockets)


def serve(settings: ApiSettings) -> None:
    """Run until SIGTERM or SIGINT; then finish what is under way within `drain_s`, and return."""
    app = build(settings)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        host=settings.listen_host,
        port=settings.listen_port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
    )
    if settings.metrics_port:
        start_http_server(settings.metrics_port, "127.0.0.1", service.metrics.registry)
    # The server raises the signal again when it has stopped: having stopped as asked is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    _Server(config, service.feed).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `leveret-api`."""
    parser = argparse.ArgumentParser(
        prog="leveret-api",
        description="Leveret's REST API.",
        epilog="Settings are environment variables: "
        + ", ".join(f"LEVERET_{name.upper()}" for name in ApiSettings.model_fields),
    )
    parser.add_argument("--version", action="version", version=f"leveret-api {metadata.version('leveret')}")
    parser.parse_args(arguments)
    try:
        settings = ApiSettings()
    except ValidationError as error:
        for fault in explain(error):
            parser.error(f"LEVERET_{fault['field'].upper()}: {fault['message']}")
        return EXIT_USAGE
    logs.configure("api", level=settings.log_level, style=settings.log_format)
    fault_points.arm(settings.faults)
    serve(settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
