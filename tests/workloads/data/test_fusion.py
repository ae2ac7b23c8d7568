"""Fusion: every source's say counted once, what is excluded stays out, the same answer every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.contract.http import SOURCES
from workloads.contract.tensors import PAD
from workloads.data import fusion
from workloads.data.fusion import (
    RANK_OFFSET,
    Proposals,
    ann_count,
    fuse,
    history_scores,
    item_to_item_scores,
    popular_items,
    recommend_sources,
    touch_weights,
)

VECTORS = np.random.default_rng(0).normal(size=(21, 8)).astype(np.float32)
ONE = {"ann": 1.0, "item_to_item": 1.0, "popular": 1.0, "history": 1.0}


def proposals(*items: int) -> Proposals:
    return np.array(items, dtype=np.int32), np.linspace(1, 0, len(items)).astype(np.float32)


def test_an_item_that_two_sources_propose_gets_both_gains():
    found = fuse({"ann": proposals(3, 5), "popular": proposals(5, 7)}, VECTORS, VECTORS[1], [], 10, weights=ONE)
    assert found.items.tolist() == [5, 3, 7]
    assert found.scores[0] == pytest.approx(1 / (RANK_OFFSET + 1) + 1 / RANK_OFFSET)
    assert SOURCES[found.source[0]] == "popular", "the source that lent it most"
    assert found.ann.tolist() == pytest.approx((VECTORS[[5, 3, 7]] @ VECTORS[1]).tolist())


def test_weights_decide_between_sources():
    sources = {"ann": proposals(3), "popular": proposals(7)}
    assert fuse(sources, VECTORS, None, [], 1, weights=ONE | {"popular": 2.0}).items.tolist() == [7]
    assert fuse(sources, VECTORS, None, [], 1, weights=ONE | {"ann": 2.0}).items.tolist() == [3]


def test_a_weight_that_a_bundle_does_not_name_is_the_default():
    sources = {"ann": proposals(3), "popular": proposals(7)}
    some, default = fuse(sources, VECTORS, None, [], 2, weights={}), fuse(sources, VECTORS, None, [], 2)
    assert some.scores.tolist() == default.scores.tolist()


def test_padding_and_excluded_items_are_never_candidates():
    found = fuse({"ann": proposals(PAD, 3, 5, 7)}, VECTORS, VECTORS[1], [5], 10)
    assert found.items.tolist() == [3, 7]


def test_without_a_vector_the_ann_score_is_zero():
    assert fuse({"popular": proposals(3)}, VECTORS, None, [], 5).ann.tolist() == [0.0]


def test_nothing_proposed_is_an_empty_list():
    for sources in ({}, {"ann": proposals()}, {"ann": proposals(PAD)}):
        assert len(fuse(sources, VECTORS, VECTORS[1], [], 5).items) == 0


def test_a_source_that_the_contract_does_not_name_is_refused():
    with pytest.raises(KeyError):
        fuse({"magic": proposals(3)}, VECTORS, None, [], 5)


@given(
    st.dictionaries(
        st.sampled_from(SOURCES),
        st.lists(st.integers(0, 20), max_size=20, unique=True).map(lambda ids: proposals(*ids)),
    ),
    st.lists(st.integers(0, 20), max_size=5),
    st.integers(1, 25),
)
def test_a_list_is_distinct_ordered_no_longer_than_asked_and_free_of_what_is_excluded(
    sources: dict[str, Proposals], exclude: list[int], count: int
):
    found = fuse(sources, VECTORS, VECTORS[2], exclude, count)
    assert len(set(found.items.tolist())) == len(found.items) <= count
    assert not set(found.items.tolist()) & {PAD, *exclude}
    assert (np.diff(found.scores) <= 0).all()
    proposed = {int(item) for ids, _ in sources.values() for item in ids} - {PAD, *exclude}
    assert len(found.items) == min(count, len(proposed))
    shuffled = dict(reversed(sources.items()))
    assert found.items.tolist() == fuse(shuffled, VECTORS, VECTORS[2], exclude, count).items.tolist()


def tables(**rows: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Of i<item>={neighbour: score}, for items 0 to 9."""
    neighbours, scores = np.zeros((10, 4), dtype=np.int32), np.zeros((10, 4), dtype=np.float32)
    for name, found in rows.items():
        for place, (item, score) in enumerate(found.items()):
            neighbours[int(name[1:]), place], scores[int(name[1:]), place] = item, score
    return neighbours, scores


def test_item_to_item_adds_up_what_each_touch_says():
    neighbours, scores = tables(i1={3: 0.5, 4: 0.2}, i2={4: 0.4})
    ids, found = item_to_item_scores(
        np.array([1, 2]), np.float32([1.0, 0.5]), np.float32([0.0, 0.0]), neighbours, scores
    )
    assert ids.tolist() == [3, 4]
    assert found.tolist() == [pytest.approx(0.5), pytest.approx(0.4)]


def test_item_to_item_gives_the_place_of_an_excluded_item_to_the_next():
    neighbours, scores = tables(i1={3: 0.5, 4: 0.2, 5: 0.1})
    ids, _ = item_to_item_scores(
        np.array([1]), np.float32([1]), np.float32([0]), neighbours, scores, limit=2, exclude=[3]
    )
    assert ids.tolist() == [4, 5]


def test_an_empty_history_proposes_nothing():
    neighbours, scores = tables(i1={3: 0.5})
    nothing = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32), np.empty(0, dtype=np.float32)
    assert len(item_to_item_scores(*nothing, neighbours, scores)[0]) == 0
    assert len(history_scores(*nothing)[0]) == 0


def test_a_touch_fades_with_age_but_is_never_forgotten():
    weights = touch_weights(np.float32([1, 1, 1]), np.float32([0, 30 * 24, 1e6]))
    assert weights.tolist() == [pytest.approx(1.0), pytest.approx(0.6), pytest.approx(0.2)]


def test_history_comes_back_strongest_first_and_the_later_of_equals_first():
    ids, _ = history_scores(np.array([4, 5, 6]), np.float32([1.0, 2.0, 1.0]), np.float32([10, 10, 10]))
    assert ids.tolist() == [5, 6, 4]


def test_popular_items_are_in_stock_and_lately_popular():
    recent, ever = np.float32([9, 0.1, 0.5, 0.5, 0.9]), np.float32([9, 0.9, 0.1, 0.2, 0.1])
    ids, scores = popular_items(recent, ever, np.array([1, 1, 1, 1, 0], dtype=np.uint8), 3)
    assert ids.tolist() == [3, 2, 1]
    assert scores.tolist() == [0.5, 0.5, pytest.approx(0.1)]


def test_the_index_is_asked_for_more_where_more_will_be_left_out():
    assert ann_count(0) < ann_count(200) <= fusion.ANN_LIMIT_MAX == ann_count(10_000)


def test_recommend_sources_are_named_in_the_contract():
    neighbours, scores = tables(i1={3: 0.5})
    found = recommend_sources(
        np.array([1]),
        np.float32([1]),
        np.float32([0]),
        ann=proposals(7),
        neighbours=neighbours,
        neighbour_scores=scores,
        popular=proposals(8),
    )
    assert set(found) <= set(SOURCES)
    assert found["item_to_item"][0].tolist() == [3]
    assert found["history"][0].tolist() == [1]
