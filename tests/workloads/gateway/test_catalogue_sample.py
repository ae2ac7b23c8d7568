"""Samples follow the catalogue's popularity and are the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from workloads.bundle.store import Bundle
from workloads.gateway.catalogue_sample import Sampler, UsersFileError, read_users


def test_a_large_sample_has_the_shares_of_the_catalogue(bundle: Bundle):
    sample = Sampler(bundle, [], {}).sample(10_000)
    shares = np.zeros(len(bundle.item_ids))
    shares[[bundle.index[item] for item in sample.items]] = sample.item_weights
    popularity = bundle.tables["popularity"] / bundle.tables["popularity"].sum()
    assert np.abs(shares - popularity).sum() < 0.1


def test_the_same_bundle_gives_the_same_sample(bundle: Bundle):
    assert Sampler(bundle, [], {}).sample(50) == Sampler(bundle, [], {}).sample(50)


def test_queries_are_words_of_titles_in_their_order(bundle: Bundle):
    titles = " | ".join(title.lower() for title in bundle.titles)
    sample = Sampler(bundle, [], {}).sample(200)
    assert len(sample.queries) > 190
    assert {len(query.split()) for query in sample.queries} == {1, 2, 3}
    for query in sample.queries:
        assert all(word in titles for word in query.split())


def test_users_are_read_from_a_list_and_nothing_else(tmp_path: Path):
    path = tmp_path / "users.json"
    path.write_text('["a", "b"]')
    assert read_users(path) == ["a", "b"]
    for text in ("{}", "[1]", "[", ""):
        path.write_text(text)
        with pytest.raises(UsersFileError, match="prepare the data set again"):
            read_users(path)
    with pytest.raises(UsersFileError):
        read_users(tmp_path / "missing.json")
