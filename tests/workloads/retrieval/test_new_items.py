"""Items of deltas in the candidates: found by vector, words and neighbours, and never shown to a model."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from workloads.bundle.delta import write_delta
from workloads.bundle.fake import CREATED_MS, build_fake_bundle
from workloads.bundle.store import Bundle, open_bundle
from workloads.contract.http import SOURCES, CandidatesQuery
from workloads.contract.tensors import ITEM_TABLES, NEIGHBOURS, VECTOR_DIM
from workloads.data.fusion import Candidates
from workloads.retrieval.dense import AnnIndex
from workloads.retrieval.retriever import QueryFault, Retriever, open_retriever

N = 60
LIKE = 7
"""The bundle's item that the new item `new-2` (index N + 2) looks like."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=N))


@pytest.fixture(scope="module")
def bundle(base: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With two deltas of one item each; `new-1` looks like nothing, `new-2` almost exactly like item LIKE."""
    axes = {"N+1": 1, "VECTOR_DIM": VECTOR_DIM, "NEIGHBOURS": NEIGHBOURS}
    paths: list[Path] = []
    for number in (1, 2):
        tables = {name: np.zeros([axes[a] for a in shape], dtype) for name, (dtype, shape) in ITEM_TABLES.items()}
        tables["in_stock"][:] = 1
        if number == 2:
            tables["vectors"][:] = base.tables["vectors"][LIKE] * 0.99
            tables["neighbours"][:, 0], tables["neighbour_scores"][:, 0] = LIKE, 0.2
        catalogue: dict[str, list[object]] = {
            "item": [f"new-{number}"],
            "title": ["Zeppelin shaped piggy bank"],
            "description": [""],
            "category": ["Kitchen"],
            "price": [None],
            "image": [[]],
            "first_seen_ms": [CREATED_MS],
            "in_stock": [True],
        }
        facts = open_bundle(base.path, paths).next_delta(CREATED_MS)
        paths.append(write_delta(tmp_path_factory.mktemp("deltas"), facts, catalogue, tables))
    return open_bundle(base.path, paths)


@pytest.fixture(scope="module")
def retriever(bundle: Bundle) -> Retriever:
    return open_retriever(bundle)


def ask(retriever: Retriever, kind: str, history: list[int], query: str | None = None) -> Candidates:
    answer = retriever.candidates(
        CandidatesQuery(
            bundle=retriever.bundle_id,
            delta=retriever.delta,
            kind=kind,  # type: ignore[arg-type]  # one of three words
            history=history,
            history_strength=[1.0] * len(history),
            history_age_hours=[1.0] * len(history),
            context=[0.0, 1.0, 0.0, 1.0],
            query=query,
            count=100,
        )
    )
    assert (answer.bundle, answer.delta) == (retriever.bundle_id, retriever.delta)
    return Candidates.read(answer)


def likeness(answer: Candidates) -> dict[int, float]:
    """How near each candidate is to the user's vector."""
    return dict(zip(answer.items.tolist(), answer.ann.tolist(), strict=True))


def sources(answer: Candidates) -> dict[int, str]:
    return {item: SOURCES[source] for item, source in zip(answer.items.tolist(), answer.source.tolist(), strict=True)}


def test_a_new_item_is_like_others_and_others_are_like_it(retriever: Retriever):
    assert next(iter(sources(ask(retriever, "similar", [N + 2])))) == LIKE
    found = sources(ask(retriever, "similar", [LIKE]))
    assert found[N + 2] == "vector"
    assert list(found).index(N + 2) < 10, "on the first page"


def test_a_new_item_is_found_by_its_words(retriever: Retriever):
    found = sources(ask(retriever, "search", [], "zeppelin bank"))
    assert {N + 1, N + 2} <= set(list(found)[:4])
    assert found[N + 1] == "lexical"


def test_a_new_item_in_a_history_stands_for_the_one_that_it_looks_like(retriever: Retriever):
    by_new, by_known = ask(retriever, "recommend", [N + 2]), ask(retriever, "recommend", [LIKE])
    assert likeness(by_new)[3] == likeness(by_known)[3]
    assert sources(by_new)[LIKE] in {"item_to_item", "ann"}


def test_a_new_item_without_a_stand_in_is_no_history_to_the_tower(retriever: Retriever):
    assert likeness(ask(retriever, "recommend", [N + 1]))[3] == likeness(ask(retriever, "recommend", []))[3]


def test_an_item_beyond_the_last_delta_is_refused(retriever: Retriever):
    with pytest.raises(QueryFault, match=f"0 to {N + 2}, not {N + 3}"):
        ask(retriever, "recommend", [N + 3])


@pytest.mark.usefixtures("retriever")
def test_the_index_file_stays_as_it_is(base: Bundle):
    assert AnnIndex(base.ann_path, N, VECTOR_DIM).search(np.ones(VECTOR_DIM, np.float32), 1000)[0].max() == N


def test_a_graph_index_takes_new_vectors_too(tmp_path: Path):
    random = np.random.default_rng(0)
    vectors = random.normal(size=(500, VECTOR_DIM)).astype(np.float32)
    graph = faiss.IndexHNSWFlat(VECTOR_DIM, 16, faiss.METRIC_INNER_PRODUCT)
    graph.add(vectors)
    faiss.write_index(graph, str(tmp_path / "ann.faiss"))
    added = 3 * random.normal(size=(20, VECTOR_DIM)).astype(np.float32)
    index = AnnIndex(tmp_path / "ann.faiss", 500, VECTOR_DIM, added)
    found = [int(index.search(vector, 1)[0][0]) for vector in added]
    assert found == list(range(501, 521))
    near, scores = index.search(vectors[4], 600)
    np.testing.assert_allclose(scores, np.concatenate([vectors, added])[near - 1] @ vectors[4], rtol=1e-4, atol=1e-4)
