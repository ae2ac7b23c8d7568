"""The promises: deadline and latency target per endpoint, target per stage, and the quality ladder.

Numbers only. `loadtests.budgets` judges a run by them, the gateway spends them. Times are in
milliseconds and a target is a p99 unless it says otherwise.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType


class Endpoint(enum.StrEnum):
    """A public endpoint that has a promise; the value is its path."""

    RECOMMEND = "/v1/recommend"
    SEARCH = "/v1/search"
    SIMILAR = "/v1/similar"
    EVENTS = "/v1/events"


class Stage(enum.StrEnum):
    """A part of one request, in order; each is timed in `served.stages_ms`."""

    FEATURES = "features"
    CANDIDATES = "candidates"
    RANK = "rank"
    RULES = "rules"


class Rung(enum.IntEnum):
    """The quality ladder: 1 is best. A step down is an answer, never an error."""

    FULL_RANKER = 1
    DISTILLED_RANKER = 2
    RETRIEVAL_SCORE = 3
    TRADITIONAL = 4


class Priority(enum.StrEnum):
    """Who is refused last under overload, in order."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


DEADLINE_MS: Mapping[Endpoint, float] = MappingProxyType(
    {Endpoint.RECOMMEND: 100.0, Endpoint.SEARCH: 120.0, Endpoint.SIMILAR: 100.0, Endpoint.EVENTS: 30.0}
)
"""What a request without a `Rankbridge-Deadline-Ms` header gets; also the p99 target."""

STAGE_P99_MS: Mapping[Stage, float] = MappingProxyType(
    {Stage.FEATURES: 10.0, Stage.CANDIDATES: 40.0, Stage.RANK: 50.0, Stage.RULES: 10.0}
)

ANSWER_RESERVE_MS = 8.0
"""Kept back from the deadline for rules, encoding and the way home when a stage is given its share."""

CANDIDATES_RANKED = 200
"""Candidates that /v1/recommend ranks, at the least, when the catalogue has as many."""

STUDENT_LOSS_MAX = 0.05
"""Rung 2's loss budget: share of rung 1's NDCG@10 that the distilled ranker may lose; more and it is not exported."""

ROUTE_QUANTILE = 0.95
"""A route counts as fitting a deadline when its predicted latency at this quantile does."""

HEDGE_SHARE_MAX = 0.05
"""Hedges may add this share of calls at the most."""

BELOW_BEST_RUNG_SHARE = 0.01
"""At most this share of answers may come from below the best configured rung."""

QUANTILE_SHARE: Mapping[str, float] = MappingProxyType({"p50": 0.5, "p95": 0.9, "p99": 1.0})
"""Share of an endpoint's p99 target that each quantile may take: a slow middle is not excused by a good tail."""

TRAFFIC_PER_S: Mapping[Endpoint, float] = MappingProxyType(
    {Endpoint.RECOMMEND: 40.0, Endpoint.SEARCH: 10.0, Endpoint.EVENTS: 10.0}
)
"""The mixed traffic, in requests a second over both sites, under which the targets are promised."""

P99_SAMPLES = 1000
"""Answers that must stand behind a p99: with fewer, less than ten of them decide it."""

SERVING_PSS_MAX_MB = 3072.0
"""All serving processes of both sites together, proportional set size in MiB."""

SERVED_AFTER_MAX_S = 30.0
"""From the move of a channel until every site that watches it answers from the release."""

NEW_ITEM_MAX_S = 60.0
"""From a file with new items until every site recommends them."""
