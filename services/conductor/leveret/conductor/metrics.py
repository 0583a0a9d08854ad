"""The conductor's metrics, in one table. They are moved at the rim only."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("leveret_requests_total", "Requests by verb and verdict.", ["verb", "verdict"])
REPORTS = Counter("leveret_reports_total", "VM reports by what became of them.", ["outcome"])
SWEPT = Counter("leveret_swept_total", "VMs that the sweeper had to help along.", ["reason"])
EVENTS_PUBLISHED = Counter("leveret_events_published_total", "Events handed to the broker.")
EVENTS_REFUSED = Counter("leveret_events_refused_total", "Events that a client's full queue refused.")
TRANSACTION_SECONDS = Histogram(
    "leveret_transaction_seconds",
    "One batch in Postgres.",
    ["handler"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
BATCH_MESSAGES = Histogram(
    "leveret_batch_messages", "Messages in one batch.", ["handler"], buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500)
)
CONSUMING = Gauge("leveret_consuming", "1 while the consumer of a queue is attached.", ["queue"])
INVARIANT_VIOLATIONS = Gauge(
    "leveret_invariant_violations", "What broke a rule when it was last looked at; 0 is fine.", ["name"]
)
INVARIANT_CHECKED_AT = Gauge(
    "leveret_invariant_checked_timestamp_seconds", "When a rule was last looked at, in seconds since 1970.", ["name"]
)
