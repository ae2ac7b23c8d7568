"""The vector index: exact where it is small, good enough where it is a graph, and honest about which."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from workloads.bundle.verification import FAISS_KINDS
from workloads.export.ann import build_index, recall, write_index

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(800, 64)).astype(np.float32)
QUERIES = RANDOM.normal(size=(50, 64)).astype(np.float32)


def test_a_small_catalogue_gets_an_exact_index(tmp_path: Path) -> None:
    figures = write_index(VECTORS, QUERIES, tmp_path / "ann.faiss")
    assert (figures.kind, figures.recall_at_10, figures.ef_search) == ("flat", 1.0, None)
    assert FAISS_KINDS[(tmp_path / "ann.faiss").read_bytes()[:4]] == "flat"


def test_a_large_catalogue_gets_a_graph_whose_recall_is_measured(tmp_path: Path) -> None:
    figures = write_index(VECTORS, QUERIES, tmp_path / "ann.faiss", exact_below=100)
    assert figures.kind == "hnsw"
    assert figures.recall_at_10 > 0.95
    assert figures.queries == 50
    index = faiss.read_index(str(tmp_path / "ann.faiss"))
    assert FAISS_KINDS[(tmp_path / "ann.faiss").read_bytes()[:4]] == "hnsw"
    assert index.hnsw.efSearch == figures.ef_search
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT


def test_position_r_is_the_vector_of_row_r(tmp_path: Path) -> None:
    write_index(VECTORS, QUERIES, tmp_path / "ann.faiss")
    scores, found = faiss.read_index(str(tmp_path / "ann.faiss")).search(QUERIES[:1], 1)
    assert found[0, 0] == np.argmax(VECTORS @ QUERIES[0])
    assert scores[0, 0] == pytest.approx(float(np.max(VECTORS @ QUERIES[0])), rel=1e-5)


def test_two_builds_of_a_graph_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_index(VECTORS, QUERIES, tmp_path / name, exact_below=100)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_index_of_other_vectors_has_a_low_recall() -> None:
    other, _ = build_index(RANDOM.normal(size=VECTORS.shape).astype(np.float32))
    assert recall(other, VECTORS, QUERIES) < 0.2


def test_which_of_equals_comes_back_does_not_count() -> None:
    twins = np.repeat(VECTORS[:20], 40, axis=0)
    index, _ = build_index(twins)
    assert recall(index, twins, QUERIES) == 1.0


def test_fewer_items_than_ten_and_no_queries_are_no_fault() -> None:
    index, _ = build_index(VECTORS[:3])
    assert recall(index, VECTORS[:3], QUERIES) == 1.0
    assert recall(index, VECTORS[:3], QUERIES[:0]) == 1.0
