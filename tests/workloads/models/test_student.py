"""The student: the ranker's inputs and answers, clamped for 8 bits, and nothing of what it does not read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE, STUDENT
from workloads.models import student
from workloads.models.student import SPARSE, Student, StudentConfig

CONFIG = StudentConfig(items=20, categories=3, price_bands=4, sources=6)


@pytest.fixture
def model() -> Student:
    torch.manual_seed(0)
    return Student(CONFIG).eval()


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.randint(0, 3, (count, len(RANKER_SPARSE)), generator=generator)
    return sparse, torch.randn((count, len(RANKER_DENSE)), generator=generator)


def test_the_student_takes_and_gives_what_the_contract_says(model: Student):
    assert [spec.name for spec in STUDENT.inputs] == ["sparse", "dense"]
    answer = model(*rows(5))
    assert answer.shape == (5, *STUDENT.outputs[0].shape)
    assert ((answer > 0) & (answer < 1)).all()


@pytest.mark.parametrize("name", RANKER_SPARSE)
def test_only_the_features_that_it_names_move_its_answer(model: Student, name: str):
    sparse, dense = rows(1)
    other = sparse.clone()
    other[0, RANKER_SPARSE.index(name)] = 3
    assert torch.equal(model(sparse, dense), model(other, dense)) == (name not in SPARSE)


def test_the_last_index_of_every_feature_has_a_row(model: Student):
    sparse = torch.tensor([[20, 3, 4, 20, 3, 5]])
    assert torch.isfinite(model(sparse, torch.zeros(1, len(RANKER_DENSE)))).all()


def test_a_feature_gone_wild_moves_no_answer_beyond_its_reach(model: Student):
    sparse, dense = rows(1)
    edge, wild = dense.clone(), dense.clone()
    edge[0, 0], wild[0, 0] = CONFIG.reach, 1e6
    assert torch.equal(model(sparse, edge), model(sparse, wild))
    assert not torch.equal(model(sparse, edge), model(sparse, dense))


def test_what_is_saved_is_loaded_whole(model: Student, tmp_path: Path):
    student.save(model, tmp_path)
    loaded = student.load(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(*rows(6)), model(*rows(6)))


def test_weights_that_do_not_fit_their_config_are_refused(model: Student, tmp_path: Path):
    student.save(model, tmp_path)
    config = tmp_path / student.CONFIG_FILE
    config.write_text(config.read_text().replace('"items":20', '"items":21'))
    with pytest.raises(ValueError, match="train again"):
        student.load(tmp_path)


def test_missing_weights_are_an_os_error_that_names_the_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"student\.json"):
        student.load(tmp_path)
