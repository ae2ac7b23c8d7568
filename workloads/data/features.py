"""The features of one request, the same function offline in training and online in the gateway.

A `UserState` is what is known of a user at one moment, made either from a profile
(`UserState.of`, online) or from the event log strictly before the moment (`UserState.from_events`,
training); nothing else reads behaviour. `rank_features` turns state, candidates and item tables into
the two inputs of the ranker, `user_inputs` a history into those of the user tower.

numpy only. It knows no file, clock or model; moments come in as milliseconds since 1970, UTC.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from workloads.contract.events import EventType
from workloads.contract.tensors import (
    CONTEXT,
    HISTORY_LENGTH,
    ITEM_TABLES,
    PAD,
    RANKER_DENSE,
    RANKER_SPARSE,
    STRENGTH,
    FeatureSchema,
)
from workloads.data.fusion import Candidates, item_to_item_of, touch_weights
from workloads.data.profiles import TOUCHES_MAX, Touch

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
DAYS_NEVER: Final = 1000.0
"""`days_since_touch` of an item that the user never touched."""

EVENT_TYPES: tuple[EventType, ...] = tuple(EventType)
"""Code of an event type in arrays: its place here."""
_STRENGTH_BY_CODE = np.array([STRENGTH.get(t, 0.0) for t in EVENT_TYPES], dtype=np.float32)
_PURCHASE = EVENT_TYPES.index(EventType.PURCHASE)
_SESSION_STRENGTH = STRENGTH[EventType.CLICK]
_LAST_THEN_ITEM = operator.itemgetter(4, 0)
_LOG_PLACES: Final = np.log1p(np.arange(1024)).astype(np.float32)
_NEVER_TOUCHED: Final = np.log1p(np.array([[0.0], [0.0], [DAYS_NEVER], [0.0]], dtype=np.float32))
"""log(1 + times, purchases, days since) and the share of an item that the user never touched, [4, 1]."""


class ItemColumns(NamedTuple):
    """Columns of the ranker's inputs that are the same for everybody, ready to be picked row by row."""

    sparse: npt.NDArray[np.int64]
    """The first three of RANKER_SPARSE, [N+1, 3]."""
    popularity: Floats
    """The three of RANKER_DENSE that say how popular an item is, [3, N+1]."""


@dataclasses.dataclass(frozen=True)
class ItemTables:
    """`contract.tensors.ITEM_TABLES` in memory; row 0 is PAD, all zero."""

    vectors: Floats
    category: Ints
    price: Floats
    price_band: Ints
    popularity: Floats
    popularity_recent: Floats
    popularity_category: Floats
    first_seen_ms: npt.NDArray[np.int64]
    in_stock: npt.NDArray[np.uint8]
    neighbours: Ints
    neighbour_scores: Floats

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> ItemTables:
        """The tables of a bundle's `item_tables.safetensors` as loaded.

        Raises ValueError that names the table missing, of the wrong type or of another length.
        """
        rows = len(arrays["category"]) if "category" in arrays else 0
        for name, (dtype, shape) in ITEM_TABLES.items():
            table = arrays.get(name)
            if table is None:
                raise ValueError(f"item table {name!r} is missing")
            if table.dtype != np.dtype(dtype) or table.ndim != len(shape) or len(table) != rows:
                raise ValueError(
                    f"item table {name!r} is {table.dtype} {table.shape}, expected {dtype} with {rows} rows of {shape}"
                )
        return cls(**{name: arrays[name] for name in ITEM_TABLES})

    @functools.cached_property
    def categories(self) -> int:
        """Rows of a table by category; 0 is unknown."""
        return int(self.category.max(initial=0)) + 1

    @functools.cached_property
    def log_price(self) -> Floats:
        """log(1 + price), [N+1]."""
        return np.log1p(self.price)

    def columns(self, known: int) -> ItemColumns:
        """For the ranker that knows so many items; made at the first call."""
        made = self._columns.get(known)
        if made is None:
            item = np.arange(len(self.category))
            made = self._columns[known] = ItemColumns(
                sparse=np.stack((np.where(item <= known, item, PAD), self.category, self.price_band), axis=1),
                popularity=np.stack(
                    (
                        relative(self.popularity, known),
                        relative(self.popularity_recent, known),
                        np.sqrt(self.popularity_category),
                    )
                ),
            )
        return made

    @functools.cached_property
    def _columns(self) -> dict[int, ItemColumns]:
        return {}


@dataclasses.dataclass(frozen=True)
class UserState:
    """What is known of one user at one moment: distinct items touched, oldest first, all arrays [n]."""

    items: Ints
    """Item indices; never PAD, never twice."""
    strength: Floats
    """`touch_strength`: what the towers and item-to-item read."""
    age_hours: Floats
    """Since the last touch."""
    count: Floats
    """Positive events with the item."""
    bought: Floats
    """Purchases of it."""
    context: Floats
    """`contract.tensors.CONTEXT` of the moment, [4]."""
    now_ms: int

    @classmethod
    def of(
        cls,
        touches: Iterable[Touch],
        session_history: Sequence[str],
        now_ms: int,
        index: Mapping[str, int],
    ) -> UserState:
        """The state from a profile's touches and the items of this session, oldest first.

        `index` maps item ids to indices of the bundle; ids it does not know are left out. A session
        item counts as one more click, just now.
        """
        clicks: dict[int, int] = {}
        for item in session_history:
            at = index.get(item)
            if at is not None:
                clicks[at] = clicks.pop(at, 0) + 1  # popped and put back: the last click decides the order
        known: dict[int, Touch] = {}
        for touch in touches:
            at = index.get(touch.item)
            if at is not None:
                known[at] = touch
        rows = [
            (at, STRENGTH.get(t.type, _SESSION_STRENGTH), t.count, t.bought, t.last_ms)
            for at, t in known.items()
            if at not in clicks
        ]
        rows.sort(key=_LAST_THEN_ITEM)
        for at, times in clicks.items():
            before = known.get(at)
            if before is None:
                rows.append((at, _SESSION_STRENGTH, times, 0, now_ms))
            else:
                base = STRENGTH.get(before.type, _SESSION_STRENGTH)
                rows.append((at, base, before.count + times, before.bought, now_ms))
        flat = itertools.chain.from_iterable(rows[-TOUCHES_MAX:])
        return cls._from_rows(np.fromiter(flat, dtype=np.float64).reshape(-1, 5), now_ms)

    @classmethod
    def from_events(
        cls,
        items: npt.NDArray[np.integer[Any]],
        types: npt.NDArray[np.integer[Any]],
        times_ms: npt.NDArray[np.int64],
        now_ms: int,
    ) -> UserState:
        """The state from one user's event log, read strictly before `now_ms`.

        All arrays [m], in order of time; `types` are codes of `EVENT_TYPES`. Events at or after the
        moment, of types that are not positive, and of PAD are not seen.
        """
        end = int(np.searchsorted(times_ms, now_ms, side="left"))
        items, types, times = items[:end], types[:end], times_ms[:end]
        base = _STRENGTH_BY_CODE[types]
        seen = (base > 0) & (items != PAD)
        if not seen.all():
            items, types, times, base = items[seen], types[seen], times[seen], base[seen]
        if not len(items):
            return cls._from_rows(np.empty((0, 5)), now_ms)
        order = np.argsort(items, kind="stable")
        items, types, times, base = items[order], types[order], times[order], base[order]
        first = np.flatnonzero(np.r_[True, items[1:] != items[:-1]])
        last = np.r_[first[1:], len(items)] - 1
        rows = np.column_stack(
            (
                items[first],
                np.maximum.reduceat(base, first),
                last - first + 1,
                np.add.reduceat((types == _PURCHASE).astype(np.int64), first),
                times[last],
            )
        )
        rows = rows[np.lexsort((rows[:, 0], rows[:, 4]))]
        return cls._from_rows(rows[-TOUCHES_MAX:], now_ms)

    @classmethod
    def _from_rows(cls, rows: npt.NDArray[np.float64], now_ms: int) -> UserState:
        """From rows (item, base strength, count, bought, last_ms), oldest first."""
        count = rows[:, 2].astype(np.float32)
        return cls(
            items=rows[:, 0].astype(np.int32),
            strength=touch_strength(rows[:, 1].astype(np.float32), count),
            age_hours=np.maximum((now_ms - rows[:, 4]) / HOUR_MS, 0.0).astype(np.float32),
            count=count,
            bought=rows[:, 3].astype(np.float32),
            context=context_of(now_ms),
            now_ms=now_ms,
        )

    @property
    def bought_items(self) -> Ints:
        """Items bought before: what an answer without repeats leaves out."""
        return self.items[self.bought > 0]


def touch_strength(base: Floats, count: Floats) -> Floats:
    """Strength of a touch: `contract.tensors.STRENGTH` of its strongest event, growing slowly when repeated."""
    return (base * (1.0 + np.log(np.maximum(count, 1.0)))).astype(np.float32, copy=False)


def context_of(now_ms: int) -> Floats:
    """`contract.tensors.CONTEXT` of a moment, [4]: where it lies in the day and in the week, UTC."""
    day = math.tau * (now_ms % DAY_MS) / DAY_MS
    week = math.tau * (now_ms % (7 * DAY_MS)) / (7 * DAY_MS)
    return np.array([math.sin(day), math.cos(day), math.sin(week), math.cos(week)], dtype=np.float32)


def user_inputs(
    history: npt.ArrayLike,
    strength: npt.ArrayLike,
    age_hours: npt.ArrayLike,
    context: npt.ArrayLike,
) -> dict[str, npt.NDArray[Any]]:
    """The user tower's inputs for one request, batch axis 1, named as in `contract.tensors.USER_TOWER`.

    `history`, `strength` and `age_hours` [n] are oldest first; the last HISTORY_LENGTH are read.
    """
    items = np.asarray(history, dtype=np.int64)[-HISTORY_LENGTH:]
    start = HISTORY_LENGTH - len(items)
    inputs: dict[str, npt.NDArray[Any]] = {
        "history": np.zeros((1, HISTORY_LENGTH), dtype=np.int64),
        "history_strength": np.zeros((1, HISTORY_LENGTH), dtype=np.float32),
        "history_age_hours": np.zeros((1, HISTORY_LENGTH), dtype=np.float32),
        "context": np.asarray(context, dtype=np.float32).reshape(1, len(CONTEXT)),
    }
    inputs["history"][0, start:] = items
    inputs["history_strength"][0, start:] = np.asarray(strength, dtype=np.float32)[-HISTORY_LENGTH:]
    inputs["history_age_hours"][0, start:] = np.asarray(age_hours, dtype=np.float32)[-HISTORY_LENGTH:]
    return inputs


def stand_ins(items: Ints, neighbours: Ints, known: int) -> Ints:
    """The items of a history [n] as models may read them: one beyond `known` by its nearest neighbour that they know.

    Items 1 to `known` have rows in the models' tables; later ones came with a delta. `neighbours` is the table
    [N+1, NEIGHBOURS], best first. PAD where an item has no such neighbour.
    """
    beyond = items > known
    if not beyond.any():
        return items
    near = neighbours[items[beyond]]
    usable = (near != PAD) & (near <= known)
    found = np.where(usable.any(axis=1), near[np.arange(len(near)), usable.argmax(axis=1)], PAD)
    models_items = items.copy()
    models_items[beyond] = found
    return models_items


class Taste(NamedTuple):
    """What a state says by itself, with the catalogue, whatever the candidates are."""

    weight: Floats
    """What each touch says now, `fusion.touch_weights`, [n]."""
    total: float
    """All weights together; 1 for nothing at all, to divide by."""
    affinity: npt.NDArray[np.float64]
    """The feature `category_share`: each category's share in the touches' weights, [categories]; 0 is unknown."""
    log_price: float
    """The feature `price_taste`: mean log(1 + price) of the touches by their weights; NaN without any."""
    last: tuple[int, int]
    """The item touched last, or what stands for it, and its category."""
    near: Ints
    """The neighbours of all touches, [n * NEIGHBOURS]."""
    gains: npt.NDArray[np.float64]
    """What each of them gains by it."""
    place: npt.NDArray[np.int16]
    """For each item [N+1] its place among the touches, from 1; 0 for one that was not touched."""

    @classmethod
    def of(cls, state: UserState, tables: ItemTables, known: int) -> Taste:
        """For models that know items 1 to `known`."""
        items, length = state.items, len(state.items)
        weight = touch_weights(state.strength, state.age_hours)
        total = float(weight.sum()) or 1.0
        place = np.zeros(len(tables.category), dtype=np.int16)  # as in `fusion.item_to_item_of`
        place[items] = np.arange(1, length + 1)
        return cls(
            weight=weight,
            total=total,
            affinity=np.bincount(tables.category[items], weights=weight, minlength=tables.categories) / total,
            log_price=float(weight @ tables.log_price[items]) / total if length else float("nan"),
            last=(
                (int(stand_ins(items[-1:], tables.neighbours, known)[0]), int(tables.category[items[-1]]))
                if length
                else (PAD, PAD)
            ),
            near=tables.neighbours.take(items, axis=0).ravel(),
            gains=(tables.neighbour_scores.take(items, axis=0) * weight[:, None]).ravel().astype(np.float64),
            place=place,
        )


def rank_features(
    state: UserState, candidates: Candidates, tables: ItemTables, schema: FeatureSchema, taste: Taste | None = None
) -> tuple[npt.NDArray[np.int64], Floats]:
    """The ranker's inputs for one request: sparse int64 [C, F_s] and dense float32 [C, F_d], standardised.

    Row c is candidate c; columns as `RANKER_SPARSE` and `RANKER_DENSE` say. `tables` may have more items than
    the schema, which came with deltas: the ranker reads all about them but which they are. `taste` is that of the
    state, where it was made already.
    """
    sparse, dense = raw_features(state, candidates, tables, known=schema.items, taste=taste)
    dense -= np.asarray(schema.dense_mean, dtype=np.float32)
    dense /= np.asarray(schema.dense_scale, dtype=np.float32)
    return sparse, dense


def raw_features(
    state: UserState,
    candidates: Candidates,
    tables: ItemTables,
    *,
    known: int | None = None,
    taste: Taste | None = None,
) -> tuple[npt.NDArray[np.int64], Floats]:
    """`rank_features` before standardisation: what training fits the schema's mean and scale on.

    Items beyond `known` (None: all are known) are PAD to the ranker; as the last of a history they have stand-ins.
    """
    known = len(tables.popularity) - 1 if known is None else known
    taste = Taste.of(state, tables, known) if taste is None else taste
    of_items = tables.columns(known)
    items = candidates.items

    sparse = np.empty((len(items), len(RANKER_SPARSE)), dtype=np.int64)
    sparse[:, :3] = of_items.sparse.take(items, axis=0)
    sparse[:, 3:5] = taste.last
    sparse[:, 5] = candidates.source

    at = taste.place.take(items)
    touched = at.nonzero()[0]
    at = at[touched] - 1
    # Column by column in memory, [F_d, C], which is how they are made.
    dense = np.empty((len(RANKER_DENSE), len(items)), dtype=np.float32)
    dense[0] = candidates.ann
    dense[1] = candidates.scores
    dense[2] = _LOG_PLACES[: len(items)] if len(items) <= len(_LOG_PLACES) else np.log1p(np.arange(len(items)))
    np.log1p(item_to_item_of(items, taste.near, taste.gains, len(taste.place)), out=dense[3])
    of_items.popularity.take(items, axis=1, out=dense[4:7], mode="clip")
    dense[7] = np.log1p(np.maximum(state.now_ms - tables.first_seen_ms.take(items), 0) / DAY_MS)
    price = dense[8] = tables.log_price.take(items)
    dense[9] = 0.0 if math.isnan(taste.log_price) else price - taste.log_price
    dense[10] = taste.affinity.take(sparse[:, 1])
    dense[11:15] = _NEVER_TOUCHED
    if len(touched):
        dense[11, touched] = np.log1p(state.count[at])
        dense[12, touched] = np.log1p(state.bought[at])
        dense[13, touched] = np.log1p(state.age_hours[at] / np.float32(24.0))
        dense[14, touched] = taste.weight[at] / taste.total
    dense[15] = math.log1p(len(state.items))
    dense[16:] = state.context[:, None]
    return sparse, np.ascontiguousarray(dense.T)


def price_bands(price: Floats, edges: npt.ArrayLike) -> Ints:
    """Band of each price: 1 for up to `edges[0]`, ..., len(edges) + 1 above the last; 0 where it is 0 (unknown)."""
    bands = np.searchsorted(np.asarray(edges, dtype=np.float32), price, side="left") + 1
    return np.where(price > 0, bands, 0).astype(np.int32)


def item_inputs(
    *,
    category: Ints,
    price: Floats,
    popularity: Floats,
    first_seen_ms: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    image: Floats,
    reference_ms: int,
    of_items: int | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """The item tower's inputs for all rows 0 to N, named as in `contract.tensors.ITEM_TOWER`.

    `popularity` is a share in a catalogue of `of_items` (None: of these rows); age counts from `first_seen_ms` to
    `reference_ms`, 0 for what came later.
    """
    of_items = len(popularity) - 1 if of_items is None else of_items
    years = np.maximum(reference_ms - first_seen_ms, 0) / (365.0 * DAY_MS)
    numeric = np.stack((np.log1p(price), relative(popularity, of_items), np.minimum(years, 5.0)), axis=1)
    numeric[PAD] = 0.0
    return {
        "item": np.arange(len(category), dtype=np.int64),
        "category": category.astype(np.int64),
        "tokens": tokens,
        "numeric": numeric.astype(np.float32),
        "image": image.astype(np.float32),
    }


def relative(share: Floats, items: int) -> Floats:
    """A share of popularity as log(1 + times the mean of `items`): the same meaning in any size of catalogue."""
    return np.asarray(np.log1p(share * np.float32(max(items, 1))), dtype=np.float32)
