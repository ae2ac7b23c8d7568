"""A seeded shop: catalogue, people with taste, and the log that a shop would have kept of them.

The choice model is a nested logit: a visit has a mission (category, then product type), and within it
items are drawn by softmax of popularity, taste, price and product type. Lists are shown by a
logging policy that knows popularity well and taste a little, ordered without regard to the user, and
clicked where looked at AND liked (the examination hypothesis, Craswell et al. 2008). What was planted
comes back as `Truth`. It knows nothing of pseudonyms, splits or files.

Everything is drawn by category in matrices (pages x items of the category), never page by page.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from workloads.contract.events import TIMESTAMP_MAX_MS, TIMESTAMP_MIN_MS, EventType
from workloads.contract.tensors import IMAGE_DIM
from workloads.data.events import SCHEMA, EventLog, uuid7_column
from workloads.data.split import Boundaries
from workloads.data.truth import LATENT_DIM, ChoiceWeights, Floats, Ints, Truth
from workloads.data.vocabulary import BRANDS, CATEGORIES, COLOURS, STYLES

DAY_MS: Final = 86_400_000
HOUR_MS: Final = 3_600_000
LIST_LENGTH: Final = 10
BROWSE_MAX: Final = 8
"""Items that one browsing page leads to, at the most."""
RECOMMEND_FROM_MISSION: Final = 7
"""Of a recommendation list; the others are of a second category."""
MATRIX_CELLS: Final = 3_000_000
"""Cells of one pages x items block: bounds memory, not results (draws are per block, in a fixed order)."""

EXAMINATION: Final = (1.0 / np.arange(1, LIST_LENGTH + 1) ** 0.7).astype(np.float32)
"""Planted probability that position k of a list is looked at."""

_NIGHT_AND_MORNING: Final = (0.5, 0.3, 0.2, 0.15, 0.15, 0.25, 0.5, 0.9, 1.2, 1.3, 1.35, 1.4)
_AFTERNOON_AND_EVENING: Final = (1.6, 1.5, 1.3, 1.3, 1.35, 1.5, 1.8, 2.2, 2.5, 2.3, 1.6, 0.9)
HOURS: Final = np.array(_NIGHT_AND_MORNING + _AFTERNOON_AND_EVENING)
"""Visits by hour of the day (UTC), relative."""
WEEKDAYS: Final = np.array([1.05, 1.0, 0.95, 0.95, 0.9, 1.1, 1.35])
"""Visits by day of the week from Monday, relative."""

_BROWSE, _RECOMMEND, _SEARCH = 0, 1, 2
_PAGE_SHARES: Final = (0.45, 0.30, 0.25)
_EVENTS_PER_PAGE: Final = 10.6
"""Measured; more pages than needed are drawn and the surplus is left out, so that it may be off a little."""
_SURPLUS: Final = 1.15
_PAGES_PER_VISIT: Final = 1.8
_ANONYMOUS_SHARE: Final = 0.05
_LATE_ITEMS: Final = 0.2
_WITHDRAWN_ITEMS: Final = 0.015
_LATE_USERS: Final = 0.15
_ACTIVITY_SPREAD: Final = 0.9
"""Standard deviation of the logarithm of people's activity."""

_TYPES: Final = [kind.value for kind in EventType]
_CODE: Final = {kind: code for code, kind in enumerate(EventType)}


class SimulatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to simulate. Raises ValueError naming the field.

    `events` is met within one page (a few dozen). `users` is how many have heard of the shop: activity
    is spread unevenly, and about a quarter of them never come while the log runs.
    """

    users: int = 20_000
    items: int = 10_000
    events: int = 1_000_000
    seed: int = 1
    days: int = 63
    """Nine weeks: seven to learn from, one to validate, one to test."""
    start_ms: int = 1_767_571_200_000
    """Monday 2026-01-05, 00:00 UTC."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be simulated."""
        for name, low, high in (
            ("users", 20, 1_000_000),
            ("items", 60, 200_000),
            ("events", 500, 10_000_000),
            ("seed", 0, 2**63 - 1),
            ("days", 14, 730),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)}: must be {low} to {high}")
        if not TIMESTAMP_MIN_MS <= self.start_ms <= TIMESTAMP_MAX_MS - 731 * DAY_MS:
            raise ValueError(f"start_ms={self.start_ms}: must lie between the years 2000 and 2097")

    @property
    def cut(self) -> Boundaries | None:
        """The last week for test and the one before for validation; None where that would leave too little."""
        if self.days < 28:
            return None
        last, before = self.end_ms - 7 * DAY_MS, self.end_ms - 14 * DAY_MS
        return Boundaries(start_ms=self.start_ms, train_end_ms=before, validation_end_ms=last, end_ms=self.end_ms)

    @property
    def end_ms(self) -> int:
        """The first moment after the simulated period."""
        return self.start_ms + self.days * DAY_MS


@dataclass(frozen=True)
class Simulation:
    """What a run made: the log with raw ids, the catalogue, and what was planted."""

    log: EventLog
    items: pl.DataFrame
    truth: Truth


def simulate(config: SimulatorConfig, step: Callable[[float], None] = lambda _: None) -> Simulation:
    """Run the shop. The same config gives the same log on the same machine; `step` hears the share done."""
    catalogue = _make_catalogue(config)
    step(0.1)
    truth = _plant(config, catalogue)
    pages = _make_pages(config, truth)
    step(0.15)
    log = _run(_Shop(config, catalogue, truth, pages), lambda share: step(0.15 + 0.75 * share))
    step(1.0)
    return Simulation(log=log, items=_items_frame(catalogue, truth), truth=truth)


def _rng(config: SimulatorConfig, stage: int) -> np.random.Generator:
    """A stream of its own per stage, so that a change in one leaves the others as they were."""
    return np.random.default_rng([config.seed, stage])


# --- catalogue ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Catalogue:
    """Attributes of the items; word attributes are indices into the vocabulary."""

    ids: list[str]
    category: Ints
    categories: int
    noun: Ints
    material: Ints
    colour: Ints
    style: Ints
    brand: Ints
    vectors: Floats
    image: Floats
    price: npt.NDArray[np.float64]
    price_tier: Floats
    log_popularity: Floats
    first_seen_ms: Ints
    last_ms: Ints
    titles: list[str]
    descriptions: list[str]


def _make_catalogue(config: SimulatorConfig) -> _Catalogue:
    rng = _rng(config, 1)
    count = config.items
    categories = int(np.clip(count // 30, 2, len(CATEGORIES)))
    share = 1.0 / (np.arange(categories) + 6.0)
    category = np.sort(rng.choice(categories, size=count, p=share / share.sum()))
    category[:categories] = np.arange(categories)  # none is empty
    category = rng.permutation(category)

    noun_share = 1.0 / (np.arange(8) + 3.0)
    noun = rng.choice(8, size=count, p=noun_share / noun_share.sum())
    material = rng.integers(5, size=count)
    colour = rng.integers(len(COLOURS), size=count)
    style = rng.integers(len(STYLES), size=count)
    brand = rng.integers(len(BRANDS), size=count)

    # Words are what a shopper sees of the latent vector; the rest (0.35 of the variance) is taste without a name.
    def embed(number: int) -> Floats:
        return rng.standard_normal((number, LATENT_DIM)).astype(np.float32)

    vectors = (
        np.float32(np.sqrt(0.25)) * embed(len(STYLES))[style]
        + np.float32(np.sqrt(0.18)) * embed(len(COLOURS))[colour]
        + np.float32(np.sqrt(0.12)) * embed(categories * 5)[category * 5 + material]
        + np.float32(np.sqrt(0.10)) * embed(len(BRANDS))[brand]
        + np.float32(np.sqrt(0.35)) * embed(count)
    )
    rotation, _ = np.linalg.qr(rng.standard_normal((LATENT_DIM, IMAGE_DIM)))
    image = (vectors @ rotation + 0.5 * rng.standard_normal((count, IMAGE_DIM))).astype(np.float32)

    brand_tier = rng.standard_normal(len(BRANDS))
    tier = 0.7 * brand_tier[brand] + 0.7 * rng.standard_normal(count)
    base = np.array([words.base_price for words in CATEGORIES])[category]
    noun_price = np.exp(rng.normal(0.3, 0.35, size=(categories, 8)))[category, noun]
    price = np.maximum(np.round(base * noun_price * np.exp(0.45 * tier)) - 0.05, 0.95)

    rank = rng.permutation(count) + 1
    log_popularity = -ChoiceWeights().zipf * np.log(rank)
    late = rng.random(count) < _LATE_ITEMS
    first_seen = np.full(count, config.start_ms)
    first_seen[late] = config.start_ms + rng.uniform(0, config.days * DAY_MS * 0.97, size=int(late.sum())).astype(int)
    last = np.full(count, config.end_ms)
    withdrawn = (rng.random(count) < _WITHDRAWN_ITEMS) & ~late
    last[withdrawn] = config.start_ms + rng.uniform(
        0.3 * config.days * DAY_MS, config.days * DAY_MS, size=int(withdrawn.sum())
    ).astype(int)
    # Items on sale before the log begins carry the date they really came, up to two years back.
    shown_first = first_seen.copy()
    shown_first[~late] -= (rng.exponential(200.0, size=int((~late).sum())).clip(0, 730) * DAY_MS).astype(int)

    titles, descriptions = _write_texts(
        rng, category=category, noun=noun, material=material, colour=colour, style=style, brand=brand
    )
    return _Catalogue(
        ids=[f"sku-{number:06d}" for number in range(1, count + 1)],
        category=category,
        categories=categories,
        noun=noun,
        material=material,
        colour=colour,
        style=style,
        brand=brand,
        vectors=vectors.astype(np.float32),
        image=image,
        price=price,
        price_tier=tier.astype(np.float32),
        log_popularity=log_popularity.astype(np.float32),
        first_seen_ms=shown_first.astype(np.int64),
        last_ms=last.astype(np.int64),
        titles=titles,
        descriptions=descriptions,
    )


_OPENINGS: Final = (
    "A {style} {noun} in {colour} {material}, made for {use}.",
    "This {colour} {noun} brings a {style} touch to {use}.",
    "{brand} makes this {noun} from {material}; the {style} look suits {use}.",
    "Our {style} {noun}: {material}, {colour}, at its best for {use}.",
)
_CLOSINGS: Final = (
    "Easy to care for and built to last.",
    "Comes in a plastic-free gift box.",
    "Loved for its finish and its weight in the hand.",
    "Made in small series.",
    "Matches the rest of the {brand} range.",
    "A favourite gift at any time of the year.",
)


def _write_texts(
    rng: np.random.Generator, *, category: Ints, noun: Ints, material: Ints, colour: Ints, style: Ints, brand: Ints
) -> tuple[list[str], list[str]]:
    count = len(category)
    opening, closing, use = (rng.integers(size, size=count).tolist() for size in (len(_OPENINGS), len(_CLOSINGS), 4))
    named = (rng.random(count) < 0.5).tolist()
    titles, descriptions = [], []
    for row in range(count):
        words = CATEGORIES[category[row]]
        parts = {
            "noun": words.nouns[noun[row]],
            "material": words.materials[material[row]],
            "colour": COLOURS[colour[row]],
            "style": STYLES[style[row]],
            "brand": BRANDS[brand[row]],
            "use": words.uses[use[row]],
        }
        title = f"{parts['style']} {parts['material']} {parts['noun']}, {parts['colour']}"
        titles.append(f"{parts['brand']} {title}" if named[row] else title[0].upper() + title[1:])
        text = f"{_OPENINGS[opening[row]]} {_CLOSINGS[closing[row]]}".format(**parts)
        descriptions.append(text[0].upper() + text[1:])
    return titles, descriptions


def _items_frame(catalogue: _Catalogue, truth: Truth) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item": catalogue.ids,
            "title": catalogue.titles,
            "description": catalogue.descriptions,
            "category": [CATEGORIES[c].name for c in catalogue.category.tolist()],
            "price": catalogue.price,
            "image": pl.Series(catalogue.image, dtype=pl.Array(pl.Float32, IMAGE_DIM)).cast(pl.List(pl.Float32)),
            "first_seen_ms": catalogue.first_seen_ms,
            "in_stock": catalogue.last_ms >= truth.end_ms,
        }
    )


# --- people ---------------------------------------------------------------------------------------


def _plant(config: SimulatorConfig, catalogue: _Catalogue) -> Truth:
    rng = _rng(config, 2)
    weights = ChoiceWeights()
    count, categories = config.users, catalogue.categories
    size = np.bincount(catalogue.category, minlength=categories)
    log_preference = np.log(np.maximum(size, 1) / size.sum()) + weights.category * rng.standard_normal(
        (count, categories)
    )
    log_preference -= np.log(np.exp(log_preference).sum(axis=1, keepdims=True))
    return Truth(
        weights=weights,
        start_ms=config.start_ms,
        end_ms=config.end_ms,
        users=np.array([f"user-{number:06d}" for number in range(1, count + 1)]),
        items=np.array(catalogue.ids),
        user_vectors=rng.standard_normal((count, LATENT_DIM)).astype(np.float32),
        user_drift=(weights.drift * rng.standard_normal((count, LATENT_DIM))).astype(np.float32),
        user_category=log_preference.astype(np.float32),
        user_price_level=(0.8 * rng.standard_normal(count)).astype(np.float32),
        user_price_sensitivity=rng.uniform(0.2, 1.4, size=count).astype(np.float32),
        item_vectors=catalogue.vectors,
        item_log_popularity=catalogue.log_popularity,
        item_category=catalogue.category,
        item_noun=catalogue.noun,
        item_price_tier=catalogue.price_tier,
        item_first_seen_ms=catalogue.first_seen_ms,
        item_last_ms=catalogue.last_ms,
        complement=rng.permutation(categories).astype(np.int64),
        examination=EXAMINATION,
    )


@dataclass(frozen=True)
class _Pages:
    """One row per page seen: a list that was shown, or a run of product pages."""

    user: Ints
    at_ms: Ints
    kind: Ints
    mission: Ints
    noun: Ints
    anonymous: npt.NDArray[np.bool_]


def _make_pages(config: SimulatorConfig, truth: Truth) -> _Pages:
    rng = _rng(config, 3)
    visits = 20 + int(config.events * _SURPLUS / _EVENTS_PER_PAGE / _PAGES_PER_VISIT)
    activity = rng.lognormal(0.0, _ACTIVITY_SPREAD, size=config.users)
    user = rng.choice(config.users, size=visits, p=activity / activity.sum())
    joined = np.where(rng.random(config.users) < _LATE_USERS, rng.uniform(0.0, 0.95, size=config.users), 0.0)
    at = _visit_times(config, rng, joined[user])
    order = np.lexsort((at, user))
    user, at = user[order], at[order]
    mission, noun = _missions(rng, truth, user, at)

    per_visit = rng.geometric(1.0 / _PAGES_PER_VISIT, size=len(user)).clip(max=12)
    visit = np.repeat(np.arange(len(user)), per_visit)
    first = np.cumsum(per_visit) - per_visit
    nth = np.arange(len(visit)) - first[visit]
    page_at = at[visit] + nth * 150_000 + rng.integers(0, 100_000, size=len(visit))
    anonymous = (rng.random(len(user)) < _ANONYMOUS_SHARE)[visit]
    kind = rng.choice(3, size=len(visit), p=_PAGE_SHARES)
    inside = page_at < config.end_ms - HOUR_MS  # a page must have time to end
    picked = visit[inside]
    return _Pages(
        user=user[picked],
        at_ms=page_at[inside],
        kind=kind[inside],
        mission=mission[picked],
        noun=noun[picked],
        anonymous=anonymous[inside],
    )


def _visit_times(config: SimulatorConfig, rng: np.random.Generator, joined: npt.NDArray[np.float64]) -> Ints:
    """Moments drawn by inverse CDF over hours, each after its user joined (a share of the period)."""
    hours = np.arange(config.days * 24)
    first_day = (config.start_ms // DAY_MS + 3) % 7  # 1970-01-01 was a Thursday
    weight = HOURS[hours % 24] * WEEKDAYS[(hours // 24 + first_day) % 7] * (1.0 + 0.3 * hours / len(hours))
    edges = np.concatenate([[0.0], np.cumsum(weight) / weight.sum()])
    start = np.interp(joined * len(hours), np.arange(len(edges)), edges)
    drawn = start + rng.random(len(joined)) * (1.0 - start)
    hour: npt.NDArray[np.float64] = np.interp(drawn, edges, np.arange(len(edges)))
    return (config.start_ms + hour * HOUR_MS).astype(np.int64)


def _missions(rng: np.random.Generator, truth: Truth, user: Ints, at: Ints) -> tuple[Ints, Ints]:
    """Category and product type that each visit looks for; visits are sorted by user and time.

    A mission is kept from the visit before or chosen anew, by preference (which weekends and evenings
    shift) or in the category that goes with the one before.
    """
    weights = truth.weights
    categories = truth.user_category.shape[1]
    hour, weekday = at // HOUR_MS % 24, (at // DAY_MS + 3) % 7
    weekend = np.array([CATEGORIES[c].weekend for c in range(categories)])
    evening = np.array([CATEGORIES[c].evening for c in range(categories)])
    logits = (
        truth.user_category[user] + (weekday >= 5)[:, None] * weekend + ((hour >= 19) | (hour < 1))[:, None] * evening
    )
    fresh = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    fresh_noun = _noun_of(rng, truth, fresh)
    keep = rng.random(len(user)) < weights.keep_mission
    goes_on = rng.random(len(user)) < weights.complement

    first = np.flatnonzero(np.diff(user, prepend=-1) != 0)
    length = np.diff(np.append(first, len(user)))
    mission, noun = fresh.copy(), fresh_noun.copy()
    complement_noun = rng.integers(8, size=len(user))
    for nth in range(1, int(length.max(initial=1))):
        here = first[length > nth] + nth
        before = here - 1
        kept = keep[here]
        mission[here[kept]], noun[here[kept]] = mission[before[kept]], noun[before[kept]]
        on = ~kept & goes_on[here]
        mission[here[on]] = truth.complement[mission[before[on]]]
        noun[here[on]] = complement_noun[here[on]]
    return mission, noun


def _noun_of(rng: np.random.Generator, truth: Truth, category: Ints) -> Ints:
    """A product type of the category, by the number of items there are of it."""
    table = np.zeros((truth.user_category.shape[1], 8))
    np.add.at(table, (truth.item_category, truth.item_noun), 1.0)
    log_share = np.log(np.maximum(table, 1e-9))
    drawn: Ints = np.argmax(log_share[category] + rng.gumbel(size=(len(category), 8)), axis=1)
    return drawn


# --- what happens on the pages --------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    """Items drawn for pages, one row per (page, item), in the order they were drawn or placed."""

    page: Ints
    item: Ints
    place: Ints
    liking: Floats
    relevance: Floats

    @staticmethod
    def join(parts: list[_Shown]) -> _Shown:
        none = np.zeros(0, dtype=np.int64)
        parts = [*parts, _Shown(none, none, none, none.astype(np.float32), none.astype(np.float32))]
        return _Shown(*(np.concatenate([getattr(p, f) for p in parts]) for f in _Shown.__dataclass_fields__))

    def take(self, rows: npt.NDArray[np.bool_] | Ints) -> _Shown:
        return _Shown(*(getattr(self, f)[rows] for f in _Shown.__dataclass_fields__))


class _Rows:
    """Event rows as they come up, in parallel arrays."""

    def __init__(self) -> None:
        self._parts: dict[str, list[npt.NDArray[np.generic]]] = {}

    def add(self, kind: EventType, page: Ints, at_ms: Ints, item: Ints, **columns: npt.NDArray[np.generic]) -> None:
        count = len(page)
        row: dict[str, npt.NDArray[np.generic]] = {
            "code": np.full(count, _CODE[kind], dtype=np.int8),
            "page": page,
            "at_ms": at_ms,
            "item": item,
            "position": columns.get("position", np.full(count, -1, dtype=np.int64)),
            "quantity": columns.get("quantity", np.full(count, -1, dtype=np.int64)),
            "rating": columns.get("rating", np.full(count, np.nan)),
        }
        for name, values in row.items():
            self._parts.setdefault(name, []).append(values)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


def _top(scores: Floats, count: int) -> tuple[Ints, Ints]:
    """(row, column) of the `count` best of each row, best first; columns at -inf are left out."""
    count = min(count, scores.shape[1])
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    values = np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    best, values = np.take_along_axis(best, order, axis=1), np.take_along_axis(values, order, axis=1)
    row, column = np.nonzero(np.isfinite(values))
    return row, best[row, column]


def _gumbel(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Standard Gumbel noise: the argmax of logits plus it is a draw from their softmax."""
    uniform = rng.random(shape, dtype=np.float32)
    np.maximum(uniform, np.float32(1e-12), out=uniform)
    return -np.log(-np.log(uniform) + np.float32(1e-12))


@dataclass(frozen=True)
class _Members:
    """Pages, and the items of the category they are about."""

    pages: Ints
    items: Ints


_WORD_WEIGHTS: Final = np.array([2.0, 1.0, 1.0, 1.0, 1.0], dtype=np.float32)
"""How much a search result gains by matching the query in product type, material, colour, style and brand."""


class _Shop:
    """Draws what pages show and what people choose, category by category."""

    def __init__(self, config: SimulatorConfig, catalogue: _Catalogue, truth: Truth, pages: _Pages) -> None:
        self.config, self.catalogue, self.truth, self.pages = config, catalogue, truth, pages
        self.rng = _rng(config, 4)
        self.attributes = np.stack(
            [catalogue.noun, catalogue.material, catalogue.colour, catalogue.style, catalogue.brand]
        )
        self.members = [np.flatnonzero(catalogue.category == c) for c in range(catalogue.categories)]

    def _logits(self, block: _Members) -> tuple[Floats, Floats, Floats]:
        """Liking, wish for the mission's product type, and 0 or -inf for what is not on sale; (n, m) each."""
        truth, pages, members = self.truth, block.pages, block.items
        at = self.pages.at_ms[pages]
        liking = truth.liking(self.pages.user[pages], at, members)
        wish = (self.pages.noun[pages][:, None] == truth.item_noun[members]) & (
            self.pages.mission[pages][:, None] == truth.item_category[members]
        )
        first, last = truth.item_first_seen_ms[members], truth.item_last_ms[members]
        there = (first <= at[:, None]) & (last > at[:, None] + HOUR_MS)
        closed = np.where(there, np.float32(0), np.float32(-np.inf))
        return liking, np.float32(truth.weights.noun) * wish.astype(np.float32), closed

    def choose(self, page: Ints, count: int) -> _Shown:
        """What people go to by themselves: draws without replacement from the choice model."""
        parts = []
        for block in self._blocks(page, self.pages.mission[page]):
            liking, wish, closed = self._logits(block)
            popular = np.float32(self.truth.weights.popularity) * self.truth.item_log_popularity[block.items]
            drawn = _top(liking + wish + popular + closed + _gumbel(self.rng, liking.shape), count)
            parts.append(self._shown(block, drawn, liking + np.float32(0.4) * wish))
        return _Shown.join(parts)

    def recommend(self, page: Ints, category: Ints, count: int) -> _Shown:
        """What the logging policy shows: popularity with some taste, in an order that ignores the user."""
        parts = []
        for block in self._blocks(page, category):
            liking, wish, closed = self._logits(block)
            popular = np.float32(0.6) * self.truth.item_log_popularity[block.items]
            half = np.float32(0.5)
            drawn = _top(half * liking + half * wish + popular + closed + _gumbel(self.rng, liking.shape), count)
            parts.append(self._shown(block, drawn, liking + np.float32(0.4) * wish))
        return _Shown.join(parts)

    def search(self, page: Ints, target: Ints, kept: npt.NDArray[np.bool_]) -> _Shown:
        """What the shop's search shows for words of a target item: matches of those words, then popularity.

        `kept` (n, 5) says which of noun, material, colour, style and brand the query names.
        """
        parts = []
        row_of = np.full(len(self.pages.user), -1)
        row_of[page] = np.arange(len(page))
        for block in self._blocks(page, self.pages.mission[page]):
            liking, _, closed = self._logits(block)
            rows = row_of[block.pages]
            match = np.zeros(liking.shape, dtype=np.float32)
            for number, weight in enumerate(_WORD_WEIGHTS):
                attribute = self.attributes[number]
                same = attribute[block.items][None, :] == attribute[target[rows]][:, None]
                match += weight * (same & kept[rows, number][:, None])
            relevance = match / (kept[rows] @ _WORD_WEIGHTS)[:, None]
            popular = np.float32(0.35) * self.truth.item_log_popularity[block.items]
            noise = np.float32(0.7) * _gumbel(self.rng, liking.shape)
            drawn = _top(np.float32(9.0) * relevance + popular + closed + noise, LIST_LENGTH)
            parts.append(self._shown(block, drawn, liking, relevance))
        return _Shown.join(parts)

    def _blocks(self, page: Ints, category: Ints) -> Iterator[_Members]:
        """Pages and the items of their category, few enough at once to be a matrix."""
        for number, items in enumerate(self.members):
            pages = page[category == number]
            size = max(1, MATRIX_CELLS // max(1, len(items)))
            for start in range(0, len(pages), size):
                yield _Members(pages[start : start + size], items)

    @staticmethod
    def _shown(members: _Members, drawn: tuple[Ints, Ints], liking: Floats, relevance: Floats | None = None) -> _Shown:
        row, column = drawn
        first = np.searchsorted(row, np.arange(len(members.pages)))
        return _Shown(
            page=members.pages[row],
            item=members.items[column],
            place=np.arange(len(row)) - first[row],
            liking=liking[row, column],
            relevance=np.zeros(len(row), dtype=np.float32) if relevance is None else relevance[row, column],
        )


def _placed(shown: _Shown, order_by: Floats) -> _Shown:
    """Places by falling `order_by` within each page."""
    order = np.lexsort((-order_by, shown.page))
    sorted_rows = shown.take(order)
    first = np.flatnonzero(np.diff(sorted_rows.page, prepend=-1) != 0)
    start = np.repeat(first, np.diff(np.append(first, len(order))))
    return _Shown(
        sorted_rows.page, sorted_rows.item, np.arange(len(order)) - start, sorted_rows.liking, sorted_rows.relevance
    )


def _sigmoid(values: Floats) -> Floats:
    return np.float32(1.0) / (np.float32(1.0) + np.exp(-values))


def _run(shop: _Shop, step: Callable[[float], None]) -> EventLog:
    truth, pages, rng = shop.truth, shop.pages, _rng(shop.config, 5)
    rows = _Rows()
    drawn = {kind: np.flatnonzero(pages.kind == kind) for kind in (_BROWSE, _RECOMMEND, _SEARCH)}

    browsed = shop.choose(drawn[_BROWSE], BROWSE_MAX)
    wanted = rng.geometric(0.25, size=len(pages.user)).clip(1, BROWSE_MAX)
    browsed = browsed.take(browsed.place < wanted[browsed.page])
    step(0.3)
    viewed = [
        (browsed, pages.at_ms[browsed.page] + browsed.place * 16_000 + rng.integers(500, 15_000, len(browsed.page)))
    ]

    lists, queries, targets = _lists(rng, shop, drawn)
    step(0.75)
    shown_at = pages.at_ms[lists.page]
    rows.add(EventType.IMPRESSION, lists.page, shown_at, lists.item, position=lists.place)
    searched = drawn[_SEARCH]
    rows.add(EventType.SEARCH, searched, pages.at_ms[searched] - 120, np.full(len(searched), -1))

    is_search = pages.kind[lists.page] == _SEARCH
    found = lists.item == targets[lists.page]
    attraction = np.where(
        is_search,
        _sigmoid(-4.2 + 3.2 * lists.relevance + 0.45 * lists.liking + 1.6 * found),
        _sigmoid(-1.0 + 0.6 * lists.liking),
    )
    examined = rng.random(len(lists.page)) < truth.examination[lists.place]
    clicked = examined & (rng.random(len(lists.page)) < attraction)
    clicks = lists.take(clicked)
    click_at = shown_at[clicked] + 1_500 + clicks.place * 12_000 + rng.integers(0, 10_000, len(clicks.page))
    rows.add(EventType.CLICK, clicks.page, click_at, clicks.item, position=clicks.place)
    viewed.append((clicks, click_at + rng.integers(300, 1_500, len(clicks.page))))

    seen = _Shown.join([part for part, _ in viewed])
    seen_at = np.concatenate([at for _, at in viewed])
    rows.add(EventType.VIEW, seen.page, seen_at, seen.item)
    _carts(rng, shop, rows, seen, seen_at)
    return _assemble(shop, rows, queries)


def _lists(rng: np.random.Generator, shop: _Shop, drawn: dict[int, Ints]) -> tuple[_Shown, dict[int, str], Ints]:
    """Lists of all recommendation and search pages, the query per search page, and its target item (or -1)."""
    catalogue, truth, pages = shop.catalogue, shop.truth, shop.pages
    recommended = drawn[_RECOMMEND]
    logits = truth.user_category[pages.user[recommended]] + rng.gumbel(size=(len(recommended), catalogue.categories))
    logits[np.arange(len(recommended)), pages.mission[recommended]] = -np.inf
    second = logits.argmax(axis=1)
    parts = [
        shop.recommend(recommended, pages.mission[recommended], RECOMMEND_FROM_MISSION),
        shop.recommend(recommended, second, LIST_LENGTH - RECOMMEND_FROM_MISSION),
    ]
    both = _Shown.join(parts)
    noise = rng.standard_normal(len(both.page)).astype(np.float32)
    lists = [_placed(both, 0.5 * truth.item_log_popularity[both.item] + noise)]

    targets = np.full(len(pages.user), -1)
    wished = shop.choose(drawn[_SEARCH], 1)
    searched = wished.page  # a page whose whole category is not on sale yet has no target and no list
    targets[searched] = wished.item
    kept, texts = _write_queries(rng, catalogue, wished.item)
    found = shop.search(searched, wished.item, kept)
    lists.append(found)
    for page in np.setdiff1d(drawn[_SEARCH], searched).tolist():
        drawn[_SEARCH] = drawn[_SEARCH][drawn[_SEARCH] != page]
    return _Shown.join(lists), dict(zip(searched.tolist(), texts, strict=True)), targets


def _write_queries(
    rng: np.random.Generator, catalogue: _Catalogue, target: Ints
) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Queries made of the target's own words: some left out, some mistyped. Returns which were named, and the text."""
    count = len(target)
    kept = rng.random((count, 5)) < np.array([0.95, 0.35, 0.4, 0.35, 0.12])
    kept[~kept.any(axis=1), 0] = True
    slip = rng.random(count) < 0.08
    place = rng.random(count)
    how = rng.integers(3, size=count)
    letter = rng.integers(26, size=count)
    texts = []
    for row, item in enumerate(target.tolist()):
        words = CATEGORIES[catalogue.category[item]]
        noun, material, colour, style, brand = kept[row]
        parts = []
        if brand:
            parts.append(BRANDS[catalogue.brand[item]].lower())
        if style:
            parts.append(STYLES[catalogue.style[item]])
        if colour:
            parts.append(COLOURS[catalogue.colour[item]])
        if material:
            parts.append(words.materials[catalogue.material[item]])
        if noun:
            parts.append(words.nouns[catalogue.noun[item]])
        text = " ".join(parts)
        texts.append(_mistype(text, place[row], how[row], letter[row]) if slip[row] else text)
    return kept, texts


def _mistype(text: str, place: float, how: int, letter: int) -> str:
    """One slip of the finger: two letters swapped, one left out, or one too many."""
    at = 1 + int(place * (len(text) - 2))
    if how == 0:
        return text[:at] + text[at + 1 : at + 2] + text[at] + text[at + 2 :]
    if how == 1:
        return text[:at] + text[at + 1 :]
    return text[:at] + string.ascii_lowercase[letter] + text[at:]


def _carts(rng: np.random.Generator, shop: _Shop, rows: _Rows, seen: _Shown, seen_at: Ints) -> None:
    """Carts, purchases, ratings and restocking that come of product views."""
    catalogue, truth, pages = shop.catalogue, shop.truth, shop.pages
    end = truth.end_ms
    carted = rng.random(len(seen.page)) < _sigmoid(-1.9 + 0.35 * seen.liking)
    cart, cart_at = seen.take(carted), seen_at[carted] + rng.integers(4_000, 60_000, int(carted.sum()))
    rows.add(EventType.CART, cart.page, cart_at, cart.item)
    bought = rng.random(len(cart.page)) < 0.55
    basket = cart.take(bought)
    paid_at = pages.at_ms[basket.page] + 420_000  # after the last cart of the page
    restocked = np.array([words.restocked for words in CATEGORIES])[catalogue.category[basket.item]]
    quantity = np.where(restocked, rng.geometric(0.6, len(basket.page)), 1 + (rng.random(len(basket.page)) < 0.06))
    rows.add(EventType.PURCHASE, basket.page, paid_at, basket.item, quantity=quantity)

    page, item, at = basket.page[restocked], basket.item[restocked], paid_at[restocked]
    for _ in range(4):
        again = rng.random(len(page)) < 0.5
        page, item = page[again], item[again]
        at = at[again] + (rng.gamma(6.0, 2.0, len(page)) * DAY_MS).astype(np.int64)
        inside = (at < end - HOUR_MS) & (at < truth.item_last_ms[item] - HOUR_MS)
        page, item, at = page[inside], item[inside], at[inside]
        rows.add(EventType.VIEW, page, at - 90_000, item)
        rows.add(EventType.PURCHASE, page, at, item, quantity=rng.geometric(0.6, len(page)))

    rated = rng.random(len(basket.page)) < 0.25
    opinion = basket.take(rated)
    rated_at = paid_at[rated] + (rng.gamma(3.0, 1.5, len(opinion.page)) * DAY_MS).astype(np.int64)
    stars = np.clip(np.round(3.7 + 0.5 * opinion.liking + 0.7 * rng.standard_normal(len(opinion.page))), 1, 5)
    inside = rated_at < end
    rows.add(
        EventType.RATING,
        opinion.page[inside],
        rated_at[inside],
        opinion.item[inside],
        rating=stars[inside].astype(float),
    )


def _assemble(shop: _Shop, rows: _Rows, queries: dict[int, str]) -> EventLog:
    """The log: whole pages left out at random until `config.events` remain, then names for numbers."""
    config, catalogue, truth, pages = shop.config, shop.catalogue, shop.truth, shop.pages
    rng = _rng(config, 6)
    table = rows.arrays()
    page = table["page"].astype(np.int64)
    size = np.bincount(page, minlength=len(pages.user))
    order = rng.permutation(len(size))
    keep = np.zeros(len(size), dtype=bool)
    keep[order[np.cumsum(size[order]) <= config.events]] = True
    kept = keep[page]
    table = {name: values[kept] for name, values in table.items()}
    page, at, code = page[kept], table["at_ms"].astype(np.int64), table["code"].astype(np.int64)
    position = table["position"].astype(np.int64)
    order = np.lexsort((position, page, code, at))
    page, at, code, position = page[order], at[order], code[order], position[order]
    item, quantity, rating = (table[name][order] for name in ("item", "quantity", "rating"))

    spot = pl.Series(item.astype(np.int64))
    text = pl.Series("query", [queries.get(number) for number in range(len(pages.user))], dtype=pl.String)
    of_list = np.isin(code, [_CODE[EventType.SEARCH], _CODE[EventType.IMPRESSION], _CODE[EventType.CLICK]])
    later = (code == _CODE[EventType.RATING]) | (at > pages.at_ms[page] + HOUR_MS)
    users = pl.Series("user", truth.users).gather(pages.user[page])
    random = rng.integers(0, 256, size=(len(page), 10), dtype=np.uint8)
    frame = pl.DataFrame(
        {
            "event_id": uuid7_column(at, random),
            "type": pl.Series(_TYPES, dtype=SCHEMA["type"]).gather(code),
            "timestamp_ms": at,
            "user": pl.select(pl.when(~pl.Series(pages.anonymous[page])).then(users)).to_series(),
            "item": pl.Series(catalogue.ids).gather(pl.select(pl.when(spot >= 0).then(spot)).to_series()),
            "session": pl.select(
                pl.when(~pl.Series(later)).then(pl.lit("session-") + pl.Series(page).cast(pl.String))
            ).to_series(),
            "query": pl.select(pl.when(pl.Series(of_list)).then(text.gather(page))).to_series(),
            "position": pl.select(pl.when(pl.Series(position) >= 0).then(pl.Series(position))).to_series(),
            "quantity": pl.select(pl.when(pl.Series(quantity) >= 0).then(pl.Series(quantity))).to_series(),
            "price": pl.select(
                pl.when(pl.Series(code).is_in([_CODE[EventType.CART], _CODE[EventType.PURCHASE]]) & (spot >= 0)).then(
                    pl.Series(catalogue.price).gather(np.maximum(item.astype(np.int64), 0))
                )
            ).to_series(),
            "rating": pl.Series(rating, nan_to_null=True),
        }
    )
    return EventLog.sorted(frame.cast(pl.Schema(SCHEMA)))
