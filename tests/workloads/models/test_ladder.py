"""The measured ladder: losses by hand, a budget that can be broken, and requests that are too few to judge by."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from workloads.contract.quality import RungQuality
from workloads.contract.slo import STUDENT_LOSS_MAX
from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.models.ladder import RankedLists, measure, statements, student_fault

FUSED = RANKER_DENSE.index("fused_score")


def ranked(count: int = 4, *, wanted: int = 1, protocol: int = 0, traditional: float = 0.25) -> RankedLists:
    """Lists of 12 candidates, items 1 to 12 in fused order, of which each request wanted one."""
    sparse = np.zeros((count * 12, len(RANKER_SPARSE)), dtype=np.int32)
    sparse[:, 0] = np.tile(np.arange(1, 13), count)
    dense = np.zeros((count * 12, len(RANKER_DENSE)), dtype=np.float32)
    dense[:, FUSED] = np.tile(np.linspace(1, 0.1, 12), count)
    return RankedLists(
        protocol=np.full(count, protocol, dtype=np.int8),
        offsets=np.arange(count + 1) * 12,
        sparse=sparse,
        dense=dense,
        wanted=np.full(count, wanted, dtype=np.int32),
        wanted_offsets=np.arange(count + 1),
        traditional=np.full(count, traditional, dtype=np.float32),
    )


def placing(lists: RankedLists, item: int, place: int) -> np.ndarray:
    """Scores that put `item` at a place, counted from 0, and the others around it."""
    scores = -np.arange(12, dtype=np.float32)
    scores = np.insert(np.delete(scores, place), item - 1, scores[place])
    return np.tile(scores, len(lists)).astype(np.float32)


def of(rungs: list[RungQuality], rung: int) -> RungQuality:
    return next(row for row in rungs if row.rung == rung)


def test_each_rung_is_held_against_rung_one_on_the_same_lists():
    lists = ranked(wanted=3)
    rungs = measure(lists, {1: placing(lists, 3, 0), 2: placing(lists, 3, 1)})
    assert [row.rung for row in rungs] == [1, 2, 3, 4]
    assert of(rungs, 1).ndcg_at_10 == 1.0
    assert of(rungs, 1).loss == 0.0
    assert of(rungs, 1).auc == 1.0
    assert of(rungs, 2).loss == pytest.approx(1 - 1 / np.log2(3))
    assert of(rungs, 2).auc == pytest.approx(10 / 11)
    assert of(rungs, 3).loss == pytest.approx(0.5), "item 3 is third in fused order"
    assert of(rungs, 3).auc == pytest.approx(9 / 11)
    assert of(rungs, 4).loss == pytest.approx(0.75)
    assert of(rungs, 4).auc is None, "its lists have no scores of their own"
    assert {row.requests for row in rungs} == {4}


def test_a_rung_that_is_better_than_the_first_has_a_loss_below_zero():
    lists = ranked(wanted=1)
    assert of(measure(lists, {1: placing(lists, 1, 4), 2: placing(lists, 1, 4)}), 3).loss < -0.5


def test_ties_keep_the_order_that_the_list_came_in():
    lists = ranked(wanted=1)
    assert of(measure(lists, {1: np.zeros(48, np.float32), 2: np.zeros(48, np.float32)}), 2).ndcg_at_10 == 1.0


def test_what_was_wanted_and_is_no_candidate_counts_against_every_rung():
    lists = dataclasses.replace(
        ranked(1), wanted=np.array([1, 99], dtype=np.int32), wanted_offsets=np.array([0, 2], dtype=np.int64)
    )
    assert of(measure(lists, {1: placing(lists, 1, 0), 2: placing(lists, 1, 0)}), 1).ndcg_at_10 < 0.7


@pytest.mark.parametrize("lists", [ranked(0), ranked(wanted=99), ranked(wanted=12)])
def test_where_rung_one_finds_nothing_there_is_nothing_to_lose_and_it_is_said(lists: RankedLists):
    scores = -lists.sparse[:, 0].astype(np.float32)
    rungs = measure(lists, {1: scores, 2: scores})
    assert rungs == []
    assert student_fault(rungs) is None
    assert all("was not measured" in said for said in statements(rungs))


def test_the_error_is_that_of_differences_request_by_request():
    lists = ranked(400)
    first = placing(lists, 1, 0)
    same = of(measure(lists, {1: first, 2: first}), 2)
    assert same.loss_error == 0
    random = np.random.default_rng(0).random(len(first)).astype(np.float32)
    chance = of(measure(lists, {1: first, 2: random}), 2)
    assert 0.005 < chance.loss_error < 0.03
    fewer = ranked(100)
    assert of(measure(fewer, {1: first[:1200], 2: random[:1200]}), 2).loss_error > 1.5 * chance.loss_error


def row(loss: float, error: float = 0.001, requests: int = 2000) -> RungQuality:
    return RungQuality(rung=2, protocol="novel", ndcg_at_10=0.1, loss=loss, loss_error=error, requests=requests)


def test_a_student_that_loses_more_than_its_budget_is_refused_with_both_figures():
    fault = student_fault([row(STUDENT_LOSS_MAX + 0.02)])
    assert fault is not None
    assert f"{STUDENT_LOSS_MAX:.1%}" in fault
    assert f"{STUDENT_LOSS_MAX + 0.02:.1%}" in fault
    assert "2000 requests" in fault
    assert student_fault([row(STUDENT_LOSS_MAX - 0.01)]) is None
    assert student_fault([row(-0.3)]) is None


def test_no_other_rung_has_the_students_budget():
    others = [msgspec.structs.replace(row(0.9), rung=rung) for rung in (3, 4)]
    assert student_fault(others) is None


def test_too_few_requests_judge_no_small_loss_and_say_so_but_refuse_what_chance_cannot_explain():
    error = STUDENT_LOSS_MAX
    few = row(STUDENT_LOSS_MAX + error, error, 90)
    assert student_fault([few]) is None
    assert any("90 requests are too few" in said for said in statements([few]))
    assert student_fault([row(STUDENT_LOSS_MAX + 2.1 * error, error, 90)]) is not None
    assert not any("too few" in said for said in statements([row(0.01)]))


def test_a_gain_is_not_called_a_loss():
    assert "gains 3.0%" in statements([row(-0.03)])[0]
    assert "loses 3.0%" in statements([row(0.03)])[0]


def test_lists_that_are_written_down_give_the_same_ladder(tmp_path: Path):
    lists = ranked(3, wanted=2)
    lists.save(tmp_path / "ladder.safetensors")
    again = RankedLists.load(tmp_path / "ladder.safetensors")
    scores = {1: placing(lists, 2, 0), 2: placing(lists, 2, 3)}
    assert measure(again, scores) == measure(lists, scores)


def test_lists_that_do_not_fit_together_are_refused(tmp_path: Path):
    path = tmp_path / "ladder.safetensors"
    dataclasses.replace(ranked(3), offsets=np.arange(4) * 11).save(path)
    with pytest.raises(ValueError, match="do not fit each other; train again"):
        RankedLists.load(path)
    save_file({"offsets": np.arange(4)}, path)
    with pytest.raises(ValueError, match="it holds"):
        RankedLists.load(path)
