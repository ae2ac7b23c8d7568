"""From one CandidatesQuery to its answer, over one bundle and the deltas on top of it.

The sources of `recommend` and the way they are fused are `workloads.data.fusion`'s, the functions that
training made the ranker's lists with. Queries are checked here against the bundle, so that no index out of
range, no NaN and no wrong length reaches a model. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from workloads.bundle.store import Bundle
from workloads.contract.events import QUERY_MAX
from workloads.contract.http import CandidatesAnswer, CandidatesQuery
from workloads.contract.slo import CANDIDATES_RANKED
from workloads.contract.tensors import CONTEXT, PAD, QUERY_TOWER, USER_TOWER, VECTOR_DIM
from workloads.data import fusion
from workloads.data.features import ItemTables, stand_ins, user_inputs
from workloads.data.fusion import Candidates, Proposals
from workloads.models import text
from workloads.retrieval.dense import ONNXRUNTIME, AnnIndex, ModelFault, Nearest, OnnxTower, Tower, Vector
from workloads.retrieval.lexical import LexicalIndex

LEXICAL_LIMIT: Final = 400
"""Items that a search proposes by words; as many as by vector."""

HISTORY_MAX: Final = 1000
"""Items of history that a query may carry; a profile holds fewer."""
AGE_MAX_HOURS: Final = 1e6
STRENGTH_MAX: Final = 1e3

Ints = npt.NDArray[np.int32]

Observe = Callable[[str, float], None]
"""Called with a source or step and its milliseconds."""


class QueryFault(Exception):  # noqa: N818 - as BundleFault
    """A query that this bundle cannot answer: `field` at fault and the `rule` it breaks."""

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{rule} - at `{field}`")
        self.field = field
        self.rule = rule


@dataclasses.dataclass(frozen=True)
class History:
    """What the user touched, oldest first; arrays [n]."""

    items: Ints
    strengths: npt.NDArray[np.float32]
    ages: npt.NDArray[np.float32]


class Retriever:
    """All candidate sources of one bundle; made once, used by one thread.

    Towers, index and lexical search come in through their doors; `open_retriever` makes the real ones.
    """

    def __init__(
        self,
        bundle_id: str,
        tables: ItemTables,
        *,
        user_tower: Tower,
        query_tower: Tower,
        nearest: Nearest,
        lexical: LexicalIndex,
        weights: Mapping[str, float],
        known: int | None = None,
        delta: int = 0,
        observe: Observe = lambda _step, _ms: None,
    ) -> None:
        """`known` items have a row in the user tower (None: all); later ones came with `delta` deltas."""
        self.bundle_id = bundle_id
        self.delta = delta
        self._tables = tables
        self._items = len(tables.category) - 1
        self._known = self._items if known is None else known
        self._user_tower = user_tower
        self._query_tower = query_tower
        self._nearest = nearest
        self._lexical = lexical
        self._weights = weights
        self._observe = observe
        self._popular = fusion.popular_items(
            tables.popularity_recent, tables.popularity, tables.in_stock, fusion.POPULAR_LIMIT
        )

    def candidates(self, query: CandidatesQuery) -> CandidatesAnswer:
        """The answer to a query of this bundle. Raises QueryFault."""
        history = self._checked_history(query)
        exclude = self._checked_items("$.exclude", query.exclude)
        if query.kind == "recommend":
            found = self._recommend(query, history, exclude)
        elif query.kind == "search":
            found = self._search(query, exclude)
        else:
            found = self._similar(query, history, exclude)
        return found.answer(self.bundle_id, self.delta)

    def warm_up(self) -> None:
        """Ask for each kind, so that the first caller does not pay for first-time allocations."""
        touched = [1][: self._items]
        kinds: tuple[Literal["recommend", "search", "similar"], ...] = ("recommend", "search", "similar")
        for kind in kinds * 3:
            self.candidates(
                CandidatesQuery(
                    bundle=self.bundle_id,
                    delta=self.delta,
                    kind=kind,
                    history=touched,
                    history_strength=[1.0 for _ in touched],
                    history_age_hours=[1.0 for _ in touched],
                    context=[0.0, 1.0, 0.0, 1.0],
                    query="warm up",
                    count=CANDIDATES_RANKED,
                )
            )

    def _recommend(self, query: CandidatesQuery, history: History, exclude: Ints) -> Candidates:
        begun = time.perf_counter()
        touched = stand_ins(history.items, self._tables.neighbours, self._known)
        inputs = user_inputs(touched, history.strengths, history.ages, self._checked_context(query))
        vector = self._user_tower.vector(inputs)
        begun = self._lap("user_tower", begun)
        ann = _NOBODY if vector is None else self._nearest.search(vector, fusion.ann_count(len(exclude)))
        begun = self._lap("ann", begun)
        sources = fusion.recommend_sources(
            history.items,
            history.strengths,
            history.ages,
            ann=ann,
            neighbours=self._tables.neighbours,
            neighbour_scores=self._tables.neighbour_scores,
            popular=self._popular,
            exclude=exclude,
        )
        begun = self._lap("item_to_item", begun)
        return self._fuse(sources, vector, exclude, query.count, begun)

    def _search(self, query: CandidatesQuery, exclude: Ints) -> Candidates:
        words = _checked_text(query.query)
        begun = time.perf_counter()
        lexical = self._lexical.search(words, LEXICAL_LIMIT)
        begun = self._lap("lexical", begun)
        sources = {"lexical": lexical}
        tokens = text.token_ids(words)
        vector = self._query_tower.vector({"tokens": tokens[None, :]}) if tokens[0] != PAD else None
        begun = self._lap("query_tower", begun)
        if vector is not None:
            sources["vector"] = self._nearest.search(vector, fusion.ann_count(len(exclude)))
            begun = self._lap("ann", begun)
        elif not len(lexical[0]):
            sources["popular"] = self._popular  # nothing that could be matched: what most people look for
        return self._fuse(sources, vector, exclude, query.count, begun)

    def _similar(self, query: CandidatesQuery, history: History, exclude: Ints) -> Candidates:
        begun = time.perf_counter()
        if not len(history.items):
            return self._fuse({"popular": self._popular}, None, exclude, query.count, begun)
        item = history.items[-1:]
        exclude = np.union1d(exclude, item)
        vector = self._tables.vectors[item[0]]
        sources = {"vector": self._nearest.search(vector, fusion.ann_count(len(exclude)))}
        begun = self._lap("ann", begun)
        sources["item_to_item"] = fusion.item_to_item_scores(
            item,
            history.strengths[-1:],
            history.ages[-1:],
            self._tables.neighbours,
            self._tables.neighbour_scores,
            exclude=exclude,
        )
        begun = self._lap("item_to_item", begun)
        return self._fuse(sources, vector, exclude, query.count, begun)

    def _fuse(
        self, sources: Mapping[str, Proposals], vector: Vector | None, exclude: Ints, count: int, begun: float
    ) -> Candidates:
        found = fusion.fuse(sources, self._tables.vectors, vector, exclude, count, weights=self._weights)
        self._lap("fuse", begun)
        return found

    def _lap(self, step: str, begun: float) -> float:
        now = time.perf_counter()
        self._observe(step, (now - begun) * 1000)
        return now

    def _checked_history(self, query: CandidatesQuery) -> History:
        """The history as arrays, unknown items left out."""
        length = len(query.history)
        if length > HISTORY_MAX:
            raise QueryFault("$.history", f"Expected `array` of length <= {HISTORY_MAX}")
        for name in ("history_strength", "history_age_hours"):
            if len(getattr(query, name)) != length:
                raise QueryFault(f"$.{name}", f"Expected `array` of length {length}, that of `history`")
        items = self._checked_items("$.history", query.history)
        strengths = _checked_numbers("$.history_strength", query.history_strength, 0.0, STRENGTH_MAX)
        ages = _checked_numbers("$.history_age_hours", query.history_age_hours, 0.0, AGE_MAX_HOURS)
        known = items != PAD
        return History(items, strengths, ages) if known.all() else History(items[known], strengths[known], ages[known])

    def _checked_items(self, field: str, items: Sequence[int]) -> Ints:
        for place, item in enumerate(items):
            if not PAD <= item <= self._items:
                raise QueryFault(f"{field}[{place}]", f"Expected an item index, {PAD} to {self._items}, not {item}")
        return np.array(items, dtype=np.int32)

    @staticmethod
    def _checked_context(query: CandidatesQuery) -> npt.NDArray[np.float32]:
        if len(query.context) != len(CONTEXT):
            raise QueryFault("$.context", f"Expected `array` of length {len(CONTEXT)}: {', '.join(CONTEXT)}")
        return _checked_numbers("$.context", query.context, -1.0, 1.0)


def open_retriever(bundle: Bundle, observe: Observe = lambda _step, _ms: None) -> Retriever:
    """A retriever over an opened bundle, warmed up. Raises ModelFault when a model or the index does not fit it."""
    if unmet := bundle.manifest.requires.unmet(onnxruntime=ONNXRUNTIME):
        raise ModelFault(f"the bundle {unmet}")
    # Plain arrays: numpy's memmap type pays for its bookkeeping on every operation.
    tables = ItemTables.of({name: table.view(np.ndarray) for name, table in bundle.tables.items()})
    retriever = Retriever(
        bundle.id,
        tables,
        user_tower=OnnxTower(bundle.model_path(USER_TOWER), USER_TOWER),
        query_tower=OnnxTower(bundle.model_path(QUERY_TOWER), QUERY_TOWER),
        nearest=AnnIndex(bundle.ann_path, bundle.base_items, VECTOR_DIM, tables.vectors[bundle.base_items + 1 :]),
        lexical=LexicalIndex(
            bundle.text("title"), bundle.text("category"), bundle.text("description"), tables.popularity
        ),
        weights=bundle.features.fusion,
        known=bundle.base_items,
        delta=bundle.delta,
        observe=observe,
    )
    retriever.warm_up()
    return retriever


def _checked_numbers(field: str, values: Sequence[float], least: float, most: float) -> npt.NDArray[np.float32]:
    """The values as an array; the comparison finds NaN, too, which is in no range."""
    for place, value in enumerate(values):
        if not least <= value <= most:
            raise QueryFault(f"{field}[{place}]", f"Expected a number from {least:g} to {most:g}")
    return np.array(values, dtype=np.float32)


def _checked_text(query: str | None) -> str:
    if query is None or not query.strip():
        raise QueryFault("$.query", "Expected `str` with at least one visible character")
    if len(query) > QUERY_MAX:
        raise QueryFault("$.query", f"Expected `str` of length <= {QUERY_MAX}")
    return query


_NOBODY: Final[Proposals] = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))
