"""Towers and index of a bundle, read from its files."""

from __future__ import annotations

import dataclasses
import pathlib

import msgspec
import numpy as np
import pytest

from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.manifest import Requires
from workloads.bundle.store import Bundle, open_bundle
from workloads.contract.tensors import QUERY_TOWER, USER_TOWER, VECTOR_DIM
from workloads.data.features import user_inputs
from workloads.models.text import token_ids
from workloads.retrieval.dense import AnnIndex, ExactNearest, ModelFault, OnnxTower
from workloads.retrieval.retriever import open_retriever


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=60))


def test_a_user_with_one_item_gets_a_vector_near_that_item(bundle: Bundle):
    tower = OnnxTower(bundle.model_path(USER_TOWER), USER_TOWER)
    vector = tower.vector(user_inputs([7], [1.0], [0.0], [0.0, 1.0, 0.0, 1.0]))
    assert vector is not None
    assert vector.shape == (VECTOR_DIM,)
    assert int(np.argmax(bundle.tables["vectors"] @ vector)) == 7


def test_a_query_gets_a_vector(bundle: Bundle):
    vector = OnnxTower(bundle.model_path(QUERY_TOWER), QUERY_TOWER).vector({"tokens": token_ids("red mug")[None, :]})
    assert vector is not None
    assert vector.dtype == np.float32


def test_a_vector_that_is_not_finite_is_none(bundle: Bundle):
    tower = OnnxTower(bundle.model_path(USER_TOWER), USER_TOWER)
    assert tower.vector(user_inputs([7], [float("nan")], [0.0], [0.0, 1.0, 0.0, 1.0])) is None


def test_the_index_agrees_with_every_dot_product(bundle: Bundle):
    index = AnnIndex(bundle.ann_path, 60, VECTOR_DIM)
    vector = np.asarray(bundle.tables["vectors"][9])
    items, scores = index.search(vector, 10)
    exact, exact_scores = ExactNearest(np.asarray(bundle.tables["vectors"])).search(vector, 10)
    assert items.tolist() == exact.tolist()
    assert items[0] == 9
    np.testing.assert_allclose(scores, exact_scores, rtol=1e-5)
    assert items.dtype == np.int32


def test_more_neighbours_than_items_are_all_items(bundle: Bundle):
    items, _ = AnnIndex(bundle.ann_path, 60, VECTOR_DIM).search(np.ones(VECTOR_DIM, dtype=np.float32), 1000)
    assert sorted(items.tolist()) == list(range(1, 61))


def test_a_model_of_another_signature_is_refused(bundle: Bundle):
    with pytest.raises(ModelFault, match="tokens"):
        OnnxTower(bundle.model_path(QUERY_TOWER), USER_TOWER)


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: pathlib.Path):
    path = tmp_path / "user_tower.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelFault, match=r"user_tower\.onnx"):
        OnnxTower(path, USER_TOWER)


def test_an_index_that_cannot_be_read_or_does_not_fit_is_refused(bundle: Bundle, tmp_path: pathlib.Path):
    with pytest.raises(ModelFault, match="60 vectors of 64"):
        AnnIndex(bundle.ann_path, 61, VECTOR_DIM)
    broken = tmp_path / "ann.faiss"
    broken.write_bytes(b"nonsense")
    with pytest.raises(ModelFault, match=r"ann\.faiss"):
        AnnIndex(broken, 60, VECTOR_DIM)


def test_a_bundle_that_needs_a_later_onnx_runtime_is_refused(bundle: Bundle):
    later = msgspec.structs.replace(bundle.manifest, requires=Requires(onnxruntime="99.1"))
    with pytest.raises(ModelFault, match=r"needs ONNX Runtime 99\.1 or later"):
        open_retriever(dataclasses.replace(bundle, manifest=later))
