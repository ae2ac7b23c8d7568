"""Which candidates a query gets, with towers whose vectors are known."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import pytest

from workloads.contract.http import SOURCES, CandidatesQuery
from workloads.contract.tensors import ITEM_TABLES, NEIGHBOURS, VECTOR_DIM
from workloads.data import fusion
from workloads.data.features import ItemTables
from workloads.data.fusion import Candidates
from workloads.retrieval.dense import ExactNearest, FixedTower, Vector
from workloads.retrieval.lexical import LexicalIndex
from workloads.retrieval.retriever import HISTORY_MAX, QueryFault, Retriever

N = 30
BUNDLE = "b" * 64


def unit(axis: int) -> Vector:
    vector = np.zeros(VECTOR_DIM, dtype=np.float32)
    vector[axis] = 1.0
    return vector


def make_tables() -> ItemTables:
    """Item i points along axis i; its neighbours are i + 1 and i + 2; popularity falls with the index."""
    axes = {"N+1": N + 1, "VECTOR_DIM": VECTOR_DIM, "NEIGHBOURS": NEIGHBOURS}
    arrays = {name: np.zeros([axes[a] for a in shape], dtype) for name, (dtype, shape) in ITEM_TABLES.items()}
    index = np.arange(N + 1)
    arrays["vectors"][1:] = np.eye(VECTOR_DIM, dtype=np.float32)[1 : N + 1]
    arrays["popularity"][1:] = 1.0 / index[1:]
    arrays["popularity_recent"][1:] = 1.0 / index[1:]
    arrays["in_stock"][1:] = 1
    for step in (1, 2):
        arrays["neighbours"][1 : N + 1 - step, step - 1] = index[1 + step :]
        arrays["neighbour_scores"][1 : N + 1 - step, step - 1] = 1.0 / step
    return ItemTables.of(arrays)


class Found(NamedTuple):
    """An answer, in plain numbers."""

    items: list[int]
    scores: list[float]
    ann: list[float]
    source: list[int]


class Bench:
    """A retriever over known tables, and its fakes."""

    def __init__(self) -> None:
        self.tables = make_tables()
        self.user_tower = FixedTower(unit(20))
        self.query_tower = FixedTower(unit(25))
        self.steps: dict[str, float] = {}
        titles = ["", *(f"thing number{i}" for i in range(1, N + 1))]
        self.retriever = Retriever(
            BUNDLE,
            self.tables,
            user_tower=self.user_tower,
            query_tower=self.query_tower,
            nearest=ExactNearest(self.tables.vectors),
            lexical=LexicalIndex(titles, [""] * (N + 1), [""] * (N + 1), self.tables.popularity),
            weights={},
            observe=self.steps.__setitem__,
        )

    def ask(
        self,
        kind: Literal["recommend", "search", "similar"] = "recommend",
        history: list[int] | None = None,
        **changes: Any,  # noqa: ANN401 - fields of the query
    ) -> Found:
        history = history or []
        fields: dict[str, Any] = {
            "bundle": BUNDLE,
            "kind": kind,
            "history": history,
            "history_strength": [1.0] * len(history),
            "history_age_hours": [1.0] * len(history),
            "context": [0.0, 1.0, 0.0, 1.0],
            "count": 10,
            **changes,
        }
        found = Candidates.read(self.retriever.candidates(CandidatesQuery(**fields)))
        return Found(found.items.tolist(), found.scores.tolist(), found.ann.tolist(), found.source.tolist())


@pytest.fixture
def bench() -> Bench:
    return Bench()


def sources(answer: Found) -> dict[int, str]:
    return {item: SOURCES[source] for item, source in zip(answer.items, answer.source, strict=True)}


def test_an_empty_history_gets_popular_items_and_those_near_its_vector(bench: Bench):
    found = sources(bench.ask())
    assert found[20] == "ann"
    assert found[1] == "popular" or 1 in found
    assert (bench.user_tower.asked["history"] == 0).all()


def test_a_history_brings_its_neighbours_and_itself(bench: Bench):
    found = sources(bench.ask(history=[5]))
    assert found[5] == "history"
    assert found[6] == "item_to_item"
    assert found[20] == "ann"


def test_serving_proposes_what_training_was_given(bench: Bench):
    history = np.array([5, 9], dtype=np.int32)
    strengths, ages = np.array([1.0, 0.3], dtype=np.float32), np.array([30.0, 2.0], dtype=np.float32)
    tables = bench.tables
    expected = fusion.fuse(
        fusion.recommend_sources(
            history,
            strengths,
            ages,
            ann=ExactNearest(tables.vectors).search(unit(20), fusion.ann_count(1)),
            neighbours=tables.neighbours,
            neighbour_scores=tables.neighbour_scores,
            popular=fusion.popular_items(
                tables.popularity_recent, tables.popularity, tables.in_stock, fusion.POPULAR_LIMIT
            ),
        ),
        tables.vectors,
        unit(20),
        [3],
        12,
    )
    answer = bench.ask(
        history=[5, 9],
        history_strength=strengths.tolist(),
        history_age_hours=ages.tolist(),
        exclude=[3],
        count=12,
    )
    assert answer.items == expected.items.tolist()
    assert answer.scores == expected.scores.tolist()
    assert answer.ann == expected.ann.tolist()
    assert answer.source == expected.source.tolist()


def test_unknown_items_of_a_history_are_left_out(bench: Bench):
    assert bench.ask(history=[0, 5, 0]) == bench.ask(history=[5])


def test_a_search_fuses_words_and_vector(bench: Bench):
    found = sources(bench.ask("search", query="number7", count=N))
    assert 7 in list(found)[:3]
    assert found[7] == "lexical"
    assert found[25] == "vector"
    assert bench.query_tower.asked["tokens"].shape == (1, 32)


def test_a_search_without_a_word_answers_what_is_popular(bench: Bench):
    answer = bench.ask("search", query="!?")
    assert set(sources(answer).values()) == {"popular"}
    assert answer.items[0] == 1


def test_similar_items_are_neighbours_by_behaviour_and_by_vector_and_never_the_item(bench: Bench):
    answer = bench.ask("similar", history=[5])
    found = sources(answer)
    assert found[6] == "item_to_item"
    assert "vector" in found.values()
    assert 5 not in found
    assert answer.ann[answer.items.index(6)] == 0.0


def test_an_unknown_item_gets_popular_ones(bench: Bench):
    assert sources(bench.ask("similar", history=[0])) == sources(bench.ask("similar"))
    assert set(sources(bench.ask("similar")).values()) == {"popular"}


def test_a_tower_without_a_usable_vector_costs_a_source_and_not_the_answer(bench: Bench):
    bench.user_tower.given = bench.query_tower.given = None
    assert "ann" not in sources(bench.ask(history=[5])).values()
    assert bench.ask(history=[5]).ann == [0.0] * 10
    assert sources(bench.ask("search", query="number7"))[7] == "lexical"


@pytest.mark.parametrize("kind", ["recommend", "search", "similar"])
def test_excluded_items_are_not_answered_and_the_count_holds(
    bench: Bench, kind: Literal["recommend", "search", "similar"]
):
    whole = bench.ask(kind, history=[5], query="number7", count=2000)
    assert len(whole.items) == len(set(whole.items)) <= N
    less = bench.ask(kind, history=[5], query="number7", exclude=whole.items[:4], count=3)
    assert less.items == whole.items[4:7]


def test_every_item_excluded_is_an_empty_answer(bench: Bench):
    assert bench.ask(exclude=list(range(1, N + 1))).items == []


def test_every_source_is_timed(bench: Bench):
    bench.ask(history=[5])
    bench.ask("search", query="number7")
    assert set(bench.steps) == {"user_tower", "ann", "item_to_item", "fuse", "lexical", "query_tower"}


def test_weights_of_the_bundle_decide_who_leads():
    bench = Bench()
    bench.retriever._weights = {"popular": 100.0}
    assert set(sources(bench.ask(history=[5])).values()) == {"popular"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"history": [N + 1]}, "$.history[0]"),
        ({"history": [1, -1]}, "$.history[1]"),
        ({"history": [2**63 - 1]}, "$.history[0]"),
        ({"history": [1] * (HISTORY_MAX + 1)}, "$.history"),
        ({"history": [1], "history_strength": []}, "$.history_strength"),
        ({"history": [1], "history_age_hours": [1.0, 2.0]}, "$.history_age_hours"),
        ({"history": [1], "history_strength": [float("nan")]}, "$.history_strength[0]"),
        ({"history": [1], "history_age_hours": [float("inf")]}, "$.history_age_hours[0]"),
        ({"history": [1], "history_age_hours": [-1.0]}, "$.history_age_hours[0]"),
        ({"exclude": [5, N + 1]}, "$.exclude[1]"),
        ({"context": [0.0, 1.0, 0.0]}, "$.context"),
        ({"context": [0.0, float("nan"), 0.0, 1.0]}, "$.context[1]"),
        ({"context": [0.0, 7.0, 0.0, 1.0]}, "$.context[1]"),
        ({"kind": "search", "query": None}, "$.query"),
        ({"kind": "search", "query": " \t"}, "$.query"),
        ({"kind": "search", "query": "x" * 257}, "$.query"),
    ],
)
def test_a_query_that_the_bundle_cannot_answer_is_refused_with_the_field(
    bench: Bench, changes: dict[str, Any], field: str
):
    with pytest.raises(QueryFault) as caught:
        bench.ask(**changes)
    assert caught.value.field == field
    assert caught.value.rule


def test_warming_up_asks_for_each_kind(bench: Bench):
    bench.retriever.warm_up()
    assert {"user_tower", "query_tower", "lexical"} <= set(bench.steps)
