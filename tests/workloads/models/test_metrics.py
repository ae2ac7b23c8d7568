"""Every metric against a number worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workloads.models import metrics


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_recall_is_the_share_of_relevant_items_found():
    assert metrics.recall_at(ints(5, 1, 9, 2), ints(1, 2, 3), 3) == pytest.approx(1 / 3)
    assert metrics.recall_at(ints(5, 1, 9, 2), ints(1, 2, 3), 4) == pytest.approx(2 / 3)


def test_a_hit_needs_one_relevant_item_within_k():
    assert metrics.hit_at(ints(5, 1, 9), ints(9), 2) == 0.0
    assert metrics.hit_at(ints(5, 1, 9), ints(9), 3) == 1.0


def test_ndcg_discounts_by_the_logarithm_of_the_place():
    # Relevant at places 2 and 4 of 4; the best list has them at 1 and 2.
    gained = 1 / math.log2(3) + 1 / math.log2(5)
    best = 1 / math.log2(2) + 1 / math.log2(3)
    assert metrics.ndcg_at(ints(7, 1, 8, 2), ints(1, 2), 4) == pytest.approx(gained / best)


def test_ndcg_of_a_perfect_list_is_one_even_with_more_relevant_items_than_places():
    assert metrics.ndcg_at(ints(1, 2), ints(1, 2, 3), 2) == pytest.approx(1.0)


def test_ndcg_of_a_list_shorter_than_k_counts_what_is_there():
    assert metrics.ndcg_at(ints(4), ints(4, 5), 10) == pytest.approx(1.0 / (1.0 + 1 / math.log2(3)))


def test_means_and_coverage_are_over_all_requests():
    lists, relevant = [ints(1, 2), ints(3, 1)], [ints(1), ints(4)]
    found = metrics.list_metrics(lists, relevant, ks=(1, 2), items=10, coverage_k=2)
    assert found["recall@1"] == 0.5
    assert found["hr@2"] == 0.5
    assert found["coverage@2"] == pytest.approx(3 / 10)


def test_no_request_at_all_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="nothing can be measured"):
        metrics.list_metrics([], [], ks=(10,), items=5, coverage_k=10)


def test_a_request_without_relevant_items_is_an_error():
    with pytest.raises(ValueError, match="leave it out"):
        metrics.list_metrics([ints(1)], [ints()], ks=(10,), items=5, coverage_k=10)


def test_auc_counts_pairs_in_the_right_order_and_ties_as_half():
    labels = ints(1, 0, 1, 0)
    scores = np.array([0.9, 0.9, 0.4, 0.1])
    # Pairs: (0.9, 0.9) tie, (0.9, 0.1) right, (0.4, 0.9) wrong, (0.4, 0.1) right.
    assert metrics.auc(labels, scores) == pytest.approx(2.5 / 4)


def test_auc_of_one_kind_of_label_is_not_a_number():
    assert math.isnan(metrics.auc(ints(1, 1), np.array([0.1, 0.2])))


def test_log_loss_is_the_mean_surprise_in_nats():
    found = metrics.log_loss(ints(1, 0), np.array([0.8, 0.4]))
    assert found == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)


def test_a_certain_mistake_costs_much_but_not_infinity():
    assert 10 < metrics.log_loss(ints(1), np.array([0.0])) < 20


def test_calibration_compares_predicted_with_observed_sums():
    assert metrics.calibration(ints(1, 0, 0, 1), np.array([0.5, 0.25, 0.25, 0.5])) == pytest.approx(0.75)
    assert math.isnan(metrics.calibration(ints(0, 0), np.array([0.5, 0.5])))


def test_reliability_bins_hold_equal_shares_in_order_of_prediction():
    labels = ints(0, 1, 0, 1)
    bins = metrics.reliability(labels, np.array([0.1, 0.8, 0.2, 0.9]), bins=2)
    assert bins == [(pytest.approx(0.15), 0.0, 2), (pytest.approx(0.85), 1.0, 2)]
