"""The towers: what padding must not do, what training must reach, what is written and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from workloads.contract.tensors import HISTORY_LENGTH, ITEM_TOWER, PAD, QUERY_TOWER, USER_TOWER, VECTOR_DIM, Signature
from workloads.models import two_tower
from workloads.models.two_tower import TwoTower, TwoTowerConfig, sampled_softmax

ITEMS, CATEGORIES = 30, 4


@pytest.fixture
def model() -> TwoTower:
    torch.manual_seed(0)
    made = TwoTower(TwoTowerConfig(items=ITEMS, categories=CATEGORIES))
    inputs = draw(ITEM_TOWER, ITEMS + 1)
    inputs["item"] = torch.arange(ITEMS + 1)
    made.bake(inputs)
    return made.eval()


def draw(signature: Signature, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(seed)
    most = {"item": ITEMS, "history": ITEMS, "category": CATEGORIES, "tokens": 20_010}
    return {
        spec.name: torch.from_numpy(
            random.integers(0, most[spec.name] + 1, (batch, *spec.shape))
            if spec.dtype == "int64"
            else random.random((batch, *spec.shape)).astype(np.float32)
        )
        for spec in signature.inputs
    }


@pytest.mark.parametrize("signature", [USER_TOWER, ITEM_TOWER, QUERY_TOWER], ids=lambda s: s.role)
def test_a_tower_takes_and_gives_what_the_contract_says(model: TwoTower, signature: Signature):
    tower = getattr(model, signature.role.removesuffix("_tower"))
    inputs = draw(signature, 5)
    by_name = tower(**inputs)
    assert by_name.shape == (5, VECTOR_DIM)
    assert by_name.dtype == torch.float32
    assert torch.equal(by_name, tower(*inputs.values()))


def test_padding_on_the_left_says_nothing(model: TwoTower):
    inputs = draw(USER_TOWER, 3)
    inputs["history"][:, :-4] = PAD
    vectors = model.user(**inputs)
    noisy = {name: values.clone() for name, values in inputs.items()}
    noisy["history_strength"][:, :-4] = 9.0
    noisy["history_age_hours"][:, :-4] = 9e3
    assert torch.allclose(vectors, model.user(**noisy), atol=1e-6)
    short = {name: values if name == "context" else values[:, -4:] for name, values in inputs.items()}
    assert torch.allclose(vectors, model.user(**short), atol=1e-5)


def test_an_empty_history_is_anybody_and_not_nan(model: TwoTower):
    inputs = draw(USER_TOWER, 2)
    inputs["history"][:] = PAD
    inputs["context"][1] = inputs["context"][0]
    vectors = model.user(**inputs)
    assert torch.isfinite(vectors).all()
    assert torch.allclose(vectors[0], vectors[1], atol=1e-6)


def test_a_query_without_words_and_padding_among_tokens_say_nothing(model: TwoTower):
    tokens = torch.zeros((2, 32), dtype=torch.int64)
    tokens[1, :3] = torch.tensor([5, 6, 7])
    vectors = model.query(tokens)
    assert torch.isfinite(vectors).all()
    assert torch.allclose(vectors[1], model.query(tokens[1:, :3])[0], atol=1e-6)


def test_baking_gives_padding_no_vector_and_leaves_the_mode_as_it_was(model: TwoTower):
    model.train()
    inputs = draw(ITEM_TOWER, ITEMS + 1)
    vectors = model.bake(inputs)
    assert model.training
    assert not vectors[PAD].any()
    assert torch.equal(vectors, model.user.table)


def test_with_its_id_dropped_an_item_is_placed_by_its_content():
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(items=ITEMS, categories=CATEGORIES, id_dropout=1.0)).train()
    inputs = draw(ITEM_TOWER, 1)
    other = inputs | {"item": inputs["item"] % ITEMS + 1}
    assert torch.equal(model.item(**inputs), model.item(**other))
    model.eval()
    assert not torch.equal(model.item(**inputs), model.item(**other))


def test_the_softmax_is_that_of_the_corrected_logits():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    items = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    log_q = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    targets = torch.tensor([1, 2, 3])
    found = sampled_softmax(queries, items, wanted=targets[:2], targets=targets, log_q=log_q)
    logits = queries @ items.T - log_q
    expected = -(torch.log_softmax(logits, dim=1)[[0, 1], [0, 1]]).mean()
    assert torch.allclose(found, expected)


def test_another_row_with_the_same_item_is_no_negative():
    queries, items = torch.ones((2, 1)), torch.ones((2, 1))
    targets = torch.tensor([7, 7])
    assert sampled_softmax(queries, items, wanted=targets, targets=targets, log_q=torch.zeros(2)) == pytest.approx(0.0)


def test_what_is_saved_is_loaded_whole(model: TwoTower, tmp_path: Path):
    two_tower.save(model, tmp_path)
    loaded = two_tower.load(tmp_path)
    assert not loaded.training
    for signature in (USER_TOWER, ITEM_TOWER, QUERY_TOWER):
        role = signature.role.removesuffix("_tower")
        inputs = draw(signature, 4)
        assert torch.equal(getattr(loaded, role)(**inputs), getattr(model, role)(**inputs))
    assert loaded.item.tokens is loaded.query.tokens, "the token table is one"


def test_weights_that_do_not_fit_their_config_are_refused(model: TwoTower, tmp_path: Path):
    two_tower.save(model, tmp_path)
    config = tmp_path / two_tower.CONFIG_FILE
    config.write_text(config.read_text().replace(f'"items":{ITEMS}', f'"items":{ITEMS + 1}'))
    with pytest.raises(ValueError, match="train again"):
        two_tower.load(tmp_path)


def test_history_is_as_long_as_the_contract_says():
    assert USER_TOWER.inputs[0].shape == (HISTORY_LENGTH,)
