"""The API's metrics, one table. Labels are few and closed: never ids."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """One set for each application, so that several may live in one process (as they do in tests)."""

    def __init__(self, version: str) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "leveret_api_requests",
            "Requests by route, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "leveret_api_request_seconds",
            "Time until the answer begins, asked-for waiting included.",
            ("route", "method"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "leveret_api_requests_in_flight", "Requests that are not answered yet.", registry=registry
        )
        self.publishes = Counter(
            "leveret_api_publishes",
            "Requests given to the broker: accepted, rejected, queued (no verdict in time) or unavailable.",
            ("type", "outcome"),
            registry=registry,
        )
        self.publish_seconds = Histogram(
            "leveret_api_verdict_seconds",
            "From publishing to the verdict, or to giving up.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.watches = Gauge("leveret_api_watches", "Waits, long polls and streams under way.", registry=registry)
        self.streams = Gauge("leveret_api_streams", "Streams of events under way.", registry=registry)
        self.broker_up = Gauge("leveret_api_broker_up", "Whether the link to the broker is up.", registry=registry)
        self.feed_up = Gauge("leveret_api_feed_up", "Whether Postgres tells of new events.", registry=registry)
        self.info = Gauge("leveret_api_info", "The version that runs.", ("version",), registry=registry)
        self.info.labels(version).set(1)

    def text(self) -> bytes:
        return generate_latest(self.registry)
