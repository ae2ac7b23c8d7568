"""Rung 4 from tables alone."""

from __future__ import annotations

import numpy as np
import pytest

from workloads.bundle.fake import CREATED_MS
from workloads.bundle.store import Bundle
from workloads.contract.http import SOURCES
from workloads.data.features import ItemTables, UserState
from workloads.gateway.traditional import Traditional


@pytest.fixture
def traditional(bundle: Bundle) -> Traditional:
    return Traditional(ItemTables.of(bundle.tables), bundle.titles)


def test_a_history_brings_what_goes_with_it(traditional: Traditional, bundle: Bundle):
    state = UserState.of([], ["item-00001"], CREATED_MS, bundle.index)
    found = traditional.recommend(state)
    assert set(found.items.tolist()) == set(bundle.tables["neighbours"][1].tolist()) - {0}
    assert (np.diff(found.scores) <= 0).all()
    assert {SOURCES[source] for source in found.source.tolist()} == {"item_to_item"}


def test_no_history_brings_what_is_popular_and_in_stock(traditional: Traditional, bundle: Bundle):
    found = traditional.recommend(UserState.of([], [], CREATED_MS, bundle.index))
    lately = bundle.tables["popularity_recent"][found.items]
    assert (np.diff(lately) <= 0).all()
    assert bundle.tables["in_stock"][found.items].all()
    assert {SOURCES[source] for source in found.source.tolist()} == {"popular"}


def test_an_item_brings_its_neighbours_and_an_unknown_one_what_is_popular(traditional: Traditional, bundle: Bundle):
    assert traditional.similar(7).items[0] == bundle.tables["neighbours"][7][0]
    assert traditional.similar(0).items.tolist() == traditional.popular.tolist()


def test_a_query_brings_titles_with_its_words_most_words_first(traditional: Traditional, bundle: Bundle):
    title = bundle.titles[12]
    found = traditional.search(title.upper())
    assert found.items[0] == 12
    words = set(title.casefold().replace(".", "").split())
    assert all(words & set(bundle.titles[item].casefold().replace(".", "").split()) for item in found.items.tolist())


@pytest.mark.parametrize("query", ["zzzz", "!?", " ", "\u0000", "\U0001f600"])
def test_a_query_without_a_known_word_brings_what_is_popular(traditional: Traditional, query: str):
    assert traditional.search(query).items.tolist() == traditional.popular.tolist()
