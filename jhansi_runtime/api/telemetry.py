"""What an operator sees of the server: counters and histograms for Prometheus, and one JSON line for each event.

Nothing that a caller sends is in either but ids: no path, no argument, no value of an environment variable.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jhansi_runtime.engine import Figures
from jhansi_runtime.errors import JhansiError
from jhansi_runtime.logs import log
from jhansi_runtime.spec import ExecResult

__all__ = ["Telemetry"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Telemetry:
    """The measurements of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._execs = Counter("jhansi_execs", "Execs that have ended.", ["status"], registry=self._registry)
        self._seconds = Histogram(
            "jhansi_exec_seconds",
            "Where the time of an exec goes: in the queue, in its container, in all.",
            ["phase"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._bytes = Counter("jhansi_bytes", "Bytes moved.", ["kind"], registry=self._registry)
        self._errors = Counter("jhansi_errors", "Requests refused or failed.", ["kind"], registry=self._registry)

    def watch(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when somebody asks."""
        Gauge(name, documentation, registry=self._registry).set_function(value)

    def watch_pool(self, figures: Callable[[], Figures | None]) -> None:
        """Add what a pool has done and what waits in it, read when somebody asks; nothing, where there is none."""
        self._registry.register(_Pool(figures))

    def note_exec(self, result: ExecResult, *, queued: float, seconds: float) -> None:
        """Count an exec: seconds in the queue, and from the request to the result."""
        self._execs.labels(result.status).inc()
        self._seconds.labels("queue").observe(queued)
        self._seconds.labels("container").observe(result.wall_time_ms / 1000)
        self._seconds.labels("total").observe(seconds)
        self.note_bytes("stdout", result.stdout_bytes)
        self.note_bytes("stderr", result.stderr_bytes)
        log("exec", run_id=result.run_id, sandbox_id=result.sandbox_id, status=result.status, seconds=round(seconds, 6))

    def note_bytes(self, kind: str, count: int) -> None:
        """Count bytes: stdout, stderr, upload, download."""
        self._bytes.labels(kind).inc(count)

    def note_error(self, error: JhansiError) -> None:
        """Count a request that was refused or failed, by the class of its error."""
        self._errors.labels(type(error).__name__).inc()

    def note_defect(self, error: BaseException) -> None:
        """Log what nobody expected, with its traceback."""
        self._errors.labels("defect").inc()
        log("defect", error=error)

    def exposition(self) -> bytes:
        """All of it, in the text format of Prometheus."""
        return generate_latest(self._registry)

    @staticmethod
    def clock() -> float:
        """Seconds that only ever go forward."""
        return time.monotonic()


class _Pool(Collector):
    def __init__(self, figures: Callable[[], Figures | None]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """See Collector: all of one moment."""
        now = self._figures()
        if now is None:
            return
        taken = CounterMetricFamily("jhansi_pool_slots", "Slots taken: waiting, or made on demand.", labels=["from"])
        taken.add_metric(["pool"], now.hits)
        taken.add_metric(["demand"], now.misses)
        yield taken
        yield CounterMetricFamily("jhansi_pool_interpreters", "Slots taken with an interpreter.", now.interpreters)
        yield GaugeMetricFamily("jhansi_pool_idle", "Slots that wait.", now.idle)
        yield GaugeMetricFamily("jhansi_pool_zygotes", "Zygotes that are ready.", now.zygotes)
        yield GaugeMetricFamily("jhansi_pool_bytes", "Memory of what waits, as last weighed.", now.memory)
        yield GaugeMetricFamily("jhansi_pool_skipped", "Modules that zygotes could not import.", len(now.skipped))
