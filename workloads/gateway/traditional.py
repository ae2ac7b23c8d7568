"""Rung 4: item-to-item, popularity and the words of titles, from tables inside the gateway.

Answers with everything else dead, and when a client asks for no model. It is the kNN and the
popularity row of the quality table, made with the same functions. It calls nobody and it waits for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from workloads.contract.tensors import PAD
from workloads.data.features import ItemTables, UserState
from workloads.data.fusion import SOURCE_INDEX, Candidates, item_to_item_scores, popular_items

Ints = npt.NDArray[np.int32]

POPULAR_KEPT: Final = 2000
"""Popular items that are held ready: more than any answer plus what it leaves out."""

_WORD: Final = re.compile(r"\w+")


class Traditional:
    """The traditional recommender of one bundle. `titles` is by item index, `titles[0]` unused."""

    def __init__(self, tables: ItemTables, titles: Sequence[str]) -> None:
        self._tables = tables
        self.popular, self._popular_scores = popular_items(
            tables.popularity_recent, tables.popularity, tables.in_stock, POPULAR_KEPT
        )
        self._by_word = _index(titles)

    def recommend(self, state: UserState) -> Candidates:
        """Items that go with a history, best first; popular ones where there is no history."""
        tables = self._tables
        items, scores = item_to_item_scores(
            state.items, state.strength, state.age_hours, tables.neighbours, tables.neighbour_scores
        )
        return self._or_popular(items, scores, "item_to_item")

    def similar(self, item: int) -> Candidates:
        """Neighbours of an item (its index; PAD: unknown), best first; popular ones where it has none."""
        items, scores = self._tables.neighbours[item], self._tables.neighbour_scores[item]
        known = items != PAD
        return self._or_popular(items[known], scores[known], "item_to_item")

    def search(self, query: str) -> Candidates:
        """Items whose titles hold most of the query's words, the rarer words weighing more, then by popularity.

        Popular ones where no title holds any.
        """
        rows = len(self._tables.popularity)
        dense = np.zeros(rows, dtype=np.float32)
        for word in set(_WORD.findall(query.casefold())):
            found = self._by_word.get(word)
            if found is not None:
                dense[found] += np.float32(np.log1p(rows / len(found)))
        items = np.flatnonzero(dense).astype(np.int32)
        values = dense[items]
        order = np.lexsort((items, -self._tables.popularity[items], -values))
        return self._or_popular(items[order], values[order], "lexical")

    def _or_popular(self, items: Ints, scores: npt.NDArray[np.float32], source: str) -> Candidates:
        if not len(items):
            items, scores, source = self.popular, self._popular_scores, "popular"
        return Candidates(
            items=items,
            scores=scores,
            ann=np.zeros(len(items), dtype=np.float32),
            source=np.full(len(items), SOURCE_INDEX[source], dtype=np.int32),
        )


def _index(titles: Iterable[str]) -> dict[str, Ints]:
    """For each word of the titles the indices of the items that have it."""
    found: dict[str, list[int]] = {}
    for item, title in enumerate(titles):
        if item != PAD:
            for word in set(_WORD.findall(title.casefold())):
                found.setdefault(word, []).append(item)
    return {word: np.array(items, dtype=np.int32) for word, items in found.items()}
