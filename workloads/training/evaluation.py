"""The quality table: every recommender on the same test requests, and what the table says in words.

A test request is the first visit of a person after the boundary; what is known is what happened
strictly before it, item tables and models stop at the boundary. `novel` asks for items that the person
had not bought, `repeats` for all, `search` for the item clicked after a query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from workloads.contract.quality import Protocol, QualityRow, RankerQuality
from workloads.contract.tensors import PAD
from workloads.data.features import UserState, raw_features
from workloads.data.fusion import item_to_item_dense, touch_weights
from workloads.models import metrics, popularity
from workloads.models.ladder import ASKED, PROTOCOLS, K, RankedLists
from workloads.training.lists import NOTHING, Items, Shop, nearest
from workloads.training.requests import Requests

Floats = npt.NDArray[np.float32]

KS: Final = (10, 20)
COVERAGE_K: Final = 20
SHOWN: Final = max(KS)
RUNGS: Final = {"ours": 1, "fused": 3, "traditional": 4}


@dataclasses.dataclass(frozen=True)
class Asked:
    """Requests with the state and the user vector behind each."""

    requests: Requests
    states: Sequence[UserState]
    users: Floats

    def __len__(self) -> int:
        return len(self.requests)


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """One request's candidates as the ranker read them."""

    protocol: Protocol
    items: Items
    sparse: npt.NDArray[np.integer[Any]]
    dense: Floats
    wanted: Items
    traditional: float
    """NDCG@10 of rung 4's list."""


Score = Callable[[npt.NDArray[np.int64], Floats], Floats]
"""The ranker: sparse and raw dense features to probabilities."""


def knn_order(shop: Shop, state: UserState, exclude: Items, boost: float) -> Items:
    """Item-kNN by itself: neighbours of the history, its own items lifted by `boost` neighbours, then popular ones."""
    tables = shop.tables
    scores = item_to_item_dense(
        state.items, state.strength, state.age_hours, tables.neighbours, tables.neighbour_scores
    )
    scores[state.items] += boost * tables.neighbour_scores.max() * touch_weights(state.strength, state.age_hours)
    scores[exclude] = 0.0
    found = np.flatnonzero(scores)
    found = found[np.argsort(-scores[found], kind="stable")]
    return _filled(found, shop.popular[0], exclude)


def table(
    shop: Shop, asked: Asked, score: Score, *, knn_boost: float, heard: Callable[[int], None]
) -> tuple[list[QualityRow], RankerQuality, RankedLists]:
    """A row per recommender and protocol, the ranker's pointwise quality on its lists of `novel`, and all its lists."""
    tables = shop.tables
    by_popularity = _ordered(tables.popularity)
    by_recent = _ordered(tables.popularity_recent)
    lists: dict[tuple[str, Protocol], list[Items]] = {}
    relevant: dict[Protocol, list[Items]] = {protocol: [] for protocol in PROTOCOLS}
    pending: list[_Ranked] = []
    kept: list[_Ranked] = []
    judged: list[tuple[npt.NDArray[np.int8], Floats]] = []

    def rank() -> None:
        """Score the pending lists in one batch: the ranker is quicker on many rows."""
        if not pending:
            return
        answers = score(np.concatenate([p.sparse for p in pending]), np.concatenate([p.dense for p in pending]))
        at = 0
        for one in pending:
            own = answers[at : at + len(one.sparse)]
            at += len(one.sparse)
            order = np.argsort(-own, kind="stable")[:SHOWN]
            lists.setdefault(("ours", one.protocol), []).append(one.items[order])
            if one.protocol == "novel":
                judged.append((np.isin(one.items, one.wanted).astype(np.int8), own))
            kept.append(dataclasses.replace(one, sparse=one.sparse.astype(np.int32)))
        pending.clear()

    for number, (state, vector, ann) in enumerate(
        zip(asked.states, asked.users, nearest(tables.vectors, asked.users), strict=True)
    ):
        wanted = asked.requests.wanted(number)
        for protocol in PROTOCOLS:
            exclude: Items = state.bought_items if protocol == "novel" else NOTHING
            left = wanted[~np.isin(wanted, exclude)]
            if not len(left):
                continue
            relevant[protocol].append(left)
            found = shop.candidates(state, vector, ann, exclude)
            habit = popularity.personal_frequency(state.items, state.bought, state.count, tables.popularity)
            answers: dict[str, Items] = {
                "popularity": _filled(NOTHING, by_popularity, exclude),
                "popularity_30d": _filled(NOTHING, by_recent, exclude),
                "personal_frequency": _filled(habit, by_popularity, exclude),
                "item_knn": knn_order(shop, state, exclude, knn_boost),
                "traditional": knn_order(shop, state, exclude, 0.0),
                "two_tower": ann[0][~np.isin(ann[0], exclude)][:SHOWN],
                "fused": found.items[:SHOWN],
            }
            for name, items in answers.items():
                lists.setdefault((name, protocol), []).append(items)
            sparse, dense = raw_features(state, found, tables)
            worth = metrics.ndcg_at(answers["traditional"], left, K)
            pending.append(_Ranked(protocol, found.items, sparse, dense, left, worth))
        if len(pending) >= 128:
            rank()
        heard(number + 1)
    rank()
    rows = [
        QualityRow(
            name=name,
            protocol=protocol,
            rung=RUNGS.get(name),
            metrics=metrics.list_metrics(
                shown, relevant[protocol], ks=KS, items=len(tables.category) - 1, coverage_k=COVERAGE_K
            ),
            requests=len(shown),
        )
        for (name, protocol), shown in sorted(lists.items(), key=lambda entry: (entry[0][1], entry[0][0]))
    ]
    return rows, ranker_quality(judged), _joined(kept)


def _joined(kept: Sequence[_Ranked]) -> RankedLists:
    """Of at least one list."""
    return RankedLists(
        protocol=np.array([PROTOCOLS.index(one.protocol) for one in kept], dtype=np.int8),
        offsets=np.r_[0, np.cumsum([len(one.items) for one in kept])].astype(np.int64),
        sparse=np.concatenate([one.sparse for one in kept]).astype(np.int32),
        dense=np.concatenate([one.dense for one in kept]),
        wanted=np.concatenate([one.wanted for one in kept]).astype(np.int32),
        wanted_offsets=np.r_[0, np.cumsum([len(one.wanted) for one in kept])].astype(np.int64),
        traditional=np.array([one.traditional for one in kept], dtype=np.float32),
    )


def ranker_quality(judged: Sequence[tuple[npt.NDArray[np.int8], Floats]]) -> RankerQuality:
    """Pointwise quality over all rows of (labels, probabilities) per list."""
    labels = np.concatenate([label for label, _ in judged]) if judged else np.empty(0, dtype=np.int8)
    answers = np.concatenate([own for _, own in judged]) if judged else np.empty(0, dtype=np.float32)
    if not 0 < int(labels.sum()) < len(labels):
        raise ValueError("the test lists hold no wanted candidate, or nothing else: the ranker cannot be judged")
    return RankerQuality(
        auc=metrics.auc(labels, answers),
        log_loss=metrics.log_loss(labels, answers),
        calibration=metrics.calibration(labels, answers),
        base_rate=float(labels.mean()),
        rows=len(labels),
        reliability=metrics.reliability(labels, answers),
    )


def search_rows(shop: Shop, queries: Floats, wanted: npt.NDArray[np.int64]) -> list[QualityRow]:
    """Rows of the `search` protocol: query vectors [Q, D] against the item [Q] that was clicked."""
    relevant: list[Items] = [wanted[at : at + 1] for at in range(len(wanted))]
    popular = _ordered(shop.tables.popularity)[:SHOWN]
    answers: dict[str, list[Items]] = {
        "popularity": [popular] * len(wanted),
        "two_tower": [ids for ids, _ in nearest(shop.tables.vectors, queries, count=SHOWN)],
    }
    return [
        QualityRow(
            name=name,
            protocol="search",
            metrics=metrics.list_metrics(
                shown, relevant, ks=KS, items=len(shop.tables.category) - 1, coverage_k=COVERAGE_K
            ),
            requests=len(wanted),
        )
        for name, shown in answers.items()
    ]


def statements(rows: Sequence[QualityRow]) -> list[str]:
    """The table in plain words, made from it."""
    cells = {(row.name, row.protocol): row for row in rows}
    said = []
    for protocol in PROTOCOLS:
        ours = cells.get(("ours", protocol))
        if ours is None:
            continue
        own = ours.metrics["recall@20"]
        said.append(
            f"Asked for {ASKED[protocol]}, ours finds {own:.1%} of them in 20 places ({ours.requests} requests)."
        )
        others = {"item_knn": "item-kNN", "popularity_30d": "the popularity of the last 30 days"}
        others |= (
            {"personal_frequency": "the person's own habits"} if protocol == "repeats" else {"popularity": "popularity"}
        )
        for name, called in others.items():
            other = cells[name, protocol].metrics["recall@20"]
            if other > 0:
                verdict = "BELOW" if own < other else "above"
                said.append(
                    f"Asked for {ASKED[protocol]}, ours is {verdict} {called}: {own / other:.2f} times its {other:.4f}."
                )
        fused = cells["fused", protocol].metrics["recall@20"]
        if own < fused:
            said.append(
                f"Asked for {ASKED[protocol]}, the ranker loses to the order it is given: {own:.4f} after {fused:.4f}."
            )
    search = cells.get(("two_tower", "search"))
    if search is not None:
        said.append(
            f"The query tower alone finds the item behind a query in {search.metrics['recall@20']:.1%} of "
            f"{search.requests} searches; serving adds a lexical search, which is not in this table."
        )
    return said


def _ordered(scores: Floats) -> Items:
    """Items by falling score, PAD left out; ties go to the lower index."""
    order = np.argsort(-scores, kind="stable")
    items: Items = order[order != PAD]
    return items


def _filled(items: Items, others: Items, exclude: Items) -> Items:
    """The first SHOWN of `items`, then of `others`, none excluded and none twice."""
    exclude_all: npt.NDArray[Any] = np.asarray(exclude)
    items = items[~np.isin(items, exclude_all)][:SHOWN]
    if len(items) < SHOWN:
        near = others[: SHOWN + len(exclude_all) + len(items)]
        more = near[~np.isin(near, exclude_all) & ~np.isin(near, items)]
        items = np.concatenate((items, more[: SHOWN - len(items)]))
    return items
