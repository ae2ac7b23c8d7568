"""What an answer may hold, for any ranking: properties."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from workloads.gateway.rules import CATEGORY_SHARE, choose, fill, showable

ITEMS = 60

Ints = npt.NDArray[np.int32]

rankings = st.lists(st.integers(1, ITEMS), unique=True, max_size=ITEMS).map(lambda ids: np.array(ids, dtype=np.int32))
excluded = st.lists(st.integers(0, ITEMS), max_size=20).map(lambda ids: np.array(ids, dtype=np.int32))
stocks = st.lists(st.booleans(), min_size=ITEMS + 1, max_size=ITEMS + 1).map(np.array)
categories = st.lists(st.integers(0, 3), min_size=ITEMS + 1, max_size=ITEMS + 1).map(
    lambda kinds: np.array(kinds, dtype=np.int32)
)
sizes = st.integers(1, 30)


@given(rankings, sizes, stocks, excluded, categories)
def test_an_answer_holds_only_what_may_be_shown_in_the_order_of_the_ranking(
    ranked: Ints, k: int, in_stock: npt.NDArray[np.bool_], exclude: Ints, category: Ints
):
    shown = showable(in_stock, exclude)
    for places in (choose(ranked, k, shown), choose(ranked, k, shown, category)):
        chosen = ranked[places]
        assert len(chosen) <= k
        assert (np.diff(places) > 0).all()
        assert in_stock[chosen].all()
        assert not set(chosen.tolist()) & {0, *exclude.tolist()}


@given(rankings, sizes, stocks, excluded, categories)
def test_variety_never_makes_an_answer_shorter(
    ranked: Ints, k: int, in_stock: npt.NDArray[np.bool_], exclude: Ints, category: Ints
):
    shown = showable(in_stock, exclude)
    assert len(choose(ranked, k, shown, category)) == len(choose(ranked, k, shown))


@given(rankings, sizes, stocks, excluded, categories)
def test_a_category_is_over_its_share_only_where_nothing_else_is_left(
    ranked: Ints, k: int, in_stock: npt.NDArray[np.bool_], exclude: Ints, category: Ints
):
    shown = showable(in_stock, exclude)
    chosen = ranked[choose(ranked, k, shown, category)]
    most = max(1, math.ceil(CATEGORY_SHARE * k))
    over = {kind for kind, times in Counter(category[chosen].tolist()).items() if kind and times > most}
    left = set(ranked[shown[ranked]].tolist()) - set(chosen.tolist())
    if over:
        # Everything that could have come instead is itself of a category that is at its share.
        full = {kind for kind, times in Counter(category[chosen].tolist()).items() if kind and times >= most}
        assert all(int(category[item]) in full for item in left)


@given(rankings, sizes, stocks, excluded)
def test_without_variety_the_best_that_may_be_shown_are_answered(
    ranked: Ints, k: int, in_stock: npt.NDArray[np.bool_], exclude: Ints
):
    shown = showable(in_stock, exclude)
    assert ranked[choose(ranked, k, shown)].tolist() == [item for item in ranked.tolist() if shown[item]][:k]


@given(rankings, rankings, sizes, stocks, excluded)
def test_popular_items_fill_what_is_short_and_repeat_nothing(
    ranked: Ints, popular: Ints, k: int, in_stock: npt.NDArray[np.bool_], exclude: Ints
):
    shown = showable(in_stock, exclude)
    chosen = ranked[choose(ranked, k, shown)]
    filled = fill(chosen, k, popular, shown)
    together = [*chosen.tolist(), *filled.tolist()]
    assert len(together) == len(set(together)) <= k
    assert shown[np.array(together, dtype=np.int32)].all()
    able = {item for item in popular.tolist() if shown[item]} | set(chosen.tolist())
    assert len(together) == min(k, len(able))


def test_an_unknown_category_is_no_category_to_be_capped():
    ranked = np.arange(1, 11, dtype=np.int32)
    shown = showable(np.ones(11, dtype=np.bool_), np.empty(0, dtype=np.int32))
    assert choose(ranked, 5, shown, np.zeros(11, dtype=np.int32)).tolist() == [0, 1, 2, 3, 4]


def test_one_category_cannot_fill_an_answer_while_another_has_items():
    ranked = np.arange(1, 21, dtype=np.int32)
    category = np.array([0, *[1] * 15, *[2] * 5], dtype=np.int32)
    shown = showable(np.ones(21, dtype=np.bool_), np.empty(0, dtype=np.int32))
    kinds = category[ranked[choose(ranked, 10, shown, category)]].tolist()
    assert kinds == [1] * 6 + [2] * 4


def test_showing_one_request_leaves_the_stock_of_the_next_alone():
    in_stock = np.ones(5, dtype=np.bool_)
    showable(in_stock, np.array([2, 3], dtype=np.int32))
    assert in_stock.all()
