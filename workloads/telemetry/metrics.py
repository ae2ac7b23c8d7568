"""Metrics of a serving process in Prometheus form. Knows names and buckets; counts only what it is told.

Each process makes one `CollectorRegistry` and passes it in, so that two applications in one test
process never share a counter. Times are in seconds, as Prometheus has them; callers pass
milliseconds, as everything else in this project has them.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

MILLISECOND = 0.001

BUCKETS_MS: tuple[float, ...] = (
    *(0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 1, 1.5, 2, 3, 4, 5, 6.5, 8, 10, 12.5, 15, 20, 25, 30),
    *(40, 50, 60, 80, 100, 120, 150, 200, 300, 500, 1000, 2500),
)
"""Upper edges. Each promise of `contract.slo` is an edge, so that "within the promise" is an exact count."""

_BUCKETS_S = tuple(edge * MILLISECOND for edge in BUCKETS_MS)


class StageMetrics:
    """What a server says about its requests: time per endpoint and stage, answers by rung, responses by status.

    Series, all prefixed `rankbridge_`: `request_seconds{endpoint}`, `stage_seconds{endpoint,stage}`,
    `responses_total{endpoint,status}`, `answers_total{endpoint,rung,reason}`, `in_flight{endpoint}`.
    Label values must come from small fixed sets: never a user, an item or a raw path. Raises ValueError
    when the registry already holds one.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._request = Histogram(
            "rankbridge_request_seconds",
            "Time from the request's last byte in to the answer's first byte out",
            ("endpoint",),
            registry=registry,
            buckets=_BUCKETS_S,
        )
        self._stage = Histogram(
            "rankbridge_stage_seconds",
            "Time spent in one stage of a request",
            ("endpoint", "stage"),
            registry=registry,
            buckets=_BUCKETS_S,
        )
        self._responses = Counter(
            "rankbridge_responses", "Responses by HTTP status", ("endpoint", "status"), registry=registry
        )
        self._answers = Counter(
            "rankbridge_answers",
            "Answers by rung of the quality ladder, and why they were below the best",
            ("endpoint", "rung", "reason"),
            registry=registry,
        )
        self._in_flight = Gauge("rankbridge_in_flight", "Requests being served now", ("endpoint",), registry=registry)
        # labels() hashes and locks on each call; the sets of labels are small, so children are kept.
        self._requests: dict[str, Histogram] = {}
        self._stages: dict[tuple[str, str], Histogram] = {}
        self._statuses: dict[tuple[str, int], Counter] = {}
        self._rungs: dict[tuple[str, int, str], Counter] = {}
        self._flights: dict[str, Gauge] = {}

    def request(self, endpoint: str, milliseconds: float) -> None:
        """One request was answered in so many milliseconds."""
        child = self._requests.get(endpoint)
        if child is None:
            child = self._requests[endpoint] = self._request.labels(endpoint)
        child.observe(milliseconds * MILLISECOND)

    def stage(self, endpoint: str, stage: str, milliseconds: float) -> None:
        """One stage of one request took so many milliseconds."""
        child = self._stages.get((endpoint, stage))
        if child is None:
            child = self._stages[endpoint, stage] = self._stage.labels(endpoint, stage)
        child.observe(milliseconds * MILLISECOND)

    def response(self, endpoint: str, status: int) -> None:
        """One response went out with this HTTP status."""
        child = self._statuses.get((endpoint, status))
        if child is None:
            child = self._statuses[endpoint, status] = self._responses.labels(endpoint, str(status))
        child.inc()

    def answer(self, endpoint: str, rung: int, reason: str | None = None) -> None:
        """One answer was made at this rung; `reason` is a fixed word, None at the best rung."""
        key = (endpoint, rung, reason or "")
        child = self._rungs.get(key)
        if child is None:
            child = self._rungs[key] = self._answers.labels(endpoint, str(int(rung)), reason or "")
        child.inc()

    @contextlib.contextmanager
    def in_flight(self, endpoint: str) -> Iterator[None]:
        """Count a request as being served while inside."""
        child = self._flights.get(endpoint)
        if child is None:
            child = self._flights[endpoint] = self._in_flight.labels(endpoint)
        child.inc()
        try:
            yield
        finally:
            child.dec()


class RouteMetrics:
    """What became of calls to rankers, here and at another site, and who was turned away before any.

    Series, all prefixed `rankbridge_`: `route_choices_total{site,rung,reason}`, `route_seconds{site,rung}`,
    `route_failures_total{site,rung}`, `hedges_total{site}`, `retries_total{site,rung}`,
    `sheds_total{reason,priority}`, `bundle_mismatch_total{met}`. Labels as in `StageMetrics`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"rankbridge_{name}", text, labels, registry=registry)

        self._choices = counter("route_choices", "Requests by the ranker that ranked them", "site", "rung", "reason")
        self._failures = counter("route_failures", "Calls to a ranker without a usable answer", "site", "rung")
        self._hedges = counter("hedges", "Second calls beside one that was out too long", "site")
        self._retries = counter("retries", "Calls after one that failed", "site", "rung")
        self._sheds = counter("sheds", "Requests turned away before any work", "reason", "priority")
        self._mismatches = counter("bundle_mismatch", "Calls refused for being of another edition", "met")
        self._seconds = Histogram(
            "rankbridge_route_seconds",
            "Time that a ranker took for one call that it answered",
            ("site", "rung"),
            registry=registry,
            buckets=_BUCKETS_S,
        )
        self._shed_children: dict[tuple[str, str], Counter] = {}
        self._choice_children: dict[tuple[str, int, str], Counter] = {}
        self._call_children: dict[tuple[str, int], Histogram] = {}

    def choice(self, site: str, rung: int, reason: str) -> None:
        """This ranker ranked a request; `reason` is a fixed word, empty at the best rung."""
        child = self._choice_children.get((site, rung, reason))
        if child is None:
            child = self._choice_children[site, rung, reason] = self._choices.labels(site, str(int(rung)), reason)
        child.inc()

    def call(self, site: str, rung: int, took_ms: float | None) -> None:
        """One call to a ranker was answered in so many milliseconds; None: it gave nothing that could be used."""
        if took_ms is None:
            self._failures.labels(site, str(int(rung))).inc()
            return
        child = self._call_children.get((site, rung))
        if child is None:
            child = self._call_children[site, rung] = self._seconds.labels(site, str(int(rung)))
        child.observe(took_ms * MILLISECOND)

    def hedge(self, site: str) -> None:
        """A second call went to this site beside the first."""
        self._hedges.labels(site).inc()

    def retry(self, site: str, rung: int) -> None:
        """After a failure this ranker was tried."""
        self._retries.labels(site, str(int(rung))).inc()

    def shed(self, reason: str, priority: str) -> None:
        """A request was turned away."""
        child = self._shed_children.get((reason, priority))
        if child is None:
            child = self._shed_children[reason, priority] = self._sheds.labels(reason, priority)
        child.inc()

    def mismatch(self, met: str) -> None:
        """Something of another edition was refused; `met` is who sent it, a fixed word."""
        self._mismatches.labels(met).inc()


class ReadWhenScraped(Collector):
    """One metric whose rows are read when somebody scrapes: what is kept elsewhere is not kept twice.

    `read` gives label values and value of each row. A name that ends in `_total` is a counter, others are gauges.
    """

    def __init__(
        self, name: str, text: str, labels: Sequence[str], read: Callable[[], Iterable[tuple[Sequence[str], float]]]
    ) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def collect(self) -> Iterable[Metric]:
        """The metric."""
        kind = CounterMetricFamily if self._name.endswith("_total") else GaugeMetricFamily
        family = kind(self._name, self._text, labels=self._labels)
        for labels, value in self._read():
            family.add_metric(labels, value)
        yield family

    def describe(self) -> Iterable[Metric]:
        """Its name, so that a second one of it is refused."""
        kind = CounterMetricFamily if self._name.endswith("_total") else GaugeMetricFamily
        yield kind(self._name, self._text, labels=self._labels)


class PssCollector(Collector):
    """`rankbridge_process_pss_bytes`: this process's share of memory, read when scraped and not before.

    PSS divides shared pages among the processes that map them, so that a sum over processes is true.
    """

    def collect(self) -> Iterable[Metric]:
        """The gauge, or nothing where the kernel does not tell."""
        pss = pss_bytes()
        if pss is not None:
            yield GaugeMetricFamily("rankbridge_process_pss_bytes", "Proportional set size", value=pss)


def pss_bytes(pid: int | None = None) -> int | None:
    """PSS of a process (this one when None), from `/proc/<pid>/smaps_rollup`; None when not readable."""
    path = pathlib.Path("/proc") / str(os.getpid() if pid is None else pid) / "smaps_rollup"
    try:
        for line in path.read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def new_registry() -> CollectorRegistry:
    """A registry that already holds what is true of any process: CPU, memory, file descriptors, PSS."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(PssCollector())
    return registry


def render(registry: CollectorRegistry) -> tuple[bytes, str]:
    """Body and Content-Type of a `/metrics` answer."""
    return generate_latest(registry), CONTENT_TYPE_LATEST
