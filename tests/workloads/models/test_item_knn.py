"""Neighbours by hand, in small shops where one can count."""

from __future__ import annotations

import numpy as np
import pytest

from workloads.contract.tensors import PAD
from workloads.models.item_knn import DAY_MS, ItemKnnConfig, Visits, fit

CUT = 1000 * DAY_MS
PLAIN = ItemKnnConfig(
    half_life_days=1e9, basket_damping=0.0, from_damping=0.5, to_damping=0.5, shrinkage=0.0, neighbours=3
)
"""The cosine of co-occurrence and nothing else."""


def visits(*rows: tuple[int, int, int, float]) -> Visits:
    """Of (person, visit, item, days before the cut)."""
    person, visit, item = (np.array([row[at] for row in rows], dtype=np.int64) for at in range(3))
    time = np.array([CUT - row[3] * DAY_MS for row in rows], dtype=np.int64)
    order = np.argsort(time, kind="stable")
    return Visits.of(person[order], visit[order], item[order], np.ones(len(rows), dtype=np.float32), time[order])


def pairs(found: tuple[np.ndarray, np.ndarray]) -> dict[tuple[int, int], float]:
    neighbours, scores = found
    return {
        (source, int(target)): float(score)
        for source in range(len(neighbours))
        for target, score in zip(neighbours[source], scores[source], strict=True)
        if target != PAD
    }


def test_two_baskets_give_the_cosine():
    log = visits((1, 1, 1, 5), (1, 1, 2, 5), (2, 2, 1, 4), (2, 2, 3, 4))
    found = pairs(fit(log, items=4, cut_ms=CUT, config=PLAIN))
    assert found == {
        (1, 2): pytest.approx(1 / np.sqrt(2)),
        (2, 1): pytest.approx(1 / np.sqrt(2)),
        (1, 3): pytest.approx(1 / np.sqrt(2)),
        (3, 1): pytest.approx(1 / np.sqrt(2)),
    }


def test_what_follows_counts_more_than_what_came_before():
    log = visits((1, 1, 1, 5), (1, 2, 2, 5))
    found = pairs(fit(log, items=2, cut_ms=CUT, config=PLAIN))
    assert found[2, 1] == pytest.approx(PLAIN.backwards * found[1, 2])


def test_a_pair_across_visits_fades_with_their_distance():
    near = pairs(fit(visits((1, 1, 1, 5), (1, 2, 2, 4)), items=2, cut_ms=CUT, config=PLAIN))
    far = pairs(fit(visits((1, 1, 1, 34), (1, 2, 2, 4)), items=2, cut_ms=CUT, config=PLAIN))
    assert far[1, 2] == pytest.approx(near[1, 2] * 2 ** (-29 / 30), rel=1e-5)


def test_an_old_meeting_counts_less_than_a_late_one():
    config = ItemKnnConfig(half_life_days=10, shrinkage=1.0)
    log = visits((1, 1, 1, 40), (1, 1, 2, 40), (2, 2, 1, 1), (2, 2, 3, 1))
    neighbours, _ = fit(log, items=3, cut_ms=CUT, config=config)
    assert neighbours[1, :2].tolist() == [3, 2]


def test_a_long_basket_says_less_about_each_of_its_pairs():
    config = ItemKnnConfig(half_life_days=1e9, basket_damping=1.0, from_damping=0.0, to_damping=0.0)
    short = pairs(fit(visits((1, 1, 1, 1), (1, 1, 2, 1)), items=5, cut_ms=CUT, config=config))
    long = pairs(fit(visits(*((1, 1, item, 1) for item in range(1, 6))), items=5, cut_ms=CUT, config=config))
    assert long[1, 2] < short[1, 2]


def test_items_further_apart_than_the_window_do_not_meet():
    config = ItemKnnConfig(window=2)
    found = pairs(fit(visits(*((1, 1, item, 1) for item in range(1, 6))), items=5, cut_ms=CUT, config=config))
    assert (1, 3) in found
    assert (1, 4) not in found


def test_an_item_is_never_its_own_neighbour_and_a_stranger_has_none():
    log = visits((1, 1, 1, 5), (1, 2, 1, 4), (1, 2, 2, 4))
    neighbours, scores = fit(log, items=3, cut_ms=CUT, config=PLAIN)
    assert all(source not in neighbours[source] for source in range(1, 4))
    assert not neighbours[3].any()
    assert not scores[PAD].any()


def test_an_item_seen_twice_in_a_visit_counts_once_at_its_strongest():
    time = np.full(3, CUT - DAY_MS)
    made = Visits.of(np.array([1, 1, 1]), np.array([1, 1, 1]), np.array([4, 4, 5]), np.float32([0.3, 1.0, 0.3]), time)
    assert made.item.tolist() == [4, 5]
    assert made.strength.tolist() == [1.0, pytest.approx(0.3)]


def test_visits_at_or_after_the_cut_are_refused():
    with pytest.raises(ValueError, match="know the future"):
        fit(visits((1, 1, 1, 0), (1, 1, 2, 5)), items=2, cut_ms=CUT, config=PLAIN)


def test_merging_pairs_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(0)
    log = visits(*((int(p), int(p), int(i), float(d)) for p, i, d in random.integers(1, 30, (400, 3))))
    whole = fit(log, items=30, cut_ms=CUT, config=ItemKnnConfig())
    monkeypatch.setattr("workloads.models.item_knn.MERGE_AT", 500)
    parts = fit(log, items=30, cut_ms=CUT, config=ItemKnnConfig())
    assert np.allclose(np.sort(whole[1], axis=1), np.sort(parts[1], axis=1), rtol=1e-5)


def test_no_visits_at_all_give_empty_tables():
    nothing = np.empty(0, dtype=np.int64)
    log = Visits.of(nothing, nothing, nothing, np.empty(0, dtype=np.float32), nothing)
    neighbours, scores = fit(log, items=3, cut_ms=CUT, config=ItemKnnConfig())
    assert neighbours.shape == (4, ItemKnnConfig().neighbours)
    assert not scores.any()
