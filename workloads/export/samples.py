"""Real inputs for the models, drawn from the data set: what parity and recall are measured on.

Requests stand at moments at which sampled people really did something, and see only what came before.
Everything goes through the functions that serving uses (`workloads.data.features`, `.fusion`,
`workloads.models.text`). Deterministic under a seed; no model is loaded here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from workloads.bundle.probes import ROWS, write_probes
from workloads.bundle.tables import Array
from workloads.contract.slo import CANDIDATES_RANKED
from workloads.contract.tensors import HISTORY_LENGTH, IMAGE_DIM, RANKER, FeatureSchema
from workloads.data.dataset import Dataset
from workloads.data.features import EVENT_TYPES, ItemTables, UserState, item_inputs, rank_features, user_inputs
from workloads.data.fusion import ann_count, fuse, popular_items, recommend_sources
from workloads.models.text import item_text, token_table

USERS: Final = 512
QUERIES: Final = 256
LISTS: Final = 64
"""Candidate lists whose ranking is compared."""
_CODES: Final = {kind.value: code for code, kind in enumerate(EVENT_TYPES)}


@dataclasses.dataclass(frozen=True)
class RankedList:
    """The ranker's inputs for one request's candidates."""

    sparse: Array
    dense: Array


def user_states(dataset: Dataset, *, count: int = USERS, seed: int = 0) -> list[UserState]:
    """At most `count` people, each at the moment of one of their events."""
    random = np.random.default_rng(seed)
    people = dataset.events["user"].drop_nulls().unique().sort()
    if not len(people):
        return []
    drawn = people.gather(np.sort(random.choice(len(people), min(count, len(people)), replace=False)))
    index = {item: place for place, item in enumerate(dataset.items["item"].to_list(), start=1)}
    theirs = dataset.events.filter(pl.col("user").is_in(drawn.implode()))
    states = []
    for (_,), log in theirs.sort("user", "timestamp_ms", maintain_order=True).group_by("user", maintain_order=True):
        times = log["timestamp_ms"].to_numpy()
        items = log["item"].replace_strict(index, default=0, return_dtype=pl.Int32).to_numpy()
        types = log["type"].cast(pl.String).replace_strict(_CODES, return_dtype=pl.Int64).to_numpy()
        states.append(UserState.from_events(items, types, times, int(random.choice(times))))
    return states


def tower_inputs(states: list[UserState]) -> dict[str, Array]:
    """The user tower's inputs, a row for each state and a last one for somebody unknown."""
    rows = [user_inputs(state.items, state.strength, state.age_hours, state.context) for state in states]
    unknown = np.zeros(0)
    rows.append(user_inputs(unknown, unknown, unknown, states[-1].context if states else np.zeros(4)))
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def query_tokens(dataset: Dataset, *, count: int = QUERIES, seed: int = 0) -> Array:
    """Tokens [Q, TEXT_TOKENS] of at most `count` real queries, or of titles where nobody ever searched."""
    texts = dataset.events["query"].drop_nulls().unique().sort()
    if not len(texts):
        texts = dataset.items["title"].unique().sort()
    random = np.random.default_rng(seed)
    return token_table(
        texts.gather(np.sort(random.choice(len(texts), min(count, len(texts)), replace=False))).to_list()
    )


def catalogue_inputs(dataset: Dataset, tables: ItemTables, schema: FeatureSchema) -> dict[str, Array]:
    """The item tower's inputs for rows 0 to N, as they stood at the schema's reference moment."""
    titles, categories = dataset.items["title"].to_list(), dataset.items["category"].to_list()
    tokens = token_table(["", *map(item_text, titles, categories)])
    image = np.zeros((len(tokens), IMAGE_DIM), np.float32)
    for row, values in enumerate(dataset.items["image"].to_list(), start=1):
        if values:
            image[row] = values
    return item_inputs(
        category=tables.category,
        price=tables.price,
        popularity=tables.popularity,
        first_seen_ms=tables.first_seen_ms,
        tokens=tokens,
        image=image,
        reference_ms=schema.reference_ms,
    )


def ranked_lists(
    states: list[UserState], users: Array, tables: ItemTables, schema: FeatureSchema, *, count: int = LISTS
) -> list[RankedList]:
    """What the ranker would be asked for the first `count` states; `users` [S, D] are their vectors."""
    popular = popular_items(tables.popularity_recent, tables.popularity, tables.in_stock)
    lists = []
    for state, vector in list(zip(states, users, strict=False))[:count]:
        scores = tables.vectors[1:] @ vector
        nearest = np.argsort(-scores, kind="stable")[: ann_count(0)]
        sources = recommend_sources(
            state.items[-HISTORY_LENGTH:],
            state.strength[-HISTORY_LENGTH:],
            state.age_hours[-HISTORY_LENGTH:],
            ann=((nearest + 1).astype(np.int32), scores[nearest]),
            neighbours=tables.neighbours,
            neighbour_scores=tables.neighbour_scores,
            popular=popular,
        )
        candidates = fuse(sources, tables.vectors, vector, (), CANDIDATES_RANKED, weights=schema.fusion)
        sparse, dense = rank_features(state, candidates, tables, schema)
        lists.append(RankedList(sparse, dense))
    return lists


def record(lists: Sequence[RankedList], run: Callable[[dict[str, Array]], Array], path: Path) -> None:
    """Write the bundle's recorded requests: rows spread evenly over `lists`, and what the ranker `run` answers.

    A data set without a single list is asked about nobody and nothing.
    """
    inputs = {
        spec.name: np.concatenate([getattr(one, spec.name) for one in lists])
        if lists
        else np.zeros((1, *spec.shape), spec.dtype)
        for spec in RANKER.inputs
    }
    there = len(inputs[RANKER.inputs[0].name])
    places = np.unique(np.linspace(0, there - 1, min(ROWS, there)).astype(np.int64))
    chosen = {name: values[places] for name, values in inputs.items()}
    write_probes(path, chosen, run(chosen))
