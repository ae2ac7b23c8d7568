"""The fake bundle is a bundle: real models that keep the contract and agree with its tables."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.store import Bundle, open_bundle, verify
from workloads.contract.tensors import (
    CONTEXT,
    HISTORY_LENGTH,
    ITEM_TOWER,
    PAD,
    RANKER,
    RANKER_DENSE,
    SIGNATURES,
    STUDENT,
    TEXT_TOKENS,
    USER_TOWER,
    Signature,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=60))


def _run(bundle: Bundle, signature: Signature, **inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(bundle.model_path(signature))
    zeros = {
        spec.name: np.zeros((len(next(iter(inputs.values()))), *spec.shape), spec.dtype) for spec in signature.inputs
    }
    return np.asarray(session.run(None, zeros | inputs)[0])


def test_a_fake_bundle_passes_every_check(bundle: Bundle) -> None:
    assert verify(bundle.path) == bundle.manifest


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: signature.role)
def test_each_model_gives_what_its_signature_says_for_any_batch(bundle: Bundle, signature: Signature) -> None:
    for batch in (1, 7):
        inputs = {spec.name: np.ones((batch, *spec.shape), spec.dtype) for spec in signature.inputs}
        result = _run(bundle, signature, **inputs)
        assert result.shape == (batch, *signature.outputs[0].shape)
        assert result.dtype == signature.outputs[0].dtype
        assert np.isfinite(result).all()


def test_the_item_tower_repeats_the_vectors_of_the_tables(bundle: Bundle) -> None:
    items = np.arange(1, 61)
    np.testing.assert_allclose(_run(bundle, ITEM_TOWER, item=items), bundle.tables["vectors"][1:], atol=1e-6)


def test_the_item_tower_places_an_item_without_an_id_among_its_category(bundle: Bundle) -> None:
    tokens = np.arange(2 * TEXT_TOKENS).reshape(2, TEXT_TOKENS)
    placed = _run(bundle, ITEM_TOWER, item=np.array([PAD, PAD]), category=np.array([2, 2]), tokens=tokens)
    near = np.argsort(-(placed @ bundle.tables["vectors"].T), axis=1)[:, :5]
    assert (bundle.tables["category"][near] == 2).all()
    assert not np.allclose(placed[0], placed[1])


def test_the_index_finds_the_item_whose_vector_is_asked_for_at_its_index_less_one(bundle: Bundle) -> None:
    import faiss  # noqa: PLC0415 - slow to load, and only here

    _, found = faiss.read_index(str(bundle.ann_path)).search(np.array(bundle.tables["vectors"][[5, 17]]), 1)
    assert found[:, 0].tolist() == [4, 16]


def test_a_user_is_drawn_to_what_stands_in_the_history(bundle: Bundle) -> None:
    history = np.zeros((1, HISTORY_LENGTH), np.int64)
    history[0, -1] = 9
    strength = (history > 0).astype(np.float32)
    context = np.zeros((1, len(CONTEXT)), np.float32)
    vector = _run(bundle, USER_TOWER, history=history, history_strength=strength, context=context)
    assert int(np.argmax(bundle.tables["vectors"] @ vector[0])) == 9


@pytest.mark.parametrize("signature", [RANKER, STUDENT], ids=lambda signature: signature.role)
def test_the_ranker_prefers_the_better_retrieval_score(bundle: Bundle, signature: Signature) -> None:
    dense = np.zeros((2, len(RANKER_DENSE)), np.float32)
    dense[1, RANKER_DENSE.index("ann_score")] = 1.0
    low, high = _run(bundle, signature, dense=dense)[:, 0]
    assert 0 < low < high < 1


def test_the_student_says_nearly_what_the_ranker_says(bundle: Bundle) -> None:
    dense = np.random.default_rng(0).normal(size=(50, len(RANKER_DENSE))).astype(np.float32)
    sparse = np.random.default_rng(0).integers(0, 60, (50, 6))
    ranked, taught = (_run(bundle, one, sparse=sparse, dense=dense) for one in (RANKER, STUDENT))
    assert 0 < np.abs(ranked - taught).max() < 0.05


def test_the_fake_ladder_falls_from_rung_to_rung(bundle: Bundle) -> None:
    losses = [bundle.manifest.quality.loss(rung) for rung in (1, 2, 3, 4)]
    assert losses[0] == 0
    assert losses == sorted(losses)


def test_the_same_seed_gives_the_same_bundle_and_another_seed_another(tmp_path: Path) -> None:
    first = build_fake_bundle(tmp_path, items=20, seed=1)
    assert build_fake_bundle(tmp_path, items=20, seed=1) == first
    assert build_fake_bundle(tmp_path, items=20, seed=2) != first


def test_onnx_runtime_opened_by_our_code_leaves_no_trace_of_reporting(bundle: Bundle, tmp_path: Path) -> None:
    """Its telemetry begins with a session file and a device id in these directories."""
    code = "import sys, workloads, onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"
    places = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | places
    subprocess.run([sys.executable, "-c", code, str(bundle.model_path(RANKER))], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
