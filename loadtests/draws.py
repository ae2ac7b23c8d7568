"""What load users ask for: requests drawn from a catalogue sample by the catalogue's own popularity.

Pure and seeded: the same sample and the same seed ask the same things in the same order (event ids
excepted; they must be new in every run). It knows no server. Where the sample names no users (a
cloud site) a request brings its taste along as `history`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Sequence

import uuid_utils

from workloads.contract.events import QUERY_MAX, Event, EventType
from workloads.contract.http import CatalogueSample, EventsRequest, RecommendRequest, SearchRequest
from workloads.contract.slo import Endpoint

K = 10
STRANGERS = 0.1
"""Share of home requests by people without a profile: cold start is part of every shop's traffic."""
SESSION_MAX = 8
"""Items of a drawn session, at the most."""

_EVENT_TYPES: Sequence[EventType] = (
    EventType.IMPRESSION,
    EventType.CLICK,
    EventType.VIEW,
    EventType.CART,
    EventType.PURCHASE,
    EventType.SEARCH,
)
_EVENT_WEIGHTS: Sequence[float] = (60, 16, 10, 6, 4, 4)
"""About what a shop's log holds: most of it is looking."""


def check(sample: CatalogueSample, endpoints: Collection[str]) -> str | None:
    """Why requests for these endpoints cannot be drawn from the sample, or None."""
    if not sample.items:
        return "it names no items"
    if len(sample.items) != len(sample.item_weights):
        return f"it names {len(sample.items)} items and {len(sample.item_weights)} weights"
    if not all(math.isfinite(w) and w >= 0 for w in sample.item_weights) or sum(sample.item_weights) <= 0:
        return "its item weights are not all numbers from 0 up with a positive sum"
    if Endpoint.SEARCH.value in endpoints and not sample.queries:
        return "it names no queries, and the suite searches"
    return None


class Shopper:
    """One source of requests. `sample` has passed `check`; `rng` is used by nobody else."""

    def __init__(self, sample: CatalogueSample, rng: random.Random) -> None:
        self._sample = sample
        self._rng = rng
        self._cumulated = list(itertools.accumulate(sample.item_weights))

    def recommend(self) -> RecommendRequest:
        """A person of the shop, some with a running session; a stranger has only the session."""
        user = self._user()
        has_session = user is None or self._rng.random() < 0.25
        return RecommendRequest(user=user, history=self._session() if has_session else [], k=K)

    def search(self) -> SearchRequest:
        """One of the catalogue's queries."""
        return SearchRequest(query=self._query(), user=self._user(), k=K)

    def events(self, now_ms: int) -> EventsRequest:
        """What a client's log sends at `now_ms` (unix): one visit's last few events, with new UUIDv7 ids."""
        user = self._user()
        session = f"load-{self._rng.getrandbits(64):016x}"
        types = self._rng.choices(_EVENT_TYPES, _EVENT_WEIGHTS, k=self._rng.randint(1, SESSION_MAX))
        return EventsRequest(events=[self._event(kind, user=user, session=session, now_ms=now_ms) for kind in types])

    def _event(self, kind: EventType, *, user: str | None, session: str, now_ms: int) -> Event:
        searched = kind is EventType.SEARCH
        return Event(
            event_id=str(uuid_utils.uuid7()),
            type=kind,
            timestamp_ms=now_ms,
            user=user,
            session=session,
            item=None if searched else self._item(),
            query=self._query() if searched else None,
            position=self._rng.randrange(K) if kind in {EventType.IMPRESSION, EventType.CLICK} else None,
            quantity=1 if kind is EventType.PURCHASE else None,
        )

    def _user(self) -> str | None:
        if not self._sample.users or self._rng.random() < STRANGERS:
            return None
        return self._rng.choice(self._sample.users)

    def _item(self) -> str:
        return self._rng.choices(self._sample.items, cum_weights=self._cumulated)[0]

    def _query(self) -> str:
        if not self._sample.queries:
            return self._item()[:QUERY_MAX]
        return self._rng.choice(self._sample.queries)

    def _session(self) -> list[str]:
        count = self._rng.randint(1, SESSION_MAX)
        return self._rng.choices(self._sample.items, cum_weights=self._cumulated, k=count)
