"""Popularity: people, not clicks, over all time; strength lately; habits in order."""

from __future__ import annotations

import numpy as np
import pytest

from workloads.models import popularity
from workloads.models.popularity import DAY_MS


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_one_eager_person_counts_once():
    shares = popularity.all_time(ints(1, 1, 1, 2, 3), ints(1, 1, 1, 2, 2), items=3)
    assert shares.tolist() == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0]


def test_recent_popularity_sees_thirty_days_and_weighs_by_strength():
    cut = 100 * DAY_MS
    shares = popularity.recent(
        ints(1, 2, 3), np.float32([1.0, 1.0, 0.5]), ints(69, 71, 99) * DAY_MS, items=3, cut_ms=cut
    )
    assert shares.tolist() == [0.0, 0.0, pytest.approx(2 / 3), pytest.approx(1 / 3)]


def test_recent_popularity_refuses_the_future():
    with pytest.raises(ValueError, match="know the future"):
        popularity.recent(ints(1), np.float32([1.0]), ints(100), items=1, cut_ms=100)


def test_shares_within_a_category_add_up_to_one():
    shares = popularity.within_category(np.float32([0, 0.3, 0.1, 0.6]), np.int32([0, 1, 1, 2]))
    assert shares.tolist() == [0.0, pytest.approx(0.75), pytest.approx(0.25), 1.0]


def test_habits_go_from_bought_most_to_touched_most_and_popularity_decides_ties():
    order = popularity.personal_frequency(
        np.int32([1, 2, 3, 4]), np.float32([1, 2, 1, 0]), np.float32([1, 2, 1, 9]), np.float32([0, 0.1, 0, 0.2, 0])
    )
    assert order.tolist() == [2, 3, 1, 4]
