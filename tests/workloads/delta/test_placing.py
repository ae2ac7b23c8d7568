"""New items lie where their content says, and their neighbours' scores stay below what people taught."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from workloads.bundle.store import Bundle, open_bundle
from workloads.contract.tensors import ITEM_TABLES, ITEM_TOWER, NEIGHBOURS, PAD, VECTOR_DIM
from workloads.delta.items import NewItem
from workloads.delta.making import OnnxItemTower, contents
from workloads.delta.placing import (
    ItemTower,
    PlacingFault,
    content_vectors,
    images,
    nearest,
    neighbour_scale,
    place,
    usual_of,
)

NOW = 1_795_000_000_000


@pytest.fixture
def bundle(made: Path) -> Bundle:
    return open_bundle(made)


def item(name: str, category: str = "Garden", **changes: object) -> NewItem:
    fields = {"title": f"A {name}", "description": "", "price": 3.0, "image": [], "in_stock": True}
    return NewItem(item=name, category=category, **{**fields, **changes})  # type: ignore[arg-type]  # of a test


def asked(items: list[NewItem], bundle: Bundle, tower: ItemTower, popularity: np.ndarray | None = None) -> np.ndarray:
    share = np.zeros(len(items), np.float32) if popularity is None else popularity
    return content_vectors(items, share, images(items), schema=bundle.features, tower=tower, now_ms=NOW)


def test_an_item_lands_among_its_category(bundle: Bundle):
    names = bundle.features.categories
    tower = OnnxItemTower(bundle.model_path(ITEM_TOWER))
    things = [item(f"thing {name}", name) for name in names]
    vectors = asked(things, bundle, tower)
    near = np.argsort(-(vectors @ bundle.tables["vectors"].T), axis=1)[:, :10]
    assert (bundle.tables["category"][near] == np.arange(1, len(names) + 1)[:, None]).mean() > 0.95


def test_the_tower_is_asked_for_content_alone(bundle: Bundle):
    class Tower:
        def vectors(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
            self.asked = inputs
            return np.ones((len(inputs["item"]), VECTOR_DIM), np.float32)

    tower = Tower()
    share = np.array([2.0 / bundle.features.items, 0.0], np.float32)
    asked([item("a", image=[2.0] * 16), item("b", "Nowhere", price=None)], bundle, tower, share)
    told = tower.asked
    assert {name: rows.shape[1:] for name, rows in told.items()} == {s.name: s.shape for s in ITEM_TOWER.inputs}
    assert {name: rows.dtype.name for name, rows in told.items()} == {s.name: s.dtype for s in ITEM_TOWER.inputs}
    assert told["item"].tolist() == [PAD, PAD]
    assert told["category"].tolist() == [bundle.features.categories.index("Garden") + 1, 0]
    np.testing.assert_allclose(told["numeric"], [[np.log1p(3.0), np.log1p(2.0), 0], [0, 0, 0]], rtol=1e-5)
    assert told["image"].tolist() == [[2.0] * 16, [0.0] * 16]
    assert told["tokens"].any(axis=1).all()


def test_a_vector_that_is_not_finite_stops_the_delta_and_names_the_item(bundle: Bundle):
    class Tower:
        def vectors(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
            return np.array([[1.0] * VECTOR_DIM, [np.nan] * VECTOR_DIM], np.float32)

    with pytest.raises(PlacingFault, match="'bad'"):
        asked([item("good"), item("bad")], bundle, Tower())


def test_a_new_item_is_expected_to_be_as_popular_as_its_category_and_not_as_what_nobody_wanted():
    popularity = np.array([0.5, 0.3, 0.2], np.float32)
    found = usual_of(popularity, np.array([1, 1, 2], np.int32), np.array([1, 2, 3, PAD], np.int32))
    np.testing.assert_allclose(found, [0.4, 0.2, 1 / 3, 1 / 3], rtol=1e-6)


def test_of_nothing_known_nothing_is_expected():
    found = usual_of(np.empty((0, 16), np.float32), np.empty(0, np.int32), np.array([1, PAD], np.int32))
    assert found.tolist() == [[0.0] * 16] * 2


def test_rows_are_the_contracts_and_say_that_nobody_touched_them(bundle: Bundle):
    new = [item("a"), item("b", "Kitchen", price=None, in_stock=False)]
    tower = OnnxItemTower(bundle.model_path(ITEM_TOWER))
    tables = place(new, contents(bundle), bundle.tables, bundle.features, tower=tower, now_ms=NOW)
    assert tables.keys() == ITEM_TABLES.keys()
    for name, (dtype, _) in ITEM_TABLES.items():
        assert tables[name].dtype == np.dtype(dtype), name
        assert len(tables[name]) == 2
    assert not any(tables[name].any() for name in ("popularity", "popularity_recent", "popularity_category"))
    assert tables["price"].tolist() == [3.0, 0.0]
    assert tables["price_band"][1] == 0
    assert tables["in_stock"].tolist() == [1, 0]
    assert tables["first_seen_ms"].tolist() == [NOW, NOW]


@pytest.mark.parametrize("with_image", [True, False])
def test_neither_what_people_made_of_an_item_nor_its_image_hides_that_a_new_one_is_of_its_kind(
    bundle: Bundle, *, with_image: bool
):
    twin = 17
    there = contents(bundle)
    opposite = {**bundle.tables, "vectors": -np.asarray(bundle.tables["vectors"])}
    tower = OnnxItemTower(bundle.model_path(ITEM_TOWER))
    new = [item("new", there[twin - 1].category, title=there[twin - 1].title, price=there[twin - 1].price)]
    assert any(there[twin - 1].image)
    if with_image:
        new[0] = msgspec.structs.replace(new[0], image=there[twin - 1].image)
    assert place(new, there, opposite, bundle.features, tower=tower, now_ms=NOW)["neighbours"][0, 0] == twin


def test_neighbours_are_the_nearest_by_cosine_never_the_item_and_never_padding():
    there = np.zeros((4, VECTOR_DIM), np.float32)
    there[1, 0], there[2, 1], there[3, 0] = 9.0, 1.0, -1.0
    new = np.zeros((2, VECTOR_DIM), np.float32)
    new[0, :2], new[1, 1] = [3.0, 1.0], 5.0
    neighbours, scores = nearest(new, there, np.ones(NEIGHBOURS, np.float32))
    assert neighbours[0, :4].tolist() == [1, 2, 5, 0], "opposite ones are no neighbours"
    assert neighbours[1, :3].tolist() == [2, 4, 0]
    np.testing.assert_allclose(scores[0, :3], [3 / 10**0.5, 1 / 10**0.5, 1 / 10**0.5], rtol=1e-5)
    assert not scores[neighbours == PAD].any()


def test_a_score_is_at_most_what_a_typical_item_learned_at_that_place():
    learned = np.zeros((6, NEIGHBOURS), np.float32)
    learned[1, :3], learned[2, :3], learned[3, :3] = [0.9, 0.8, 0.1], [0.5, 0.2, 0.1], [0.3, 0.1, 0.0]
    scale = neighbour_scale(learned)
    np.testing.assert_allclose(scale[:4], [0.5, 0.2, 0.1, 0.0])
    random = np.random.default_rng(0)
    _, scores = nearest(
        random.normal(size=(5, VECTOR_DIM)).astype(np.float32),
        random.normal(size=(90, VECTOR_DIM)).astype(np.float32),
        scale,
    )
    assert (scores <= scale).all()
    assert (np.diff(scores, axis=1) <= 0).all(), "best first"
    assert neighbour_scale(np.zeros((6, NEIGHBOURS), np.float32)).tolist() == [1.0] * NEIGHBOURS


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(0)
    there = random.normal(size=(80, VECTOR_DIM)).astype(np.float32)
    new = random.normal(size=(11, VECTOR_DIM)).astype(np.float32)
    scale = np.linspace(1, 0.1, NEIGHBOURS).astype(np.float32)
    whole = nearest(new, there, scale)
    monkeypatch.setattr("workloads.delta.placing._BLOCK", 4)
    parts = nearest(new, there, scale)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-5)
