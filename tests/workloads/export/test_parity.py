"""Comparison of exported with trained models: what passes, what does not, and what the sentence says."""

import numpy as np
import pytest

from workloads.export.parity import Limits, ParityFault, compare, top_k_agreement, vector_limit

RANDOM = np.random.default_rng(0)
OUTPUTS = RANDOM.normal(size=(40, 8))
SCORES = RANDOM.normal(size=(40, 100))


def _compare(exported: np.ndarray, scores: np.ndarray = SCORES, limit: float = 1e-4) -> float:
    parity = compare("tower", trained=OUTPUTS, exported=exported, scores=(SCORES, scores), limits=Limits(limit))
    return parity.max_abs_error


def test_differences_below_the_limit_pass_and_are_measured() -> None:
    exported = OUTPUTS.copy()
    exported[3, 2] += 5e-5
    assert _compare(exported) == pytest.approx(5e-5)


def test_one_number_beyond_the_limit_fails_with_the_figure() -> None:
    exported = OUTPUTS.copy()
    exported[3, 2] += 2e-4
    with pytest.raises(ParityFault, match=r"tower: outputs differ by up to 0\.0002 on 40 real inputs"):
        _compare(exported)


def test_another_order_fails_even_where_numbers_pass() -> None:
    with pytest.raises(ParityFault, match="stay the top 10"):
        _compare(OUTPUTS, scores=-SCORES)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_never_close_to_anything(bad: float) -> None:
    exported = OUTPUTS.copy()
    exported[0, 0] = bad
    with pytest.raises(ParityFault, match="the exported model answers NaN or infinity"):
        _compare(exported)
    with pytest.raises(ParityFault, match="the trained model answers NaN or infinity"):
        compare("tower", trained=exported, exported=exported, scores=(SCORES, SCORES), limits=Limits(1))


def test_another_shape_fails() -> None:
    with pytest.raises(ParityFault, match=r"\[39, 8\], the trained \[40, 8\]"):
        _compare(OUTPUTS[1:])


def test_agreement_counts_places_among_the_top_and_leaves_out_what_is_no_candidate() -> None:
    first = np.array([[3.0, 2.0, 1.0, -np.inf], [1.0, 2.0, 3.0, 4.0]])
    second = np.array([[2.0, 3.0, 1.0, -np.inf], [4.0, 2.0, 3.0, 1.0]])
    assert top_k_agreement(first, second, k=2) == pytest.approx((2 + 1) / 4)
    assert top_k_agreement(first[:1], second[:1], k=10) == 1.0
    assert top_k_agreement(first[:0], second[:0], k=10) == 1.0


def test_the_limit_grows_with_the_vectors_and_never_below_one() -> None:
    assert vector_limit(np.array([[100.0]])).error == 100 * vector_limit(np.array([[0.1]])).error
