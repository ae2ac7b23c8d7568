"""Features of people and items, declared once: what they count, of which events, over which time.

A feature is made of *signs*: positive events of known people. A sign has two times. It happened at `at_ms` (the
client's clock, but never after it was received: a clock that runs ahead knows no future), and it is known from
`known_ms` on (when it was received). What a request may know is every sign with `known_ms` strictly before it, however
late it came. Aggregations are sums, extremes and first times, so that the order in which signs come in does not matter.

The same declarations have two incarnations that tests hold against each other: here sign by sign, as the online store
takes them (`Touch`, `ItemActivity`), and in `workloads.data.point_in_time` over a whole log, by ASOF joins. What the
ranker reads of them is `workloads.data.features`. Loads no data library: the gateway imports it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from workloads.contract.events import POSITIVE_TYPES, EventType
from workloads.contract.tensors import STRENGTH

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
RECENT_DAYS: Final = 30
RECENT_MS: Final = RECENT_DAYS * DAY_MS

TOUCHES_MAX: Final = 300
"""Distinct items that a state is made of: the latest ones."""
REMEMBERED_MAX: Final = 5_000
"""Distinct items whose counts the online store keeps for the day that one of them is touched again. A person with more
loses the count of the one touched longest ago; up to there online and offline are the same."""

STRONGEST_FIRST: Final = (EventType.PURCHASE, EventType.CART, EventType.RATING, EventType.VIEW, EventType.CLICK)
"""Order of `contract.tensors.STRENGTH`; of equal ones the view is the longer look."""
_RANK: Final = {kind: number for number, kind in enumerate(STRONGEST_FIRST)}


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """One declared feature."""

    name: str
    entity: Literal["user", "item"]
    events: frozenset[EventType] = POSITIVE_TYPES
    """Types that it is made of; none: it is the catalogue's and changes with the bundle and its deltas."""
    window_ms: int | None = None
    """How far back it looks; None: all time."""
    aggregation: str
    dtype: str


_PURCHASES: Final = frozenset({EventType.PURCHASE})

FEATURES: Final[tuple[Feature, ...]] = (
    Feature(
        name="touches",
        entity="user",
        aggregation=f"per item strongest type, count, purchases, last time; the latest {TOUCHES_MAX} items",
        dtype="list<touch>",
    ),
    Feature(name="history_length", entity="user", aggregation="count distinct item", dtype="int32"),
    Feature(name="events", entity="user", aggregation="count over touches", dtype="int32"),
    Feature(name="purchases", entity="user", events=_PURCHASES, aggregation="count over touches", dtype="int32"),
    Feature(name="last_touch_ms", entity="user", aggregation="max time", dtype="int64"),
    Feature(
        name="category_share",
        entity="user",
        aggregation="share of each category in the touches' weights (features.Taste.affinity)",
        dtype="list<float32>",
    ),
    Feature(
        name="price_taste",
        entity="user",
        aggregation="mean log price of the touches by their weights (features.Taste.log_price)",
        dtype="float32",
    ),
    Feature(name="people", entity="item", aggregation="count distinct user", dtype="int32"),
    Feature(
        name="strength_recent",
        entity="item",
        window_ms=RECENT_MS,
        aggregation="sum of contract.tensors.STRENGTH, in whole hours",
        dtype="float32",
    ),
    Feature(name="first_ms", entity="item", aggregation="min time", dtype="int64"),
    Feature(name="price", entity="item", aggregation="latest price seen", dtype="float64"),
    Feature(name="in_stock", entity="item", events=frozenset(), aggregation="catalogue", dtype="uint8"),
    Feature(name="category", entity="item", events=frozenset(), aggregation="catalogue", dtype="int32"),
)
"""What is declared. `popularity` and `popularity_recent` of an item are its share in the sums of `people` and
`strength_recent` over the catalogue (`models.popularity`)."""


def window_start_ms(moment_ms: int, window_ms: int = RECENT_MS) -> int:
    """First moment in a window that ends at `moment_ms`: of a whole hour, so that a store may keep its sums by hour."""
    return (moment_ms - window_ms) // HOUR_MS * HOUR_MS


class Sign(msgspec.Struct, frozen=True, array_like=True):
    """One positive event of a known person on one item. `seq` is its place in the spool."""

    seq: int
    pseudonym: str
    item: str
    type: EventType
    at_ms: int
    known_ms: int
    price: float | None = None


def sign_of(
    *,
    seq: int,
    kind: str,
    timestamp_ms: int,
    user: str | None,
    item: str | None,
    price: float | None,
    received_ms: int,
) -> Sign | None:
    """The sign that an event is, or None where it says nothing of a known person's taste."""
    if user is None or item is None or kind not in _POSITIVE:
        return None
    return Sign(seq, user, item, EventType(kind), min(timestamp_ms, received_ms), received_ms, price)


_POSITIVE: Final = frozenset(kind.value for kind in POSITIVE_TYPES)


class Touch(msgspec.Struct, frozen=True, array_like=True):
    """One item a person was drawn to. `type` is the strongest of the positive events on it."""

    item: str
    type: EventType
    count: int
    """Positive events on the item."""
    bought: int
    """Purchase events among them."""
    last_ms: int


def touched(before: Touch | None, sign: Sign) -> Touch:
    """A touch with one sign more."""
    bought = int(sign.type is EventType.PURCHASE)
    if before is None:
        return Touch(sign.item, sign.type, 1, bought, sign.at_ms)
    return Touch(
        before.item,
        min(before.type, sign.type, key=_RANK.__getitem__),
        before.count + 1,
        before.bought + bought,
        max(before.last_ms, sign.at_ms),
    )


def in_order(touches: Iterable[Touch]) -> list[Touch]:
    """The item touched longest ago first; of those touched at one moment by the item's id."""
    return sorted(touches, key=lambda touch: (touch.last_ms, touch.item))


class ItemActivity(msgspec.Struct, array_like=True):
    """What people did with one item. Changes in place."""

    people: int = 0
    """People who touched it."""
    first_ms: int = 0
    """When it was first touched; 0: never."""
    price: float | None = None
    price_ms: int = 0
    hours: list[tuple[int, float]] = []
    """Hours since 1970 in order, and the strength of the signs in each; kept for the window and a day more."""

    def add(self, sign: Sign, *, is_new_person: bool) -> None:
        """One sign more."""
        self.people += is_new_person
        self.first_ms = min(self.first_ms, sign.at_ms) if self.first_ms else sign.at_ms
        if sign.price is not None and (self.price is None or (sign.at_ms, sign.price) > (self.price_ms, self.price)):
            self.price, self.price_ms = sign.price, sign.at_ms
        hour = sign.at_ms // HOUR_MS
        place = bisect.bisect_left(self.hours, (hour,))
        if place < len(self.hours) and self.hours[place][0] == hour:
            self.hours[place] = (hour, self.hours[place][1] + STRENGTH[sign.type])
        else:
            self.hours.insert(place, (hour, STRENGTH[sign.type]))

    def strength_recent(self, moment_ms: int) -> float:
        """`strength_recent` at a moment that is not before the last sign."""
        start = bisect.bisect_left(self.hours, (window_start_ms(moment_ms) // HOUR_MS,))
        return sum(strength for _, strength in self.hours[start:])

    def forget_before(self, moment_ms: int) -> None:
        """Drop hours that no window reaches any more that ends at `moment_ms` or later."""
        start = bisect.bisect_left(self.hours, (window_start_ms(moment_ms, RECENT_MS + DAY_MS) // HOUR_MS,))
        del self.hours[:start]


def split_remembered(touches: Sequence[Touch]) -> tuple[list[Touch], list[Touch]]:
    """Touches in order as (older, latest): the latest TOUCHES_MAX are a state, the older ones keep their counts."""
    kept = list(touches[-REMEMBERED_MAX:])
    cut = max(len(kept) - TOUCHES_MAX, 0)
    return kept[:cut], kept[cut:]
