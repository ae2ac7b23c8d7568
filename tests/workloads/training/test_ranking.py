"""The ranker's fit: probabilities of whole lists from sampled ones, and a place bias that takes its share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.models import metrics
from workloads.models.ranker import Ranker, RankerConfig
from workloads.training.lists import RankRows
from workloads.training.ranking import RankerTraining, fit_epoch, probabilities, validation_auc

CONFIG = RankerTraining(batch=256, learning_rate=5e-3)


def rows(count: int, *, chance: float = 1.0, shown: bool = False, seed: int = 0) -> RankRows:
    """Labels follow the first dense feature; a shown row at place 1 is clicked far more often."""
    random = np.random.default_rng(seed)
    dense = random.normal(size=(count, len(RANKER_DENSE))).astype(np.float32)
    place = random.integers(1, 3, count) if shown else np.zeros(count, dtype=np.int64)
    logit = 1.5 * dense[:, 0] - 2.0 + np.where(place == 1, 2.0, 0.0)
    label = (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    kept = (label > 0) | (random.random(count) < chance)
    made = RankRows(
        sparse=np.zeros((count, len(RANKER_SPARSE)), dtype=np.int64),
        dense=dense,
        label=label,
        place=place.astype(np.int64),
        chance=np.full(count, chance, dtype=np.float32),
    )
    return made.take(np.flatnonzero(kept))


def trained(made: RankRows, epochs: int = 4, seed: int = 0) -> Ranker:
    torch.manual_seed(seed)
    model = Ranker(RankerConfig(items=3, categories=2, price_bands=2, sources=6, hidden=(16,)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=CONFIG.learning_rate)
    for epoch in range(epochs):
        fit_epoch(model, optimiser, made, made.dense, CONFIG, epoch=epoch, seed=seed, heard=lambda _share, _loss: None)
    return model


@pytest.mark.real_parts
def test_a_sample_of_the_unwanted_still_gives_the_probabilities_of_whole_lists():
    model = trained(rows(20_000, chance=0.1))
    whole = rows(5_000, seed=1)
    answers = probabilities(model, whole.sparse, whole.dense)
    assert metrics.calibration(whole.label, answers) == pytest.approx(1.0, abs=0.12), "uncorrected it is about 3"
    assert validation_auc(model, whole, whole.dense) > 0.75


@pytest.mark.real_parts
def test_the_place_takes_what_is_owed_to_the_place():
    model = trained(rows(20_000, shown=True))
    bias = model.place_bias(torch.tensor([1, 2])).detach().flatten()
    assert float(bias[0] - bias[1]) == pytest.approx(2.0, abs=0.5)


@pytest.mark.real_parts
def test_the_same_seed_makes_the_same_ranker():
    made = rows(2_000)
    first, again = trained(made, epochs=1), trained(made, epochs=1)
    assert all(torch.equal(values, again.state_dict()[name]) for name, values in first.state_dict().items())


def test_no_rows_have_no_probabilities():
    model = Ranker(RankerConfig(items=3, categories=2, price_bands=2, sources=6))
    nothing = rows(10).take(np.empty(0, dtype=np.int64))
    assert len(probabilities(model, nothing.sparse, nothing.dense)) == 0
