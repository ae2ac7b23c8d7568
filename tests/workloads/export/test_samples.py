"""Inputs for parity are real ones: nothing from the future, somebody unknown among them, the same each time."""

from pathlib import Path

import numpy as np
import polars as pl

from workloads.bundle.probes import ROWS, open_probes
from workloads.contract.tensors import HISTORY_LENGTH, RANKER_DENSE, RANKER_SPARSE, USER_TOWER
from workloads.data.dataset import Dataset
from workloads.export import samples


def test_states_see_only_what_came_before_their_moment(dataset: Dataset) -> None:
    states = samples.user_states(dataset, count=40)
    assert len(states) == 40
    assert all((state.age_hours >= 0).all() for state in states)
    assert any(len(state.items) > 3 for state in states)
    last = dataset.events.select(pl.col("timestamp_ms").max()).item()
    assert all(state.now_ms <= last for state in states)


def test_the_same_seed_draws_the_same_people(dataset: Dataset) -> None:
    first, second = (samples.tower_inputs(samples.user_states(dataset, count=20, seed=3)) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_last_row_of_the_user_towers_inputs_is_somebody_unknown(dataset: Dataset) -> None:
    inputs = samples.tower_inputs(samples.user_states(dataset, count=5))
    for spec in USER_TOWER.inputs:
        assert inputs[spec.name].shape == (6, *spec.shape)
        assert inputs[spec.name].dtype == spec.dtype
    assert not inputs["history"][-1].any()
    assert samples.tower_inputs([])["history"].shape == (1, HISTORY_LENGTH)


def test_queries_are_the_ones_people_typed(dataset: Dataset) -> None:
    distinct = dataset.events["query"].drop_nulls().n_unique()
    assert len(samples.query_tokens(dataset, count=10_000)) == distinct
    assert len(samples.query_tokens(dataset, count=3)) == 3


def test_ranked_lists_have_the_features_of_the_contract(training, dataset: Dataset) -> None:  # noqa: ANN001 - a path
    from workloads.export.job import TrainedRun  # noqa: PLC0415 - loads torch

    run = TrainedRun.read(training)
    states = samples.user_states(dataset, count=5)
    lists = samples.ranked_lists(states, np.ones((5, 64), np.float32), run.tables, run.schema, count=4)
    assert len(lists) == 4
    for one in lists:
        assert one.sparse.shape[1] == len(RANKER_SPARSE)
        assert one.dense.shape[1] == len(RANKER_DENSE)
        assert len(one.sparse) == len(one.dense) > 50


def test_recorded_requests_are_spread_over_the_lists_and_answered_by_the_model(tmp_path: Path) -> None:
    lists = [
        samples.RankedList(
            np.full((400, len(RANKER_SPARSE)), number, np.int64), np.zeros((400, len(RANKER_DENSE)), np.float32)
        )
        for number in range(3)
    ]
    samples.record(lists, lambda inputs: inputs["sparse"][:, :1].astype(np.float32) / 2, tmp_path / "p.safetensors")
    probes = open_probes(tmp_path / "p.safetensors")
    assert len(probes) == ROWS
    assert np.bincount(probes.inputs["sparse"][:, 0]).min() > ROWS / 3 - 2
    np.testing.assert_array_equal(probes.probability[:, 0], probes.inputs["sparse"][:, 0] / 2)


def test_without_a_single_list_something_is_recorded_still(tmp_path: Path) -> None:
    samples.record([], lambda inputs: np.full((len(inputs["sparse"]), 1), 0.5, np.float32), tmp_path / "p.safetensors")
    assert len(open_probes(tmp_path / "p.safetensors")) == 1
