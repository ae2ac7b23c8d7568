"""Messages of the public API and of the calls between gateway, retrieval and intake.

Every message checks itself when it is decoded: msgspec refuses wrong types, unknown fields and
numbers out of range with the path of the field, which the gateway turns into problem+json
(RFC 9457). Public messages travel as JSON, internal ones as MessagePack.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from workloads.contract.events import QUERY_MAX, Event, Id

DEADLINE_HEADER = "Rankbridge-Deadline-Ms"
DEADLINE_MIN_MS, DEADLINE_MAX_MS = 1.0, 60_000.0
PRIORITY_HEADER = "Rankbridge-Priority"
"""`high`, `normal` (the default) or `low` (`contract.slo.Priority`): under overload low is refused first."""
TENANT_HEADER = "Rankbridge-Tenant"
TENANT_PATTERN = r"^[a-z0-9][a-z0-9-]{0,31}$"
"""Who the request is for; `default` without the header. No tenant can take more than its share under overload."""
RUNG_HEADER = "Rankbridge-Rung"
"""1 to 4: answer from this rung or a lower one, though a better could be had (`reason` is then `asked`)."""
REQUEST_ID_HEADER = "Rankbridge-Request-Id"
REQUEST_ID_PATTERN = r"^[A-Za-z0-9._-]{1,128}$"
"""Anything else, or none, and the gateway makes a UUID version 7."""

PATH_SAMPLE = "/v1/catalogue/sample"
PATH_PROFILE = "/v1/users/{id}/profile"
"""GET: what home knows of a person's taste; DELETE: forget the person. At home only."""
PATH_HEALTH = "/healthz"
PATH_READY = "/readyz"
PATH_METRICS = "/metrics"
PATH_DOCS = "/docs"
PATH_OPENAPI = "/openapi.json"

PATH_CANDIDATES = "/internal/candidates"
PATH_RANK = "/internal/rank"
"""A gateway to the other site's gateway: score these candidates of the named edition. Features only, no person."""
PATH_INTAKE = "/internal/events"
PATH_ERASE = "/internal/erasures"
"""Intake: remove every event of these pseudonyms from the spool; durable when answered."""
PATH_TRIM = "/internal/spool/trim"
"""Intake: remove from the spool what the lake has durably."""

REASON_ASKED = "asked"

K_MAX = 100
HISTORY_MAX = 50
SAMPLE_DEFAULT, SAMPLE_MAX = 1000, 10_000
BODY_MAX_BYTES = 256 * 1024
PSEUDONYM_PATTERN = r"^p[0-9]{1,3}-[0-9a-f]{32}$"
"""`p<key epoch>-<128 bits of HMAC-SHA256>`: the only form of a user that may leave home."""
SESSION_PATTERN = r"^s[0-9]{1,3}-[0-9a-f]{32}$"
"""The same of a session id, which often holds a user's. Epoch 0 is no key of home's: see `gateway.identity`."""

K = Annotated[int, msgspec.Meta(ge=1, le=K_MAX)]
Query = Annotated[str, msgspec.Meta(min_length=1, max_length=QUERY_MAX, pattern=r"\S")]
History = Annotated[list[Id], msgspec.Meta(max_length=HISTORY_MAX)]


class RecommendRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/recommend`."""

    user: Id | None = None
    history: History = []
    """Items of this session, oldest first; added to what the profile knows."""
    k: K = 10
    repeats: bool = False
    """Whether items that the user already bought may be answered."""
    use_model: bool = True
    """False asks for the traditional recommender (rung 4)."""


class SearchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/search`: lexical and vector candidates, fused."""

    query: Query
    user: Id | None = None
    k: K = 10


class SimilarRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/similar`: items like one item. An unknown item gets popular ones."""

    item: Id
    k: K = 10


class EventsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/events`: one to a thousand events, acknowledged when all are on disk."""

    events: Annotated[list[Event], msgspec.Meta(min_length=1, max_length=1000)]


class RankedItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item of an answer; `score` orders items within an answer and means nothing across rungs."""

    item: str
    score: float
    source: str
    """Which candidate source proposed it: ann, item_to_item, history, lexical, vector, popular."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """Where, how well and from what an answer was made."""

    rung: int
    site: str
    bundle: str
    """First 12 hex digits of the bundle's id."""
    delta: int = 0
    """Signed deltas applied on top of the bundle."""
    stages_ms: dict[str, float]
    reason: str | None = None
    """Why the answer is below the best configured rung; None when it is not. `asked` is the client's own wish
    (`use_model: false`) and no fault. `profiles_down` may stand at any rung: the answer is a cold start, because the
    person's profile could not be read."""
    ranked: int | None = None
    """Candidates that a ranker scored for this answer; None where none did (rung 3 and 4)."""
    ranked_at: str | None = None
    """Site whose hardware scored them; None as `ranked`."""
    loss: float | None = None
    """Share of rung 1's NDCG@10 that this rung lost on the bundle's test requests; 0 at rung 1, None if not known."""
    predicted_ms: float | None = None
    """What the router expected ranking to take at its quantile, when it chose; None where it chose nothing."""


class ItemsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of recommend, search and similar."""

    request_id: str
    items: list[RankedItem]
    served: Served


class EventsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Every event of the request is on disk at home; `duplicates` were there before."""

    accepted: int
    duplicates: int
    rejected: int = 0
    """Events of a newer or broken sender that intake could not take; each is a dead letter with its reason."""


class ErasureRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /internal/erasures` of the intake, MessagePack: the pseudonyms of people who are to be forgotten."""

    pseudonyms: Annotated[list[Id], msgspec.Meta(min_length=1, max_length=1000)]


class ErasureAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What is gone from the spool, on disk when answered."""

    events: int
    dead_letters: int


class TrimRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /internal/spool/trim` of the intake, MessagePack or JSON: what of the spool the lake has durably.

    Events with `seq <= up_to_seq` that arrived before `received_before_ms` are removed; the first one that must stay
    ends it, so that the spool loses its beginning and never a piece of its middle.
    """

    up_to_seq: Annotated[int, msgspec.Meta(ge=0)]
    received_before_ms: Annotated[int, msgspec.Meta(ge=0)]
    """The retention: what arrived at this moment or later stays, whatever the lake has."""


class TrimAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What is gone, on disk when answered."""

    events: int
    trimmed_seq: int
    """No event at or below it is in the spool."""
    last_seq: int
    """The highest number given so far. Numbers are never given twice; an erasure leaves gaps between them."""


class CategoryInterest(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a person's touches lie in a category; shares of one profile sum to 1."""

    category: str
    share: float
    last_ms: int


class ProfileAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/users/{id}/profile` at home. It names no pseudonym: that would link the id to what left home."""

    request_id: str
    cold_start: bool
    """Whether nothing is known that could personalise an answer."""
    interests: list[str]
    """Items touched last, newest first; at most 50."""
    categories: list[CategoryInterest]
    """Strongest first."""
    price_band: tuple[float, float] | None
    """10th and 90th percentile of prices touched; None where no price is known."""
    recency_days: float | None
    """Since the last touch."""
    touches: int
    as_of_ms: int
    """Up to which event the profile is made: the store's watermark."""


class CatalogueSample(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/catalogue/sample?size=N`: what a load user draws from, weighted by the catalogue's own popularity.

    Item i is drawn with probability `item_weights[i]`; they sum to 1. `users` is empty in a cloud site: ids of people
    do not leave home.
    """

    items: list[str]
    item_weights: list[float]
    queries: list[str]
    users: list[str]
    best_rung: dict[str, int]
    """Best configured rung per endpoint path."""


class BackendState(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway knows of one neighbour now."""

    up: bool
    detail: str
    """One sentence: what was asked and what came back."""


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /readyz` of a gateway: 200 while it can answer at any rung, 503 while it starts or drains.

    A neighbour that is down costs rungs, not readiness.
    """

    ready: bool
    site: str
    bundle: str
    """First 12 hex digits of the bundle's id; empty while no edition is served."""
    delta: int = 0
    """Deltas on top of the bundle."""
    draining: int = 0
    """Requests in flight that began on another edition and finish on it."""
    revision: int = 0
    """Of the site's editions file as far as it is brought about; an edition that could not be opened counts as done."""
    faults: dict[str, str] = {}
    """Editions that the site's file names and this gateway could not open, and why; what it served, it serves on."""
    backends: dict[str, BackendState]
    """`triton`, `retrieval`, `intake`, at home `profiles`; `student` where the edition has one, `peer` where the site
    has: the other site's gateway, which lives or not."""
    missing: list[str]
    """Names of the backends that are down; never `peer`, because a site is whole without the other."""


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None
    """Path of the field at fault, `$.k`."""
    rule: str | None = None
    """What the field must satisfy."""
    remedy: str | None = None


class CandidatesQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gateway to retrieval. Items are indices of the named bundle; 0 is unknown.

    `history` is oldest first; `history_strength` goes with it (see `tensors.STRENGTH`), and
    `history_age_hours` is the time since each, at the request.
    """

    bundle: str
    delta: int = 0
    """Deltas on top of the bundle, on both sides: a query of another edition is refused (409)."""
    kind: Literal["recommend", "search", "similar"]
    history: list[int]
    history_strength: list[float]
    history_age_hours: list[float]
    context: list[float]
    """`tensors.CONTEXT` in order."""
    query: str | None = None
    count: Annotated[int, msgspec.Meta(ge=1, le=2000)]
    exclude: list[int] = []


class CandidatesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Retrieval to gateway: `count` or fewer candidates, best first by the fused retrieval score.

    Columns of C numbers each, little-endian: hundreds of numbers cost more to name one by one than to find.
    """

    bundle: str
    delta: int = 0
    items: bytes
    """int32: indices of the bundle's items."""
    scores: bytes
    """float32: fused score, the order of rung 3."""
    ann: bytes
    """float32: dot product of the user (or query) vector with each candidate's item vector."""
    source: bytes
    """int32: index into `SOURCES` of the source that ranked the candidate highest."""


class RankQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /internal/rank`, MessagePack: the inputs of `tensors.RANKER` for C candidates, row by row.

    The rest of the caller's time is its header `Rankbridge-Deadline-Ms`.
    """

    bundle: str
    delta: int = 0
    """As `CandidatesQuery`: a query of another edition is refused (409) and counted."""
    rows: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    sparse: bytes
    """int64, little-endian, [C, F_s]."""
    dense: bytes
    """float32, little-endian, [C, F_d]."""


class RankAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of the site's full ranker."""

    bundle: str
    delta: int = 0
    site: str
    probability: bytes
    """float32, little-endian, [C]."""
    rank_ms: float
    """What the site's own Triton took of it; the rest is the way."""


SOURCES: tuple[str, ...] = ("ann", "item_to_item", "history", "lexical", "vector", "popular")
