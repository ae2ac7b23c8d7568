"""The towers learn what was planted, the same way every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workloads.contract.tensors import HISTORY_LENGTH, IMAGE_DIM, TEXT_TOKENS
from workloads.models.two_tower import TwoTower, TwoTowerConfig
from workloads.training.requests import Requests
from workloads.training.towers import TowerData, TowerTraining, fit, user_vectors

ITEMS = 40
CONFIG = TowerTraining(batch=64, uniform=32, query_batch=32)


def planted(requests: int = 600) -> TowerData:
    """People whose history is even want even items, odd want odd; token 1 + item % 2 is a query for it."""
    random = np.random.default_rng(0)
    kind = random.integers(0, 2, requests)
    history = np.zeros((requests, HISTORY_LENGTH), dtype=np.int64)
    history[:, -5:] = 2 * random.integers(1, ITEMS // 2, (requests, 5)) + kind[:, None]
    wanted = 2 * random.integers(1, ITEMS // 2, requests) + kind
    items = torch.arange(ITEMS + 1)
    tokens = torch.zeros((ITEMS + 1, TEXT_TOKENS), dtype=torch.int64)
    tokens[1:, 0] = 1 + items[1:] % 2
    return TowerData(
        requests=Requests(
            person=np.arange(requests),
            time_ms=np.arange(requests),
            visit=np.arange(requests),
            offsets=np.arange(requests + 1),
            items=wanted,
        ),
        user={
            "history": torch.from_numpy(history),
            "history_strength": torch.ones((requests, HISTORY_LENGTH)),
            "history_age_hours": torch.ones((requests, HISTORY_LENGTH)),
            "context": torch.zeros((requests, 4)),
        },
        item={
            "item": items,
            "category": torch.zeros(ITEMS + 1, dtype=torch.int64),
            "tokens": tokens,
            "numeric": torch.zeros((ITEMS + 1, 3)),
            "image": torch.zeros((ITEMS + 1, IMAGE_DIM)),
        },
        query_tokens=tokens[1:],
        query_items=items[1:],
        query_weight=1.0,
        half_life_days=60.0,
    )


def trained(data: TowerData, *, parts: tuple[range, ...] = (range(2),), seed: int = 0) -> TwoTower:
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(mode=True)
    model = TwoTower(TwoTowerConfig(items=ITEMS, categories=1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=CONFIG.learning_rate)
    for rounds in parts:
        fit(
            model,
            optimiser,
            data,
            CONFIG,
            rounds=rounds,
            total=2,
            learning_rate=CONFIG.learning_rate,
            seed=seed,
            heard=lambda _round, _loss: None,
        )
    model.bake(data.item)
    return model


@pytest.fixture(scope="module")
def data() -> TowerData:
    return planted()


@pytest.fixture(scope="module")
def model(data: TowerData) -> TwoTower:
    return trained(data)


@pytest.mark.real_parts
def test_people_come_to_lie_near_the_items_they_like(model: TwoTower, data: TowerData):
    users = user_vectors(model, data.user)
    scores = users @ model.user.table.numpy()[1:].T
    best = np.argmax(scores, axis=1) + 1
    kind = data.user["history"][:, -1].numpy() % 2
    assert (best % 2 == kind).mean() > 0.95, "chance is 0.5"


@pytest.mark.real_parts
def test_queries_come_to_lie_near_the_items_they_name(model: TwoTower, data: TowerData):
    with torch.no_grad():
        scores = model.query(data.query_tokens[:2]) @ model.user.table[1:].T
    best = scores.argmax(dim=1) + 1
    assert (best % 2).tolist() == (data.query_items[:2] % 2).tolist()


@pytest.mark.real_parts
def test_the_same_seed_makes_the_same_towers_and_another_seed_others(model: TwoTower, data: TowerData):
    again, other = trained(data), trained(data, seed=1)
    for name, values in model.state_dict().items():
        assert torch.equal(values, again.state_dict()[name]), name
    assert not torch.equal(model.user.table, other.user.table)


@pytest.mark.real_parts
def test_rounds_run_one_by_one_are_the_rounds_run_together(model: TwoTower, data: TowerData):
    parts = trained(data, parts=(range(1), range(1, 2)))
    assert torch.equal(model.user.table, parts.user.table)
