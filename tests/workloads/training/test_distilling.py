"""Teaching the student: it comes to order as its teacher does, and repeats itself under a seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.models import metrics
from workloads.models.ranker import Ranker, RankerConfig
from workloads.models.student import Student, StudentConfig
from workloads.training.distilling import Lesson, StudentTraining, begin, lesson, teach_epoch
from workloads.training.lists import RankRows
from workloads.training.ranking import RankerTraining, fit_epoch, probabilities

CONFIG = StudentTraining(epochs=5, batch=256)
SIZES = {"items": 30, "categories": 2, "price_bands": 2, "sources": 6}


def rows(count: int, *, chance: float = 1.0, seed: int = 0) -> RankRows:
    """Planted: two features multiplied, one alone, and items of which every third is loved; most labels are noise."""
    random = np.random.default_rng(seed)
    dense = random.normal(size=(count, len(RANKER_DENSE))).astype(np.float32)
    sparse = np.zeros((count, len(RANKER_SPARSE)), dtype=np.int64)
    sparse[:, 0] = random.integers(1, 31, count)
    logit = dense[:, 0] + dense[:, 1] * dense[:, 2] + 2.0 * (sparse[:, 0] % 3 == 0) - 2.5
    label = (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    kept = (label > 0) | (random.random(count) < chance)
    made = RankRows(
        sparse=sparse,
        dense=dense,
        label=label,
        place=np.zeros(count, dtype=np.int64),
        chance=np.full(count, chance, dtype=np.float32),
    )
    return made.take(np.flatnonzero(kept))


@pytest.fixture(scope="module")
def teacher() -> Ranker:
    torch.manual_seed(0)
    model = Ranker(RankerConfig(**SIZES, hidden=(32,), item_dropout=0.0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    config, made = RankerTraining(batch=256), rows(20_000)
    for epoch in range(4):
        fit_epoch(model, optimiser, made, made.dense, config, epoch=epoch, seed=0, heard=lambda _share, _loss: None)
    return model


def taught(teaching: Lesson, epochs: int = CONFIG.epochs, seed: int = 0) -> tuple[Student, list[float]]:
    torch.manual_seed(seed)
    model = Student(StudentConfig(**SIZES))
    begin(model, teaching)
    optimiser = torch.optim.AdamW(model.parameters(), lr=CONFIG.learning_rate)
    differences = [
        teach_epoch(model, optimiser, teaching, CONFIG, epoch=epoch, seed=seed, heard=lambda _share, _difference: None)
        for epoch in range(epochs)
    ]
    return model, differences


@pytest.mark.real_parts
def test_the_student_finds_the_planted_signal_that_its_teacher_found(teacher: Ranker):
    made = rows(20_000)
    model, differences = taught(lesson(teacher, made, made.dense))
    unseen = rows(10_000, seed=1)
    of_teacher, of_student = (probabilities(one, unseen.sparse, unseen.dense) for one in (teacher, model))
    reached = metrics.auc(unseen.label, of_teacher)
    assert reached > 0.75, "or there was nothing to learn from"
    assert metrics.auc(unseen.label, of_student) > reached - 0.01
    assert metrics.calibration(unseen.label, of_student) == pytest.approx(1.0, abs=0.15)
    assert differences[-1] < differences[0] / 4


@pytest.mark.real_parts
def test_labels_alone_teach_through_their_offset(teacher: Ranker):
    """A sample of the unwanted must not make the student believe that much is wanted."""
    made = rows(40_000, chance=0.1)
    known = lesson(teacher, made, made.dense)
    assert torch.allclose(known.offset, torch.full_like(known.offset, float(-np.log(0.1))))
    model, _ = taught(known)
    whole = rows(5_000, seed=1)
    answers = probabilities(model, whole.sparse, whole.dense)
    assert metrics.calibration(whole.label, answers) == pytest.approx(1.0, abs=0.2), "uncorrected it is higher"


@pytest.mark.real_parts
def test_the_same_seed_makes_the_same_student(teacher: Ranker):
    made = rows(2_000)
    teaching = lesson(teacher, made, made.dense)
    (first, _), (again, _) = taught(teaching, epochs=1), taught(teaching, epochs=1)
    assert all(torch.equal(values, again.state_dict()[name]) for name, values in first.state_dict().items())


def test_the_rate_falls_to_nothing_at_the_last_step(teacher: Ranker):
    made = rows(600)
    model = Student(StudentConfig(**SIZES))
    optimiser = torch.optim.AdamW(model.parameters(), lr=CONFIG.learning_rate)
    rates: list[float] = []
    for epoch in range(CONFIG.epochs):
        teach_epoch(
            model,
            optimiser,
            lesson(teacher, made, made.dense),
            CONFIG,
            epoch=epoch,
            seed=0,
            heard=lambda _share, _difference: rates.append(optimiser.param_groups[0]["lr"]),
        )
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == CONFIG.learning_rate
    assert 0 < rates[-1] < CONFIG.learning_rate / 10
