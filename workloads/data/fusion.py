"""From what each source proposes to one list of candidates: the retrieval score of rung 3.

Pure numpy, called by the retrieval service for every request and by training for every list that the
ranker learns from, so that the ranker meets at serving exactly the candidates it was trained on. The
usual call is `fuse(recommend_sources(...), vectors, user_vector, exclude, count)`.

It knows neither the index that answered the ANN search nor the network it came over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from workloads.contract.http import SOURCES, CandidatesAnswer
from workloads.contract.tensors import PAD

Ids = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]
Proposals = tuple[Ids, Scores]
"""What one source proposes: item indices and its own scores, best first."""

SOURCE_INDEX: Mapping[str, int] = MappingProxyType({name: i for i, name in enumerate(SOURCES)})

WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"ann": 1.0, "item_to_item": 1.0, "history": 1.0, "lexical": 1.0, "vector": 1.0, "popular": 0.5}
)
"""Say of each source in the fused score where a bundle's `FeatureSchema.fusion` names no other."""

RANK_OFFSET: Final = 20.0
"""`k` of reciprocal rank fusion (Cormack, Clarke, Buettcher, SIGIR 2009); smaller trusts the top more."""

ITEM_TO_ITEM_LIMIT: Final = 400
"""Proposals that item-to-item makes at most."""
POPULAR_LIMIT: Final = 400
"""Popular items proposed at most: enough to fill a list for somebody unknown."""
ANN_LIMIT: Final = 400
ANN_LIMIT_MAX: Final = 1000


@dataclasses.dataclass(frozen=True)
class Candidates:
    """One request's candidates, best first by the fused score; all arrays have the same length."""

    items: Ids
    """Item indices of the bundle; never PAD, never twice."""
    scores: Scores
    """Fused score, the order of rung 3."""
    ann: Scores
    """Dot product of the user (or query) vector with the item's vector; 0 where there is no vector."""
    source: Ids
    """Index into `contract.http.SOURCES` of the source that lent the candidate most of its score."""

    @classmethod
    def of(
        cls, items: Sequence[int], scores: Sequence[float], ann: Sequence[float], source: Sequence[int]
    ) -> Candidates:
        """From plain numbers."""
        return cls(
            items=np.array(items, dtype=np.int32),
            scores=np.array(scores, dtype=np.float32),
            ann=np.array(ann, dtype=np.float32),
            source=np.array(source, dtype=np.int32),
        )

    @classmethod
    def read(cls, answer: CandidatesAnswer) -> Candidates:
        """What retrieval answered. Raises ValueError for columns that are not of one length."""
        items = np.frombuffer(answer.items, dtype="<i4")
        scores, ann = np.frombuffer(answer.scores, dtype="<f4"), np.frombuffer(answer.ann, dtype="<f4")
        source = np.frombuffer(answer.source, dtype="<i4")
        if not len(items) == len(scores) == len(ann) == len(source):
            raise ValueError("columns of different lengths")
        return cls(items=items, scores=scores, ann=ann, source=source)

    def answer(self, bundle: str, delta: int) -> CandidatesAnswer:
        """As retrieval answers, of an edition."""
        return CandidatesAnswer(
            bundle=bundle,
            delta=delta,
            items=self.items.astype("<i4", copy=False).tobytes(),
            scores=self.scores.astype("<f4", copy=False).tobytes(),
            ann=self.ann.astype("<f4", copy=False).tobytes(),
            source=self.source.astype("<i4", copy=False).tobytes(),
        )


def fuse(
    sources: Mapping[str, Proposals],
    vectors: npt.NDArray[np.float32],
    user_vector: npt.NDArray[np.float32] | None,
    exclude: Sequence[int] | npt.NDArray[np.integer[Any]],
    count: int,
    *,
    weights: Mapping[str, float] | None = None,
) -> Candidates:
    """At most `count` candidates by weighted reciprocal rank fusion of what the sources propose.

    `sources` maps names of `contract.http.SOURCES` to proposals, best first; `vectors` is the table
    [N+1, D], `user_vector` [D] the user's or query's, None where there is none. Items of `exclude`
    and PAD are never answered. `weights` overrides `WEIGHTS` source by source. Ties go to the lower
    item index. Raises KeyError on a source that the contract does not name.
    """
    ids_parts: list[Ids] = []
    gain_parts: list[npt.NDArray[Any]] = []
    source_parts: list[Ids] = []
    for name, (ids, _) in sources.items():
        weight = WEIGHTS[name] if weights is None else weights.get(name, WEIGHTS[name])
        ids_parts.append(np.asarray(ids, dtype=np.int32))
        gain_parts.append(weight / (RANK_OFFSET + np.arange(len(ids))))
        source_parts.append(np.full(len(ids), SOURCE_INDEX[name], dtype=np.int32))
    if not ids_parts:
        return _nobody()
    ids = np.concatenate(ids_parts)
    gains = np.concatenate(gain_parts)
    source = np.concatenate(source_parts)
    # Highest gain first within an item, so that the first row of an item names its source.
    order = np.lexsort((source, -gains, ids))
    ids, gains, source = ids[order], gains[order], source[order]
    first = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]) if len(ids) else np.empty(0, dtype=np.int64)
    if not len(first):
        return _nobody()
    items = ids[first]
    total = np.add.reduceat(gains, first)
    kept = items != PAD
    if len(exclude):
        kept &= ~np.isin(items, np.asarray(exclude, dtype=np.int32))
    items, total, lead = items[kept], total[kept], source[first][kept]
    best = np.lexsort((items, -total))[:count]
    items = items[best]
    if user_vector is None:
        ann = np.zeros(len(items), dtype=np.float32)
    else:
        ann = vectors[items] @ np.asarray(user_vector, dtype=np.float32)
    return Candidates(items=items, scores=total[best].astype(np.float32), ann=ann, source=lead[best])


def recommend_sources(
    history: npt.NDArray[np.integer[Any]],
    strengths: npt.NDArray[np.floating[Any]],
    ages: npt.NDArray[np.floating[Any]],
    *,
    ann: Proposals,
    neighbours: Ids,
    neighbour_scores: Scores,
    popular: Proposals,
    exclude: Sequence[int] | npt.NDArray[np.integer[Any]] = (),
) -> dict[str, Proposals]:
    """The sources of `/v1/recommend`: `ann` and `popular` as given, the others made from the history.

    `history` [n] is oldest first, `strengths` and `ages` (hours) go with it. `ann` are the
    `ann_count(len(exclude))` items nearest to the user's vector by dot product. `popular` comes from
    `popular_items`, made once per bundle. Items of `exclude` leave their places to others.
    """
    return {
        "ann": ann,
        "item_to_item": item_to_item_scores(history, strengths, ages, neighbours, neighbour_scores, exclude=exclude),
        "history": history_scores(history, strengths, ages),
        "popular": popular,
    }


def ann_count(excluded: int) -> int:
    """How many nearest items to ask the index for, when `excluded` items will be left out of the answer."""
    return min(ANN_LIMIT + excluded, ANN_LIMIT_MAX)


def item_to_item_scores(
    history: npt.NDArray[np.integer[Any]],
    strengths: npt.NDArray[np.floating[Any]],
    ages: npt.NDArray[np.floating[Any]],
    neighbours: Ids,
    neighbour_scores: Scores,
    *,
    limit: int = ITEM_TO_ITEM_LIMIT,
    exclude: Sequence[int] | npt.NDArray[np.integer[Any]] = (),
) -> Proposals:
    """Items that go with the history [n], best first, at most `limit`, none of `exclude`: the item-kNN of rung 4.

    An item's score is the sum over the history of (weight of the touch x `neighbour_scores` of the
    pair). `neighbours` and `neighbour_scores` are the tables [N+1, NEIGHBOURS].
    """
    dense = item_to_item_dense(history, strengths, ages, neighbours, neighbour_scores)
    if len(exclude):
        dense[np.asarray(exclude)] = 0.0
    ids = np.flatnonzero(dense)
    if len(ids) > limit:
        ids = ids[np.argpartition(-dense[ids], limit)[:limit]]
    order = np.lexsort((ids, -dense[ids]))
    ids = ids[order]
    return ids.astype(np.int32), dense[ids]


def item_to_item_dense(
    history: npt.NDArray[np.integer[Any]],
    strengths: npt.NDArray[np.floating[Any]],
    ages: npt.NDArray[np.floating[Any]],
    neighbours: Ids,
    neighbour_scores: Scores,
) -> Scores:
    """The item-to-item score of every item, [N+1]; PAD scores 0."""
    weight = touch_weights(strengths, ages)
    total = np.bincount(
        neighbours[history].ravel(),
        weights=(neighbour_scores[history] * weight[:, None]).ravel(),
        minlength=len(neighbours),
    ).astype(np.float32)
    total[PAD] = 0.0
    return total


def item_to_item_of(items: Ids, near: npt.NDArray[np.integer[Any]], gains: npt.NDArray[np.float64], of: int) -> Scores:
    """`item_to_item_dense` of some items [C] alone, none of them PAD or there twice: no sum over a whole catalogue.

    `near` are the neighbours of the whole history in a row and `gains` what each adds; all items are below `of`.
    """
    slot = np.zeros(of, dtype=np.int16)  # pages of it that nobody touches are never made, while it is small enough
    slot[items] = np.arange(1, len(items) + 1)
    return np.bincount(slot.take(near), weights=gains, minlength=len(items) + 1)[1:].astype(np.float32)


def history_scores(
    history: npt.NDArray[np.integer[Any]],
    strengths: npt.NDArray[np.floating[Any]],
    ages: npt.NDArray[np.floating[Any]],
) -> Proposals:
    """The history's own items as candidates to come back to, best first."""
    weight = touch_weights(strengths, ages)
    order = np.lexsort((np.arange(len(weight)), weight))[::-1]
    return np.asarray(history)[order].astype(np.int32), weight[order]


def popular_items(
    popularity_recent: Scores, popularity: Scores, in_stock: npt.NDArray[np.uint8], limit: int = POPULAR_LIMIT
) -> Proposals:
    """The `limit` items in stock most bought lately, all-time popularity deciding ties; best first."""
    order = np.lexsort((-popularity, -popularity_recent, in_stock == 0))
    order = order[(order != PAD) & (in_stock[order] != 0)][:limit]
    return order.astype(np.int32), popularity_recent[order]


def touch_weights(strengths: npt.NDArray[np.floating[Any]], ages: npt.NDArray[np.floating[Any]]) -> Scores:
    """How much each touch of a history says now: its strength, fading with its age in hours.

    The half-life of 30 days is that of seasonal taste; a floor keeps what was loved long ago.
    """
    fading = 0.2 + 0.8 * np.exp2(-np.asarray(ages, dtype=np.float32) / np.float32(24 * 30))
    weights: Scores = (np.asarray(strengths, dtype=np.float32) * fading).astype(np.float32, copy=False)
    return weights


def _nobody() -> Candidates:
    return Candidates(
        items=np.empty(0, dtype=np.int32),
        scores=np.empty(0, dtype=np.float32),
        ann=np.empty(0, dtype=np.float32),
        source=np.empty(0, dtype=np.int32),
    )
