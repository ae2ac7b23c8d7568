"""What the feedback process says of itself in Prometheus form. Times in seconds, as Prometheus has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from workloads.feedback.follower import Position

_BUCKETS_S: Final = (
    *(0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 600.0, 3600.0, 86_400.0),
)


class Gauges:
    """`rankbridge_freshness_seconds{since}`, and how far profiles and lake are behind the spool.

    `since` is `happened` (the client's clock) or `received` (home's). Raises ValueError when the registry has one of
    these already.
    """

    def __init__(self, registry: CollectorRegistry, position: Position, clock_ms: Callable[[], int]) -> None:
        freshness = Histogram(
            "rankbridge_freshness_seconds",
            "From an event to its place in the profiles",
            ("since",),
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._happened, self._received = freshness.labels("happened"), freshness.labels("received")
        events = Counter("rankbridge_feedback_events", "Events by what became of them", ("outcome",), registry=registry)
        self._applied, self._passed = events.labels("applied"), events.labels("passed")
        self._lake = Gauge("rankbridge_lake_seq", "The last event of the spool that is in the lake", registry=registry)
        self._trimmed = Counter("rankbridge_spool_trimmed", "Events taken out of the spool", registry=registry)
        lag = Gauge("rankbridge_feedback_lag_events", "Numbers between profiles and spool", registry=registry)
        lag.set_function(lambda: max(position.last - position.applied, 0))
        stale = Gauge(
            "rankbridge_feedback_staleness_seconds",
            "Age of the oldest event that is not in the profiles; 0 where there is none",
            registry=registry,
        )
        stale.set_function(lambda: position.staleness_ms(clock_ms()) / 1000)

    def applied(self, happened_ms: int, received_ms: int, applied_ms: int) -> None:
        """See `follower.Meter`."""
        self._applied.inc()
        self._happened.observe(max(applied_ms - happened_ms, 0) / 1000)
        self._received.observe(max(applied_ms - received_ms, 0) / 1000)

    def passed(self, events: int) -> None:
        """See `follower.Meter`."""
        self._passed.inc(events)

    def lake(self, seq: int) -> None:
        """The lake has everything up to this number."""
        self._lake.set(seq)

    def trimmed(self, events: int) -> None:
        """So many events were taken out of the spool."""
        self._trimmed.inc(events)
