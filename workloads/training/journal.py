"""A prepared data set as arrays: items as indices, people and visits as numbers, everything in order of time.

What later steps read is here and nowhere else, so that there is one place that knows the frames. It
opens no file but the data set's and never its `truth/`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl

from workloads.contract.events import EventType
from workloads.contract.tensors import IMAGE_DIM, PAD, STRENGTH
from workloads.data.dataset import Dataset
from workloads.data.features import EVENT_TYPES, price_bands
from workloads.models.text import item_text, token_table

Ints = npt.NDArray[np.int64]

PRICE_BANDS: Final = 10
VISIT_GAP_MS: Final = 30 * 60_000
"""Events without a session belong to one visit while they are closer than this."""
WANTED: Final = frozenset({EventType.CLICK, EventType.VIEW, EventType.CART, EventType.PURCHASE})
"""Types that a recommendation hopes for; a rating comes after the fact."""
_STRENGTH: Final = np.array([STRENGTH.get(kind, 0.0) for kind in EVENT_TYPES], dtype=np.float32)
_WANTED: Final = np.array([kind in WANTED for kind in EVENT_TYPES])
_IMPRESSION: Final = EVENT_TYPES.index(EventType.IMPRESSION)
_CLICK: Final = EVENT_TYPES.index(EventType.CLICK)


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Facts about items that do not change with time; row 0 is PAD."""

    ids: list[str]
    """Of rows 1 to N, without PAD."""
    categories: list[str]
    category: npt.NDArray[np.int32]
    price: npt.NDArray[np.float32]
    price_edges: list[float]
    price_band: npt.NDArray[np.int32]
    tokens: Ints
    image: npt.NDArray[np.float32]
    titles: list[str]
    first_seen_ms: Ints
    in_stock: npt.NDArray[np.uint8]

    @property
    def items(self) -> int:
        """Number of items N."""
        return len(self.ids)

    @classmethod
    def of(cls, frame: pl.DataFrame) -> Catalogue:
        """From `items.parquet`: row r is item r + 1."""
        named = frame["category"].to_list()
        categories = sorted({name for name in named if name})
        place = {name: at for at, name in enumerate(categories, start=1)}
        price = _padded(frame["price"].fill_null(0.0).to_numpy().astype(np.float32))
        known = np.unique(price[price > 0])
        edges = (
            np.unique(np.quantile(price[price > 0], np.arange(1, PRICE_BANDS) / PRICE_BANDS)) if len(known) else known
        )
        image = np.zeros((frame.height + 1, IMAGE_DIM), dtype=np.float32)
        for row, values in enumerate(frame["image"].to_list(), start=1):
            if values:
                image[row] = values
        titles = frame["title"].to_list()
        texts = [item_text(title, category) for title, category in zip(titles, named, strict=True)]
        return cls(
            ids=frame["item"].to_list(),
            categories=categories,
            category=_padded(np.array([place.get(name, 0) for name in named], dtype=np.int32)),
            price=price,
            price_edges=[float(edge) for edge in edges] or [1.0],
            price_band=price_bands(price, edges if len(edges) else [1.0]),
            tokens=_padded(token_table(texts)),
            image=image,
            titles=titles,
            first_seen_ms=_padded(frame["first_seen_ms"].to_numpy().astype(np.int64)),
            in_stock=_padded(frame["in_stock"].to_numpy().astype(np.uint8)),
        )


@dataclasses.dataclass(frozen=True)
class Journal:
    """Events with an item, oldest first; all arrays have the same length."""

    person: Ints
    """A user's number, or -1 for nobody known."""
    visit: Ints
    """Events of one session; unique across people."""
    item: Ints
    kind: Ints
    """Code of `data.features.EVENT_TYPES`."""
    time_ms: Ints
    position: Ints
    """Place in the list shown, -1 where there was none."""
    query: Ints
    """Number of the query that the event answers, -1 for none."""
    queries: list[str]
    people: int

    @classmethod
    def of(cls, frame: pl.DataFrame, ids: list[str]) -> Journal:
        """From `events.parquet` and the catalogue's ids; searches themselves, which name no item, are left out."""
        frame = frame.filter(pl.col("item").is_not_null())
        index = {item: at for at, item in enumerate(ids, start=1)}
        kinds = {kind.value: code for code, kind in enumerate(EVENT_TYPES)}
        item = frame["item"].replace_strict(index, default=PAD, return_dtype=pl.Int64).to_numpy()
        person, people = _numbers(frame["user"])
        session, sessions = _numbers(frame["session"])
        query, queries = _numbers(frame["query"])
        time = frame["timestamp_ms"].to_numpy()
        known = item != PAD
        return cls(
            person=person[known],
            visit=_visits(person, session, time, len(sessions))[known],
            item=item[known],
            kind=frame["type"].cast(pl.String).replace_strict(kinds, return_dtype=pl.Int64).to_numpy()[known],
            time_ms=time[known],
            position=frame["position"].fill_null(-1).cast(pl.Int64).to_numpy()[known],
            query=query[known],
            queries=queries,
            people=len(people),
        )

    def __len__(self) -> int:
        return len(self.time_ms)

    def take(self, rows: npt.NDArray[Any]) -> Journal:
        """These rows, in their order."""
        arrays = ("person", "visit", "item", "kind", "time_ms", "position", "query")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in arrays})

    def before(self, cut_ms: int) -> Journal:
        """All events strictly before a moment: what may be known then."""
        return self.take(np.arange(int(np.searchsorted(self.time_ms, cut_ms, side="left"))))

    def between(self, start_ms: int, end_ms: int) -> Journal:
        """Events from `start_ms` up to, not including, `end_ms`."""
        first, last = np.searchsorted(self.time_ms, (start_ms, end_ms), side="left")
        return self.take(np.arange(int(first), int(last)))

    @property
    def strength(self) -> npt.NDArray[np.float32]:
        """`contract.tensors.STRENGTH` of each event; 0 for those that say nothing about taste."""
        return _STRENGTH[self.kind]

    def positives(self) -> Journal:
        """Events that say a person was drawn to an item."""
        return self.take(np.flatnonzero(self.strength > 0))

    def wanted(self) -> Journal:
        """Events that a recommendation hopes for, of known people."""
        return self.take(np.flatnonzero(_WANTED[self.kind] & (self.person >= 0)))

    def impressions(self) -> Journal:
        """Lists that were shown, item by item."""
        return self.take(np.flatnonzero(self.kind == _IMPRESSION))

    def clicks(self) -> Journal:
        """Clicks on lists."""
        return self.take(np.flatnonzero(self.kind == _CLICK))

    def sequences(self) -> Ints:
        """Who acts in each event: a known person, or a visit of somebody unknown, numbered after all people."""
        return np.where(self.person >= 0, self.person, self.people + self.visit)


def read(dataset: Dataset) -> tuple[Catalogue, Journal]:
    """The catalogue and the journal of a data set."""
    catalogue = Catalogue.of(dataset.items)
    return catalogue, Journal.of(dataset.events, catalogue.ids)


def _padded(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """With a row of zeros before row 0."""
    return np.concatenate((np.zeros_like(values[:1]) if len(values) else np.zeros(1, values.dtype), values))


def _numbers(column: pl.Series) -> tuple[Ints, list[str]]:
    """Each value as its number among the distinct ones in sorted order, -1 for null; and the distinct ones."""
    distinct = column.drop_nulls().unique().sort()
    index = pl.Series(np.arange(len(distinct)), dtype=pl.Int64)
    if not len(distinct):
        return np.full(len(column), -1, dtype=np.int64), []
    return column.replace_strict(distinct, index, default=-1, return_dtype=pl.Int64).to_numpy(), distinct.to_list()


def _visits(person: Ints, session: Ints, time_ms: Ints, sessions: int) -> Ints:
    """Visit of each event: its session, or, without one, the person's run of events without long gaps."""
    visit = session.copy()
    loose = np.flatnonzero(session < 0)
    if len(loose):
        order = loose[np.lexsort((time_ms[loose], person[loose]))]
        apart = (person[order][1:] != person[order][:-1]) | (np.diff(time_ms[order]) > VISIT_GAP_MS)
        apart |= person[order][1:] < 0  # two events of nobody known are two visits
        visit[order] = sessions + np.cumsum(np.r_[False, apart])
    return visit
