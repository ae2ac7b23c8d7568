"""The ranker: the contract's shapes, a place bias that serving does not know, and what it can learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workloads.contract.tensors import RANKER, RANKER_DENSE, RANKER_SPARSE
from workloads.models import ranker
from workloads.models.ranker import CrossLayer, Ranker, RankerConfig

CONFIG = RankerConfig(items=20, categories=3, price_bands=4, sources=6)


@pytest.fixture
def model() -> Ranker:
    torch.manual_seed(0)
    return Ranker(CONFIG).eval()


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.randint(0, 3, (count, len(RANKER_SPARSE)), generator=generator)
    return sparse, torch.randn((count, len(RANKER_DENSE)), generator=generator)


def test_the_ranker_takes_and_gives_what_the_contract_says(model: Ranker):
    assert [spec.name for spec in RANKER.inputs] == ["sparse", "dense"]
    answer = model(*rows(5))
    assert answer.shape == (5, *RANKER.outputs[0].shape)
    assert ((answer > 0) & (answer < 1)).all()


def test_a_cross_layer_multiplies_with_the_first_features_and_adds():
    layer = CrossLayer(2)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        layer.linear.bias.copy_(torch.tensor([1.0, 0.0]))
    first, x = torch.tensor([[2.0, 3.0]]), torch.tensor([[5.0, 7.0]])
    assert layer(first, x).tolist() == [[2 * (7 + 1) + 5, 3 * 5 + 7]]


def test_a_candidate_that_was_never_shown_has_no_place_bias(model: Ranker):
    with torch.no_grad():
        model.places.weight[1:] = 1.0
    assert model.place_bias(torch.tensor([0, 1, 9_999])).flatten().tolist() == [0.0, 1.0, 1.0]


def test_a_dropped_item_is_dropped_in_training_only():
    torch.manual_seed(0)
    model = Ranker(RankerConfig(items=20, categories=3, price_bands=4, sources=6, item_dropout=1.0, dropout=0.0))
    sparse, dense = rows(4)
    other = sparse.clone()
    other[:, RANKER_SPARSE.index("item")] += 5
    assert torch.equal(model.train().logits(sparse, dense), model.logits(other, dense))
    assert not torch.equal(model.eval().logits(sparse, dense), model.logits(other, dense))


def test_a_feature_gone_wild_moves_no_answer_beyond_what_was_trained(model: Ranker):
    sparse, dense = rows(1)
    wild, wilder = dense.clone(), dense.clone()
    wild[0, 0], wilder[0, 0] = 1e3, 1e6
    assert torch.equal(model(sparse, wild), model(sparse, wilder))


def test_what_is_saved_is_loaded_whole(model: Ranker, tmp_path: Path):
    ranker.save(model, tmp_path)
    loaded = ranker.load(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(*rows(6)), model(*rows(6)))


def test_weights_that_do_not_fit_their_config_are_refused(model: Ranker, tmp_path: Path):
    ranker.save(model, tmp_path)
    config = tmp_path / ranker.CONFIG_FILE
    config.write_text(config.read_text().replace('"items":20', '"items":21'))
    with pytest.raises(ValueError, match="train again"):
        ranker.load(tmp_path)


def test_missing_weights_are_an_os_error_that_names_the_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"ranker\.json"):
        ranker.load(tmp_path)


def test_a_product_of_two_features_is_learnt():
    """What a linear model cannot do and a cross layer is for."""
    torch.manual_seed(0)
    config = RankerConfig(items=20, categories=3, price_bands=4, sources=6, hidden=(16,), dropout=0.0)
    model = Ranker(config).train()
    sparse, dense = rows(2000)
    label = (dense[:, 0] * dense[:, 1] > 0).float().unsqueeze(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model.logits(sparse, dense), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.3, "chance is 0.69"
