"""Candidate lists as the services would have made them, and the ranker's rows from them.

A `Shop` is a moment's tables, towers and fusion weights: what a site serves from. It calls the same
functions as retrieval and gateway (`workloads.data.fusion`, `workloads.data.features`), with an exact
search where they ask an index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from workloads.contract.slo import CANDIDATES_RANKED
from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.data.features import ItemTables, UserState, raw_features
from workloads.data.fusion import (
    ANN_LIMIT_MAX,
    SOURCE_INDEX,
    Candidates,
    Proposals,
    ann_count,
    fuse,
    popular_items,
    recommend_sources,
)
from workloads.training.journal import Ints, Journal
from workloads.training.requests import People, Requests

Floats = npt.NDArray[np.float32]
Items = npt.NDArray[np.integer[Any]]
NOTHING: Items = np.empty(0, dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class Shop:
    """What candidates are made from at one moment."""

    tables: ItemTables
    popular: Proposals
    weights: Mapping[str, float]

    @classmethod
    def of(cls, tables: ItemTables, weights: Mapping[str, float]) -> Shop:
        """Of item tables that have their vectors."""
        return cls(tables, popular_items(tables.popularity_recent, tables.popularity, tables.in_stock), weights)

    def sources(self, state: UserState, ann: Proposals, exclude: Items) -> dict[str, Proposals]:
        """What each source proposes for one request."""
        return recommend_sources(
            state.items,
            state.strength,
            state.age_hours,
            ann=(ann[0][: ann_count(len(exclude))], ann[1][: ann_count(len(exclude))]),
            neighbours=self.tables.neighbours,
            neighbour_scores=self.tables.neighbour_scores,
            popular=self.popular,
            exclude=exclude,
        )

    def candidates(
        self, state: UserState, vector: Floats, ann: Proposals, exclude: Items, count: int = CANDIDATES_RANKED
    ) -> Candidates:
        """The list that retrieval would answer for one request."""
        sources = self.sources(state, ann, exclude)
        return fuse(sources, self.tables.vectors, vector, exclude, count, weights=self.weights)


def nearest(vectors: Floats, users: Floats, *, count: int = ANN_LIMIT_MAX, block: int = 256) -> Iterator[Proposals]:
    """For each user vector [R, D] the `count` items of largest dot product, best first; exact, PAD left out."""
    count = min(count, len(vectors) - 1)
    for at in range(0, len(users), block):
        scores = users[at : at + block] @ vectors[1:].T  # [b, N]
        best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(scores, best, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        for ids, found in zip(
            np.take_along_axis(best, order, axis=1) + 1, np.take_along_axis(values, order, axis=1), strict=True
        ):
            yield ids.astype(np.int32), found


@dataclasses.dataclass(frozen=True)
class RankRows:
    """Rows for the ranker: one per (request, candidate)."""

    sparse: npt.NDArray[np.int64]
    dense: Floats
    """Not standardised."""
    label: npt.NDArray[np.int8]
    place: npt.NDArray[np.int64]
    """Place in a list that was really shown plus 1, 0 for a candidate that was not shown."""
    chance: Floats
    """With which chance unwanted rows of the row's list were kept."""

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def join(cls, parts: Sequence[RankRows]) -> RankRows:
        """All rows of all parts."""
        empty = cls(
            sparse=np.empty((0, len(RANKER_SPARSE)), dtype=np.int64),
            dense=np.empty((0, len(RANKER_DENSE)), dtype=np.float32),
            label=np.empty(0, dtype=np.int8),
            place=np.empty(0, dtype=np.int64),
            chance=np.empty(0, dtype=np.float32),
        )
        return cls(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in (empty, *parts)])
                for field in dataclasses.fields(cls)
            }
        )

    def take(self, rows: npt.NDArray[Any]) -> RankRows:
        """These rows, in this order."""
        return RankRows(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})


def wanted_rows(
    shop: Shop,
    requests: Requests,
    states: Sequence[UserState],
    users: Floats,
    *,
    rng: np.random.Generator,
    negatives: int | None,
    heard: Callable[[int], None] = lambda _: None,
) -> RankRows:
    """Rows of each request's candidate list, labelled by what was wanted.

    Every other list is made without what was bought before, as serving does unless asked for repeats.
    With `negatives` that many unwanted candidates of each list are kept, else all.
    """
    parts = []
    for place, (state, vector, ann) in enumerate(zip(states, users, nearest(shop.tables.vectors, users), strict=True)):
        exclude: Items = state.bought_items if place % 2 else NOTHING
        found = shop.candidates(state, vector, ann, exclude)
        label = np.isin(found.items, requests.wanted(place))
        kept = np.arange(len(label))
        chance = 1.0
        unwanted = np.flatnonzero(~label)
        if negatives is not None and len(unwanted) > negatives:
            chance = negatives / len(unwanted)
            kept = np.sort(np.r_[np.flatnonzero(label), rng.choice(unwanted, negatives, replace=False)])
        sparse, dense = raw_features(state, found, shop.tables)
        parts.append(
            RankRows(
                sparse[kept],
                dense[kept],
                label[kept].astype(np.int8),
                np.zeros(len(kept), dtype=np.int64),
                np.full(len(kept), chance, dtype=np.float32),
            )
        )
        heard(place + 1)
    return RankRows.join(parts)


def shown_rows(
    shop: Shop,
    shown: Journal,
    clicks: Journal,
    people: People,
    vectors_of: Callable[[list[UserState]], Floats],
    *,
    lists: int,
    rng: np.random.Generator,
) -> RankRows:
    """Rows of lists that were really shown to known people, labelled by what was clicked.

    Only lists that answered no query: the ranker knows none. `lists` are drawn evenly. A shown item that
    is no candidate of the moment stands behind all candidates, with no fused score.
    """
    shown = shown.take(np.flatnonzero((shown.person >= 0) & (shown.query < 0) & (shown.position >= 0)))
    visits, start = np.unique(shown.visit, return_index=True)
    if len(visits) > lists:
        start = np.sort(rng.choice(start, lists, replace=False))
    clicked = np.unique(clicks.visit * (len(shop.tables.category)) + clicks.item)
    order = np.argsort(shown.visit, kind="stable")
    ordered = shown.visit[order]
    states = [people.state(int(shown.person[row]), int(shown.time_ms[row])) for row in start]
    users = vectors_of(states)
    parts = []
    for row, state, vector, ann in zip(start, states, users, nearest(shop.tables.vectors, users), strict=True):
        rows = order[np.searchsorted(ordered, shown.visit[row]) : np.searchsorted(ordered, shown.visit[row], "right")]
        items, first = np.unique(shown.item[rows], return_index=True)
        found = _with(shop.candidates(state, vector, ann, NOTHING), items, vector, shop.tables.vectors)
        sparse, dense = raw_features(state, found, shop.tables)
        at = np.argsort(found.items)
        at = at[np.searchsorted(found.items, items, sorter=at)]
        label = np.isin(shown.visit[row] * len(shop.tables.category) + items, clicked)
        parts.append(
            RankRows(
                sparse[at],
                dense[at],
                label.astype(np.int8),
                shown.position[rows][first] + 1,
                np.ones(len(items), dtype=np.float32),
            )
        )
    return RankRows.join(parts)


def _with(found: Candidates, items: Ints, vector: Floats, vectors: Floats) -> Candidates:
    """The candidates, then those of `items` that are none of them."""
    more = items[~np.isin(items, found.items)].astype(np.int32)
    return Candidates(
        items=np.concatenate((found.items, more)),
        scores=np.concatenate((found.scores, np.zeros(len(more), dtype=np.float32))),
        ann=np.concatenate((found.ann, vectors[more] @ vector)),
        source=np.concatenate((found.source, np.full(len(more), SOURCE_INDEX["popular"], dtype=np.int32))),
    )
