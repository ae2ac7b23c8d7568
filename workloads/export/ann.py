"""The vector index of a bundle: exact while that is quick, a graph above, and its recall measured either way."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import faiss
import numpy as np

from workloads.bundle.manifest import AnnFigures
from workloads.bundle.tables import Array

EXACT_BELOW: Final = 20_000
"""Items: below this a whole scan takes a fraction of a millisecond, and is exact."""
LINKS: Final = 32
"""M of HNSW (Malkov and Yashunin, TPAMI 2020)."""
EF_CONSTRUCTION: Final = 200
EF_SEARCH: Final = 128
RECALL_AT: Final = 10


def build_index(vectors: Array, *, exact_below: int = EXACT_BELOW) -> tuple[faiss.Index, str]:
    """An inner product index over item vectors [N, D] and its kind; position r is item index r + 1.

    Built by one thread: a graph that several build at once differs from run to run.
    """
    width = vectors.shape[1]
    index: faiss.Index
    if len(vectors) < exact_below:
        index, kind = faiss.IndexFlatIP(width), "flat"
    else:
        graph = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        graph.hnsw.efSearch = EF_SEARCH
        index, kind = graph, "hnsw"
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        index.add(np.ascontiguousarray(vectors, np.float32))
    finally:
        faiss.omp_set_num_threads(threads)
    return index, kind


def write_index(vectors: Array, queries: Array, path: Path, *, exact_below: int = EXACT_BELOW) -> AnnFigures:
    """Build the index, write it, read it back and measure what was read with real query vectors [Q, D]."""
    index, kind = build_index(vectors, exact_below=exact_below)
    faiss.write_index(index, str(path))
    return AnnFigures(
        kind=kind,
        items=len(vectors),
        recall_at_10=recall(faiss.read_index(str(path)), vectors, queries),
        queries=len(queries),
        ef_search=EF_SEARCH if kind == "hnsw" else None,
    )


def recall(index: faiss.Index, vectors: Array, queries: Array) -> float:
    """Share of the exact top 10 that the index finds; 1 without queries.

    An item whose score ties with the tenth counts as found: which of equals comes back means nothing.
    """
    if not len(queries):
        return 1.0
    k = min(RECALL_AT, len(vectors))
    exact = queries @ vectors.T  # [Q, N]
    tenth = -np.partition(-exact, k - 1, axis=1)[:, k - 1 : k]  # [Q, 1]
    _, found = index.search(np.ascontiguousarray(queries, np.float32), k)
    scores = np.take_along_axis(exact, np.maximum(found, 0), axis=1)
    good = (found >= 0) & (scores >= tenth - 1e-6 * np.maximum(1.0, np.abs(tenth)))
    return float(good.mean())
