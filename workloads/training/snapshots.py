"""Item tables as they stood at a cut: popularity and neighbours of what had happened by then."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from workloads.contract.tensors import VECTOR_DIM
from workloads.data.features import ItemTables, item_inputs
from workloads.models import item_knn, popularity
from workloads.training.journal import Catalogue, Journal


def tables_at(
    catalogue: Catalogue, journal: Journal, cut_ms: int, knn: item_knn.ItemKnnConfig
) -> dict[str, npt.NDArray[Any]]:
    """`contract.tensors.ITEM_TABLES` of all before `cut_ms`; `vectors` are zero until the towers give them."""
    past = journal.before(cut_ms).positives()
    known = past.take(np.flatnonzero(past.person >= 0))
    items = catalogue.items
    popular = popularity.all_time(known.person, known.item, items)
    visits = item_knn.Visits.of(past.sequences(), past.visit, past.item, past.strength, past.time_ms)
    neighbours, neighbour_scores = item_knn.fit(visits, items=items, cut_ms=cut_ms, config=knn)
    return {
        "vectors": np.zeros((items + 1, VECTOR_DIM), dtype=np.float32),
        "category": catalogue.category,
        "price": catalogue.price,
        "price_band": catalogue.price_band,
        "popularity": popular,
        "popularity_recent": popularity.recent(known.item, known.strength, known.time_ms, items=items, cut_ms=cut_ms),
        "popularity_category": popularity.within_category(popular, catalogue.category),
        "first_seen_ms": catalogue.first_seen_ms,
        "in_stock": catalogue.in_stock,
        "neighbours": neighbours,
        "neighbour_scores": neighbour_scores,
    }


def item_tower_inputs(catalogue: Catalogue, tables: ItemTables, cut_ms: int) -> dict[str, npt.NDArray[Any]]:
    """The item tower's inputs for all rows 0 to N as they stood at the cut."""
    return item_inputs(
        category=tables.category,
        price=tables.price,
        popularity=tables.popularity,
        first_seen_ms=tables.first_seen_ms,
        tokens=catalogue.tokens,
        image=catalogue.image,
        reference_ms=cut_ms,
    )
