"""The quality table: every row by its own rule, nothing excluded in any list, and honest words."""

from __future__ import annotations

import numpy as np
import pytest

from workloads.contract.quality import Protocol, QualityRow
from workloads.contract.tensors import NEIGHBOURS, VECTOR_DIM
from workloads.data.features import DAY_MS, EVENT_TYPES, ItemTables, UserState
from workloads.models.ladder import PROTOCOLS, measure
from workloads.training.evaluation import Asked, knn_order, ranker_quality, search_rows, statements, table
from workloads.training.lists import NOTHING, Shop
from workloads.training.requests import Requests

ITEMS = 60
NOW = 1_800_000_000_000
PURCHASE = next(code for code, kind in enumerate(EVENT_TYPES) if kind.value == "purchase")


@pytest.fixture(scope="module")
def shop() -> Shop:
    """Item i + 1 is less popular than item i; lately it is the other way round; 1 and 41 go together."""
    falling = np.r_[0.0, np.arange(ITEMS, 0, -1)].astype(np.float32)
    rising = np.r_[0.0, np.arange(1, ITEMS + 1)].astype(np.float32)
    neighbours = np.zeros((ITEMS + 1, NEIGHBOURS), dtype=np.int32)
    scores = np.zeros((ITEMS + 1, NEIGHBOURS), dtype=np.float32)
    neighbours[1, 0], scores[1, 0] = 41, 0.5
    vectors = np.zeros((ITEMS + 1, VECTOR_DIM), dtype=np.float32)
    vectors[1:, 0] = np.arange(ITEMS)
    return Shop.of(
        ItemTables.of(
            {
                "vectors": vectors,
                "category": np.ones(ITEMS + 1, dtype=np.int32),
                "price": np.ones(ITEMS + 1, dtype=np.float32),
                "price_band": np.ones(ITEMS + 1, dtype=np.int32),
                "popularity": falling / falling.sum(),
                "popularity_recent": rising / rising.sum(),
                "popularity_category": falling / falling.sum(),
                "first_seen_ms": np.zeros(ITEMS + 1, dtype=np.int64),
                "in_stock": np.ones(ITEMS + 1, dtype=np.uint8),
                "neighbours": neighbours,
                "neighbour_scores": scores,
            }
        ),
        {},
    )


def state(*bought: int) -> UserState:
    items = np.array(bought, dtype=np.int64)
    times = NOW - (len(items) - np.arange(len(items))) * DAY_MS
    return UserState.from_events(items, np.full(len(items), PURCHASE), times, NOW)


def test_knn_offers_neighbours_then_what_is_popular_and_lifts_the_history_only_when_told(shop: Shop):
    assert knn_order(shop, state(1), NOTHING, 0.0)[:2].tolist() == [41, ITEMS]
    assert knn_order(shop, state(1), NOTHING, 3.0)[:2].tolist() == [1, 41]
    without = knn_order(shop, state(1), np.array([1, 41]), 3.0)
    assert len(without) == 20
    assert not {1, 41} & set(without.tolist())


def asked(*rows: tuple[UserState, list[int]]) -> Asked:
    offsets = np.r_[0, np.cumsum([len(items) for _, items in rows])]
    numbers = np.arange(len(rows))
    requests = Requests(
        numbers, np.full(len(rows), NOW), numbers, offsets, np.concatenate([items for _, items in rows])
    )
    return Asked(requests, [row for row, _ in rows], np.ones((len(rows), VECTOR_DIM), dtype=np.float32))


def by_item(sparse: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """A ranker that loves item 50 most."""
    del dense
    return np.exp(-np.abs(sparse[:, 0] - 50.0) / 50).astype(np.float32)


def test_each_recommender_is_judged_by_its_own_list(shop: Shop):
    rows, *_ = table(shop, asked((state(1, 2), [1, 41, 50])), by_item, knn_boost=3.0, heard=lambda _: None)
    recall = {(row.name, row.protocol): row.metrics["recall@10"] for row in rows}
    # Popular is 1 to 10, lately 60 to 51, and 59 has the largest vector.
    assert recall["popularity", "repeats"] == pytest.approx(1 / 3)
    assert recall["popularity", "novel"] == 0
    assert recall["popularity_30d", "repeats"] == 0
    assert recall["personal_frequency", "repeats"] == pytest.approx(1 / 3)
    assert recall["item_knn", "repeats"] == pytest.approx(2 / 3)
    assert recall["traditional", "novel"] == pytest.approx(1 / 2)
    assert recall["two_tower", "novel"] == 0
    assert recall["ours", "novel"] == pytest.approx(1 / 2)
    assert {row.name: row.rung for row in rows if row.rung} == {"ours": 1, "fused": 3, "traditional": 4}


def test_a_request_with_nothing_new_is_no_novel_request(shop: Shop):
    rows, *_ = table(shop, asked((state(1), [1]), (state(2), [1, 30])), by_item, knn_boost=0.0, heard=lambda _: None)
    counts = {row.protocol: row.requests for row in rows}
    assert counts == {"novel": 1, "repeats": 2}


def test_the_ranker_is_judged_on_the_lists_that_it_ranked(shop: Shop):
    _, quality, _ = table(shop, asked((state(1), [50]), (state(2), [49])), by_item, knn_boost=0.0, heard=lambda _: None)
    assert quality.auc > 0.95
    assert quality.rows == 2 * (ITEMS - 1)
    assert sum(count for _, _, count in quality.reliability) == quality.rows


def test_the_lists_that_were_ranked_are_kept_with_what_was_wanted_and_what_rung_four_was_worth(shop: Shop):
    rows, _, lists = table(
        shop, asked((state(1), [1]), (state(2), [2, 30, 41])), by_item, knn_boost=0.0, heard=lambda _: None
    )
    assert [PROTOCOLS[number] for number in lists.protocol] == ["repeats", "novel", "repeats"]
    assert [lists.wanted_of(place).tolist() for place in range(3)] == [[1], [30, 41], [2, 30, 41]]
    assert 2 not in lists.sparse[lists.rows(1), 0], "bought before, and not asked for"
    gain = {(row.name, row.protocol): row.metrics["ndcg@10"] for row in rows}
    assert lists.traditional[1] == pytest.approx(gain["traditional", "novel"])
    scores = by_item(lists.sparse, lists.dense)
    for rung in measure(lists, {1: scores, 2: scores}):
        name = {1: "ours", 2: "ours", 3: "fused", 4: "traditional"}[rung.rung]
        assert rung.ndcg_at_10 == pytest.approx(gain[name, rung.protocol]), (rung.rung, rung.protocol)


def test_a_ranker_that_met_no_wanted_candidate_is_not_judged():
    with pytest.raises(ValueError, match="cannot be judged"):
        ranker_quality([(np.zeros(4, dtype=np.int8), np.ones(4, dtype=np.float32))])


def test_a_query_is_judged_by_the_item_behind_it(shop: Shop):
    queries = np.zeros((2, VECTOR_DIM), dtype=np.float32)
    queries[0, 0], queries[1, 0] = 1.0, -1.0  # far end and near end of the line of items
    rows = {row.name: row for row in search_rows(shop, queries, np.array([ITEMS, ITEMS]))}
    assert rows["two_tower"].metrics["recall@10"] == 0.5
    assert rows["popularity"].metrics["recall@10"] == 0.0
    assert rows["two_tower"].protocol == "search"


def row(name: str, recall: float, protocol: Protocol = "novel") -> QualityRow:
    return QualityRow(name=name, protocol=protocol, metrics={"recall@20": recall}, requests=100)


def rows_where(ours: float, knn: float) -> list[QualityRow]:
    return [
        row(name, value, protocol)
        for protocol in ("novel", "repeats")
        for name, value in {
            "ours": ours,
            "item_knn": knn,
            "fused": 0.1,
            "popularity": 0.05,
            "popularity_30d": 0.05,
            "personal_frequency": 0.05,
        }.items()
    ]


def test_the_words_say_below_when_ours_is_below_the_knn():
    said = " ".join(statements(rows_where(0.10, 0.20)))
    assert "BELOW item-kNN: 0.50 times its 0.2000" in said
    assert "BELOW" not in " ".join(statements(rows_where(0.30, 0.20)))


def test_the_words_say_when_the_ranker_loses_to_what_it_is_given():
    assert "the ranker loses" in " ".join(statements(rows_where(0.09, 0.01)))
    assert "the ranker loses" not in " ".join(statements(rows_where(0.10, 0.01)))
