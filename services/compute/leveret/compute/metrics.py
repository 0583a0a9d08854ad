"""Every metric of a compute process, in one table. Hosts and VMs are never labels."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from leveret.shared.lifecycle import Step

STEP_BUCKETS_S = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """One per process; tests make their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.commands = Counter(
            "leveret_host_commands",
            "Commands by what became of them: newer, same, stale, late (its VM is gone) or other_epoch.",
            ("outcome",),
            registry=self.registry,
        )
        self.builds = Counter(
            "leveret_host_builds",
            "Builds by outcome: built, or the code of its failure.",
            ("outcome",),
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "leveret_host_step_seconds",
            "How long a step took.",
            ("step",),
            buckets=STEP_BUCKETS_S,
            registry=self.registry,
        )
        self._steps: dict[Step, Histogram] = {}
        self.reports = Counter(
            "leveret_host_reports", "Reports by outcome: sent or failed.", ("outcome",), registry=self.registry
        )
        self.domains = Gauge(
            "leveret_host_domains", "VMs of this process by what was last seen.", ("observed",), registry=self.registry
        )

    def took(self, step: Step, seconds: float) -> None:
        """A step was taken. Looking a label up costs more than observing, so each is looked up once."""
        steps = self._steps.get(step)
        if steps is None:
            steps = self._steps[step] = self.step_seconds.labels(step.value)
        steps.observe(seconds)

    def count_domains(self, observed: str, count: Callable[[], float]) -> None:
        """Ask `count` whenever somebody asks for the metrics; it runs in another thread."""
        self.domains.labels(observed).set_function(count)

    def serve(self, port: int) -> None:
        """Serve /metrics on loopback, from a thread of its own."""
        start_http_server(port, addr="127.0.0.1", registry=self.registry)
