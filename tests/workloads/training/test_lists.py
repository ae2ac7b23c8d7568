"""Lists are those that serving makes; labels, places and chances are what really happened."""

from __future__ import annotations

import numpy as np
import pytest

from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.data.dataset import Dataset
from workloads.data.features import ItemTables, rank_features
from workloads.data.features import UserState as State
from workloads.data.fusion import ann_count, fuse, popular_items, recommend_sources
from workloads.models.item_knn import ItemKnnConfig
from workloads.training.journal import Catalogue, Journal, read
from workloads.training.lists import NOTHING, RankRows, Shop, nearest, shown_rows, wanted_rows
from workloads.training.ranking import standardisation
from workloads.training.requests import People, requests_of
from workloads.training.snapshots import tables_at

ITEM = RANKER_SPARSE.index("item")


@pytest.fixture(scope="module")
def world(dataset: Dataset) -> tuple[Catalogue, Journal, Shop]:
    catalogue, journal = read(dataset)
    tables = tables_at(catalogue, journal, dataset.meta.train_end_ms, ItemKnnConfig(half_life_days=60.0))
    tables["vectors"] = np.random.default_rng(0).normal(size=tables["vectors"].shape).astype(np.float32)
    tables["vectors"][0] = 0
    return catalogue, journal, Shop.of(ItemTables.of(tables), {"ann": 2.0})


def users_of(states: list[State]) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(len(states), 64)).astype(np.float32)


def test_a_list_is_what_the_services_would_make_of_the_same_state(world: tuple[Catalogue, Journal, Shop]):
    _, journal, shop = world
    requests = requests_of(journal.wanted())
    state = People(journal.positives()).state(int(requests.person[-1]), int(requests.time_ms[-1]))
    user = users_of([state])[0]
    exclude = state.bought_items
    ann = next(nearest(shop.tables.vectors, user[None, :]))
    made = shop.candidates(state, user, ann, exclude)

    # The retrieval service, step by step.
    scores = shop.tables.vectors[1:] @ user
    order = np.argsort(-scores, kind="stable")[: ann_count(len(exclude))]
    served = fuse(
        recommend_sources(
            state.items,
            state.strength,
            state.age_hours,
            ann=((order + 1).astype(np.int32), scores[order]),
            neighbours=shop.tables.neighbours,
            neighbour_scores=shop.tables.neighbour_scores,
            popular=popular_items(shop.tables.popularity_recent, shop.tables.popularity, shop.tables.in_stock),
            exclude=exclude,
        ),
        shop.tables.vectors,
        user,
        exclude,
        200,
        weights={"ann": 2.0},
    )
    assert made.items.tolist() == served.items.tolist()
    assert np.array_equal(made.scores, served.scores)


def test_the_nearest_are_exact_ordered_and_never_padding():
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    users = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    found = list(nearest(vectors, users, count=10, block=2))
    assert len(found) == 5
    for user, (ids, scores) in zip(users, found, strict=True):
        assert ids.tolist() == (np.argsort(-(vectors[1:] @ user)) + 1)[:10].tolist()
        assert scores == pytest.approx(vectors[ids] @ user, rel=1e-5)


def test_wanted_candidates_are_all_kept_and_the_others_sampled_with_their_chance(
    world: tuple[Catalogue, Journal, Shop],
):
    _, journal, shop = world
    requests = requests_of(journal.wanted()).sample(20, np.random.default_rng(0))
    states = People(journal.positives()).states(requests)
    users = users_of(states)
    whole, part = (
        wanted_rows(shop, requests, states, users, rng=np.random.default_rng(0), negatives=negatives)
        for negatives in (None, 10)
    )
    assert part.label.sum() == whole.label.sum() > 0
    assert (whole.chance == 1).all()
    assert (part.label == 0).sum() == 10 * len(requests)
    expected = np.where(part.label > 0, 1.0, 1.0 / part.chance).sum()
    assert expected == pytest.approx(len(whole)), "each sampled row stands for those left out"
    wanted = {int(item) for at in range(len(requests)) for item in requests.wanted(at)}
    assert set(whole.sparse[whole.label > 0, ITEM].tolist()) <= wanted


def test_shown_rows_carry_the_click_and_the_place(world: tuple[Catalogue, Journal, Shop]):
    _, journal, shop = world
    shown, clicks = journal.impressions(), journal.clicks()
    made = shown_rows(
        shop, shown, clicks, People(journal.positives()), users_of, lists=10_000, rng=np.random.default_rng(0)
    )
    mine = shown.take(np.flatnonzero((shown.person >= 0) & (shown.query < 0)))
    assert len(made) == len(np.unique(mine.visit * 1000 + mine.item))
    assert made.place.min() == 1
    assert made.place.max() == mine.position.max() + 1
    own = np.isin(mine.visit * 1000 + mine.item, clicks.visit * 1000 + clicks.item)
    assert made.label.sum() == len(np.unique((mine.visit * 1000 + mine.item)[own])) > 0
    assert np.isfinite(made.dense).all()


def test_offline_rows_are_the_gateways_features(world: tuple[Catalogue, Journal, Shop], dataset: Dataset):
    from workloads.contract.tensors import FeatureSchema  # noqa: PLC0415 - only here

    catalogue, journal, shop = world
    requests = requests_of(journal.wanted()).sample(3, np.random.default_rng(2))
    states = People(journal.positives()).states(requests)
    users = users_of(states)
    rows = wanted_rows(shop, requests, states, users, rng=np.random.default_rng(0), negatives=None)
    mean, scale = standardisation(rows)
    schema = FeatureSchema(
        items=catalogue.items,
        categories=catalogue.categories,
        price_edges=catalogue.price_edges,
        dense_mean=mean.tolist(),
        dense_scale=scale.tolist(),
        reference_ms=dataset.meta.train_end_ms,
    )
    found = shop.candidates(states[0], users[0], next(nearest(shop.tables.vectors, users[:1])), NOTHING)
    sparse, dense = rank_features(states[0], found, shop.tables, schema)
    assert np.array_equal(sparse, rows.sparse[: len(sparse)])
    assert np.allclose(dense, ((rows.dense - mean) / scale)[: len(dense)], atol=1e-5)


def test_standardisation_weighs_sampled_rows_by_what_they_stand_for():
    dense = np.zeros((3, len(RANKER_DENSE)), dtype=np.float32)
    dense[:, 0] = [1.0, 0.0, 0.0]
    rows = RankRows(
        sparse=np.zeros((3, len(RANKER_SPARSE)), dtype=np.int64),
        dense=dense,
        label=np.array([1, 0, 0], dtype=np.int8),
        place=np.zeros(3, dtype=np.int64),
        chance=np.full(3, 0.2, dtype=np.float32),
    )
    mean, scale = standardisation(rows)
    assert mean[0] == pytest.approx(1 / 11)
    assert scale[1] == 1.0, "a feature that never changes"


def test_no_lists_are_no_rows():
    assert len(RankRows.join([])) == 0
