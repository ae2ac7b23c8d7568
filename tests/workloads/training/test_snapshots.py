"""Item tables know nothing of what came after their cut."""

from __future__ import annotations

import numpy as np

from workloads.contract.tensors import ITEM_TABLES
from workloads.data.dataset import Dataset
from workloads.data.features import ItemTables
from workloads.models.item_knn import ItemKnnConfig
from workloads.training.journal import read
from workloads.training.snapshots import item_tower_inputs, tables_at

KNN = ItemKnnConfig(half_life_days=60.0)


def test_tables_are_those_of_the_contract_with_padding_all_zero(dataset: Dataset):
    catalogue, journal = read(dataset)
    made = tables_at(catalogue, journal, dataset.meta.train_end_ms, KNN)
    assert set(made) == set(ITEM_TABLES)
    ItemTables.of(made)
    for name, table in made.items():
        assert not np.any(table[0]), name
    assert made["popularity"].sum() == np.float32(1.0)


def test_a_future_that_is_rewritten_changes_no_table(dataset: Dataset):
    catalogue, journal = read(dataset)
    cut = dataset.meta.train_end_ms
    whole, past = (tables_at(catalogue, log, cut, KNN) for log in (journal, journal.before(cut)))
    later = tables_at(catalogue, journal, dataset.meta.validation_end_ms, KNN)
    for name in ITEM_TABLES:
        assert np.array_equal(whole[name], past[name]), name
    assert not np.array_equal(whole["popularity"], later["popularity"]), "the test itself can see a difference"


def test_an_item_that_has_not_come_yet_has_no_age(dataset: Dataset):
    catalogue, journal = read(dataset)
    cut = dataset.meta.train_end_ms
    inputs = item_tower_inputs(catalogue, ItemTables.of(tables_at(catalogue, journal, cut, KNN)), cut)
    later = catalogue.first_seen_ms > cut
    assert later.any()
    assert not inputs["numeric"][later, 2].any()
    assert not inputs["numeric"][later, 1].any(), "nor popularity"
