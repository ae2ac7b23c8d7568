"""Sources that are files: the UCI Online Retail invoices, sequences per user, and any event log.

An adapter turns one file into events with raw ids and a catalogue. Rows it cannot read go to the
fault report; rows it understands and does not want are counted by rule. Times without a zone are
taken as UTC.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from workloads.contract.events import ID_PATTERN, EventType
from workloads.data.cleaning import ITEM_SCHEMA, RuleCount
from workloads.data.events import ROW, SAMPLES_PER_RULE, SCHEMA, EventLog, RowFaults, sift, uuid7_column
from workloads.data.reading import SourceError, file_digest, find_encoding, open_bytes, read_csv, read_parquet
from workloads.data.source import Note, SourceData
from workloads.data.split import Boundaries

DEFAULT_MAX_BAD_SHARE: Final = 0.05
DAY_MS: Final = 86_400_000


def _silent(text: str) -> None:
    del text


# --- UCI Online Retail ----------------------------------------------------------------------------

_RETAIL_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "invoice": ("InvoiceNo", "Invoice"),
    "stock": ("StockCode",),
    "description": ("Description",),
    "quantity": ("Quantity",),
    "moment": ("InvoiceDate",),
    "price": ("UnitPrice", "Price"),
    "customer": ("CustomerID", "Customer ID"),
}
"""Our name and the names in the two published editions."""

_MOMENTS: Final = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%m/%d/%Y %H:%M", "%m/%d/%y %H:%M")

SERVICE_CODES: Final = frozenset(
    {
        "POST",
        "DOT",
        "M",
        "C2",
        "D",
        "S",
        "B",
        "BANK CHARGES",
        "AMAZONFEE",
        "CRUK",
        "PADS",
        "ADJUST",
        "ADJUST2",
        "SP1002",
    }
)
"""Stock codes that are no goods: postage, carriage, manual lines, discounts, samples, bad debt, bank and marketplace
fees, commission. Gift vouchers and test lines are known by their beginning."""
_SERVICE_BEGINNINGS: Final = ("GIFT_", "TEST")


def load_online_retail(path: Path, *, max_bad_share: float = DEFAULT_MAX_BAD_SHARE, note: Note = _silent) -> SourceData:
    """Invoices of the UCI data set as purchases, one per invoice and product.

    Raises SourceError for a file that is none, TooManyFaultsError when too many rows are bad.
    """
    faults = RowFaults()
    text = read_csv(path, names=lambda header: _match_names(path, header, _RETAIL_COLUMNS), faults=faults, note=note)
    lines = _parse(
        text,
        {
            "moment_ms": ("moment", _moment(_MOMENTS), "must be a moment like 2010-12-01 08:26:00"),
            "pieces": ("quantity", pl.col("quantity").cast(pl.Int64, strict=False), "must be a whole number"),
            "unit_price": ("price", pl.col("price").cast(pl.Float64, strict=False), "must be a number"),
        },
        required=("invoice", "stock", "moment", "quantity", "price"),
        faults=faults,
    )
    faults.stop_above(max_bad_share)
    if not lines.height:
        raise SourceError(f"{path}: has no usable row", "give a file with invoice lines in it")
    lines = lines.with_columns(
        pl.col("stock").str.to_uppercase(),
        pl.col("invoice").str.to_uppercase(),
        pl.col("customer").str.replace(r"\.0$", ""),
    )
    rules: list[RuleCount] = []
    lines = _drop(lines, ~pl.struct(pl.exclude(ROW)).is_first_distinct(), "line repeated in every field", rules)
    service = pl.col("stock").is_in(SERVICE_CODES) | pl.any_horizontal(
        pl.col("stock").str.starts_with(beginning) for beginning in _SERVICE_BEGINNINGS
    )
    lines = _drop(lines, service, "service line (postage, fees, manual, samples, discounts, vouchers)", rules)
    lines = _settle_cancellations(lines, rules)
    lines = _drop(lines, pl.col("pieces") <= 0, "quantity not positive (stock adjustment)", rules)
    lines = _drop(lines, ~(pl.col("unit_price") > 0), "price not positive (write-off, gift, adjustment)", rules)
    anonymous = lines.filter(pl.col("customer").is_null())
    rules.append(
        RuleCount(
            rule="line without a customer, kept as part of an anonymous basket", rows=anonymous.height, effect="kept"
        )
    )

    merged = lines.group_by("invoice", "stock", maintain_order=True).agg(
        pl.col(ROW).first(),
        pl.col("customer").first(),
        pl.col("moment_ms").first(),
        pl.col("pieces").sum(),
        ((pl.col("unit_price") * pl.col("pieces")).sum() / pl.col("pieces").sum()).round(4).alias("unit_price"),
    )
    rules.append(
        RuleCount(
            rule="line of a product that its invoice has already, added to it",
            rows=lines.height - merged.height,
            effect="changed",
        )
    )
    frame = merged.select(
        ROW,
        pl.lit(EventType.PURCHASE.value, dtype=SCHEMA["type"]).alias("type"),
        pl.col("moment_ms").alias("timestamp_ms"),
        pl.col("customer").alias("user"),
        pl.col("stock").alias("item"),
        pl.col("invoice").alias("session"),
        pl.col("pieces").clip(upper_bound=2**31 - 1).cast(pl.Int32).alias("quantity"),
        pl.col("unit_price").alias("price"),
    )
    log = _log_of(frame, faults, seed=file_digest(path), max_bad_share=max_bad_share)
    texts = lines.select(pl.col("stock").alias("item"), "description")
    items = derive_items(log, texts)
    items = items.with_columns(derive_categories(items["title"]).alias("category"))
    return SourceData(
        name="online-retail",
        source=f"online-retail: {path.name}",
        log=log,
        items=items,
        protocol="next_basket",
        rules=rules,
        faults=faults,
    )


def _settle_cancellations(lines: pl.DataFrame, rules: list[RuleCount]) -> pl.DataFrame:
    """Take back what was cancelled: each cancellation finds its purchase, and both go.

    A cancellation belongs to the same customer's latest earlier purchase of the product with just that
    quantity; failing that, it takes pieces back from the latest earlier purchases. Without a customer,
    or with no purchase before it (the data begins in mid-trade), it is only dropped.
    """
    cancels = pl.col("invoice").str.starts_with("C")
    cancelled = lines.filter(cancels, pl.col("pieces") < 0, pl.col("customer").is_not_null())
    keys = ["customer", "stock"]
    open_lines: dict[tuple[str, str], list[list[int]]] = {}
    bought = lines.filter(~cancels, pl.col("pieces") > 0).join(cancelled.select(keys).unique(), on=keys, how="semi")
    for customer, stock, row, at, pieces in (
        bought.sort("moment_ms", ROW).select(*keys, ROW, "moment_ms", "pieces").iter_rows()
    ):
        open_lines.setdefault((customer, stock), []).append([row, at, pieces])
    exact = partial = unmatched = 0
    left: dict[int, int] = {}
    for customer, stock, at, pieces in (
        cancelled.sort("moment_ms", ROW).select(*keys, "moment_ms", "pieces").iter_rows()
    ):
        before = [line for line in open_lines.get((customer, stock), []) if line[1] <= at and line[2] > 0]
        back = -pieces
        same = next((line for line in reversed(before) if line[2] == back), None)
        if same is not None:
            exact += 1
            same[2] = left[same[0]] = 0
            continue
        for line in reversed(before):
            taken = min(back, line[2])
            line[2] -= taken
            left[line[0]] = line[2]
            back -= taken
            if not back:
                break
        if back == -pieces:
            unmatched += 1
        else:
            partial += 1
    change = pl.DataFrame({ROW: list(left), "left": list(left.values())}, schema={ROW: pl.Int64, "left": pl.Int64})
    total = lines.filter(cancels).height
    kept = (
        lines.filter(~cancels)
        .join(change, on=ROW, how="left", maintain_order="left")
        .filter(pl.col("left").is_null() | (pl.col("left") > 0))
        .with_columns(pl.coalesce("left", "pieces").alias("pieces"))
        .drop("left")
    )
    rules += [
        RuleCount(rule="cancellation matched with the purchase of just its quantity", rows=exact, effect="dropped"),
        RuleCount(rule="cancellation that took pieces back from earlier purchases", rows=partial, effect="dropped"),
        RuleCount(rule="cancellation without a purchase before it", rows=unmatched, effect="dropped"),
        RuleCount(
            rule="cancellation without a customer or a negative quantity",
            rows=total - exact - partial - unmatched,
            effect="dropped",
        ),
        RuleCount(rule="purchase cancelled in full", rows=sum(not rest for rest in left.values()), effect="dropped"),
        RuleCount(rule="purchase cancelled in part", rows=sum(rest > 0 for rest in left.values()), effect="changed"),
    ]
    return kept


# --- sequences ------------------------------------------------------------------------------------

_ID: Final = re.compile(ID_PATTERN)
SEQUENCE_START_MS: Final = 1_577_836_800_000
"""2020-01-01: where invented times begin."""
SEQUENCE_TRAIN_DAYS: Final = 300
SEQUENCE_HELD_OUT_DAYS: Final = 10


def load_sequences(path: Path, *, max_bad_share: float = DEFAULT_MAX_BAD_SHARE, note: Note = _silent) -> SourceData:
    """A line per user: the user's id, then item ids in order of time, separated by spaces or tabs.

    The file has order and no time, so times are invented such that the split by time IS the leave-one-out
    split of the literature: each user's last item falls into the test period (days 310 to 320), the one
    before into validation (300 to 310), the others spread evenly over the 300 days before. Users with
    fewer than three items are train only. Hour, weekday and "recent popularity" mean nothing here.
    """
    faults = RowFaults()
    encoding, remark = find_encoding(path)
    if remark:
        note(f"{path.name}: {remark}")
    users: dict[str, tuple[int, list[str]]] = {}
    with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding=encoding) as text:
        for number, line in enumerate(text, start=1):
            words = line.split()
            if not words:
                continue
            faults.rows_read += 1
            name, basket = words[0], words[1:]
            if not basket:
                faults.add("item", "a line has at least one item after the user", [number], [None], count=1)
                faults.bad_rows += 1
            elif name in users:
                faults.add("user", "must be unique; an earlier line has it", [number], [name], count=1)
                faults.bad_rows += 1
            elif wrong := [word for word in words if not _ID.search(word)]:
                field = "user" if wrong[0] is name else "item"
                faults.add(field, f"must match {ID_PATTERN}", [number], [wrong[0]], count=1)
                faults.bad_rows += 1
            else:
                users[name] = (number, basket)
    faults.stop_above(max_bad_share)
    if not users:
        raise SourceError(f"{path}: has no usable line", "give a line per user: user id, then item ids")
    train_end = SEQUENCE_START_MS + SEQUENCE_TRAIN_DAYS * DAY_MS
    held = SEQUENCE_HELD_OUT_DAYS * DAY_MS
    size = np.array([len(items) for _, items in users.values()])
    shift = (np.arange(len(size)) + 0.5) / len(size)  # spreads users within each slot
    user = np.repeat(np.arange(len(size)), size)
    nth = np.arange(len(user)) - np.repeat(np.cumsum(size) - size, size)
    held_out = np.where(size >= 3, 2, 0)
    trained = (size - held_out)[user]
    at = SEQUENCE_START_MS + ((nth + shift[user]) / trained * SEQUENCE_TRAIN_DAYS * DAY_MS).astype(np.int64)
    late = nth >= trained
    at[late] = train_end + ((nth - trained)[late] + shift[user[late]]) * held
    names = list(users)
    frame = pl.DataFrame(
        {
            ROW: pl.Series([line for line, _ in users.values()], dtype=pl.Int64).gather(user),
            "type": pl.Series(["purchase"], dtype=SCHEMA["type"]).gather(np.zeros(len(user), dtype=np.int64)),
            "timestamp_ms": at,
            "user": pl.Series(names).gather(user),
            "item": [item for _, items in users.values() for item in items],
        }
    )
    log = _log_of(frame, faults, seed=file_digest(path), max_bad_share=max_bad_share)
    items = derive_items(log, None).with_columns(
        pl.col("item").alias("title"), pl.lit(SEQUENCE_START_MS, dtype=pl.Int64).alias("first_seen_ms")
    )
    cut = Boundaries(
        start_ms=SEQUENCE_START_MS,
        train_end_ms=train_end,
        validation_end_ms=train_end + held,
        end_ms=train_end + 2 * held,
    )
    return SourceData(
        name=_stem(path),
        source=f"sequences: {path.name}",
        log=log,
        items=items,
        protocol="next_item",
        faults=faults,
        cut=cut,
    )


# --- any event log --------------------------------------------------------------------------------

EVENT_REQUIRED: Final = ("type", "timestamp_ms", "user", "item")
EVENT_OPTIONAL: Final = ("event_id", "session", "query", "position", "quantity", "price", "rating")
TEXT_COLUMNS: Final = ("title", "description", "category")
"""May stand in an event log beside the events' own columns; they describe the item."""


def load_events(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    max_bad_share: float = DEFAULT_MAX_BAD_SHARE,
    note: Note = _silent,
) -> SourceData:
    """A Parquet or CSV file with a row per event. `columns` maps our column names to the file's.

    `type`, `timestamp_ms` (epoch milliseconds, or ISO 8601), `user` and `item` must be columns, though
    users and a search's item may be empty. Without `event_id`, ids are made from the file's digest and
    the row's number, so that the same file gives the same ids.
    """
    mapping = dict(columns or {})
    if unknown := sorted(set(mapping) - {*EVENT_REQUIRED, *EVENT_OPTIONAL, *TEXT_COLUMNS}):
        raise SourceError(
            f"cannot map a column to {unknown[0]!r}: an event has no such field",
            f"use one of {', '.join((*EVENT_REQUIRED, *EVENT_OPTIONAL, *TEXT_COLUMNS))}",
        )
    faults = RowFaults()

    def names(header: list[str]) -> Mapping[str, str]:
        return _event_names(path, header, mapping)

    if path.suffix in {".parquet", ".pq"}:
        text = read_parquet(path, names=names, faults=faults)
    else:
        text = read_csv(path, names=names, faults=faults, note=note)
    text = text.with_columns(
        pl.lit(None, dtype=pl.String).alias(name) for name in (*SCHEMA, *TEXT_COLUMNS) if name not in text.columns
    )
    made = text["event_id"].is_null().all()
    typed = {
        "timestamp_ms": (_instant("timestamp_ms"), "must be epoch milliseconds or an ISO 8601 moment"),
        "type": (
            pl.col("type").str.to_lowercase().cast(SCHEMA["type"], strict=False),
            "must be one of " + ", ".join(EventType),
        ),
        "position": (_whole("position"), "must be a whole number"),
        "quantity": (_whole("quantity"), "must be a whole number"),
        "price": (pl.col("price").cast(pl.Float64, strict=False), "must be a number"),
        "rating": (pl.col("rating").cast(pl.Float64, strict=False), "must be a number"),
    }
    parsed = _parse(
        text,
        {f"typed_{name}": (name, expression, rule) for name, (expression, rule) in typed.items()},
        required=("type", "timestamp_ms"),
        faults=faults,
    ).with_columns(pl.col(f"typed_{name}").alias(name) for name in typed)
    frame = parsed.select(ROW, *(name for name in SCHEMA if not (made and name == "event_id")))
    log = _log_of(frame, faults, seed=file_digest(path), max_bad_share=max_bad_share)
    texts = parsed.select("item", *TEXT_COLUMNS)
    items = derive_items(log, texts)
    if not (items["category"] != "").any() and (items["title"] != "").any():
        items = items.with_columns(derive_categories(items["title"]).alias("category"))
    return SourceData(
        name=_stem(path), source=f"events: {path.name}", log=log, items=items, protocol="next_item", faults=faults
    )


def _event_names(path: Path, header: list[str], mapping: Mapping[str, str]) -> dict[str, str]:
    named = {name: mapping.get(name, name) for name in (*EVENT_REQUIRED, *EVENT_OPTIONAL, *TEXT_COLUMNS)}
    missing = [
        name for name, theirs in named.items() if theirs not in header and (name in EVENT_REQUIRED or name in mapping)
    ]
    if missing:
        name = missing[0]
        lacking = ", ".join(repr(named[n]) for n in missing)
        raise SourceError(
            f"{path}: missing column {lacking}; it has {', '.join(header[:20])}",
            f"add it, or say which column it is: --column {name}=<name in the file>",
        )
    return {name: theirs for name, theirs in named.items() if theirs in header}


# --- what the adapters share ----------------------------------------------------------------------


def _stem(path: Path) -> str:
    """A file's name as a data set's: lower-case letters, digits and hyphens."""
    stem = path.name.split(".")[0].lower()
    cleaned = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in stem).strip("-")
    return cleaned[:40] or "events"


def _match_names(path: Path, header: list[str], wanted: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    found = {}
    for ours, names in wanted.items():
        theirs = next((name for name in names if name in header), None)
        if theirs is None:
            raise SourceError(
                f"{path}: missing column {names[0]!r}; it has {', '.join(header[:20])}",
                "give the file as published, with its header line",
            )
        found[ours] = theirs
    return found


def _moment(formats: tuple[str, ...]) -> pl.Expr:
    parsed = [
        pl.col("moment").str.to_datetime(form, strict=False, time_unit="ms", ambiguous="null") for form in formats
    ]
    return pl.coalesce(parsed).dt.epoch("ms")


def _whole(name: str) -> pl.Expr:
    """A whole number, also when a tool has written it as 3.0."""
    return pl.col(name).str.replace(r"\.0+$", "").cast(pl.Int32, strict=False)


def _instant(name: str) -> pl.Expr:
    column = pl.col(name)
    zoned = column.str.replace(r"Z$", "+00:00").str.to_datetime(
        "%Y-%m-%dT%H:%M:%S%.f%:z", strict=False, time_unit="ms", time_zone="UTC"
    )
    forms = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
    naive = [column.str.to_datetime(form, strict=False, time_unit="ms") for form in forms[:3]]
    day = column.str.to_date(forms[3], strict=False).cast(pl.Datetime("ms"))
    return pl.coalesce(
        column.str.replace(r"\.0+$", "").cast(pl.Int64, strict=False),
        zoned.dt.epoch("ms"),
        *(moment.dt.epoch("ms") for moment in naive),
        day.dt.epoch("ms"),
    )


def _parse(
    text: pl.DataFrame,
    typed: Mapping[str, tuple[str, pl.Expr, str]],
    *,
    required: tuple[str, ...],
    faults: RowFaults,
) -> pl.DataFrame:
    """Add typed columns (name -> source column, expression, rule); rows where one fails go to `faults`."""
    frame = text.with_columns(expression.alias(name) for name, (_, expression, _) in typed.items())
    checks = [(name, "is required", pl.col(name).is_null()) for name in required]
    checks += [
        (source, rule, pl.col(name).is_null() & pl.col(source).is_not_null())
        for name, (source, _, rule) in typed.items()
    ]
    bad = pl.repeat(value=False, n=frame.height, eager=True)
    for name, rule, broken in checks:
        mask = frame.select(broken.alias("broken"))["broken"]
        if mask.any():
            rows = frame.filter(mask)
            head = rows.head(SAMPLES_PER_RULE)
            faults.add(name, rule, head[ROW].to_list(), head[name].to_list(), count=rows.height)
            bad = bad | mask
    faults.bad_rows += int(bad.sum())
    return frame.filter(~bad)


def _drop(lines: pl.DataFrame, unwanted: pl.Expr, rule: str, rules: list[RuleCount]) -> pl.DataFrame:
    kept = lines.filter(~unwanted.fill_null(value=False))
    rules.append(RuleCount(rule=rule, rows=lines.height - kept.height, effect="dropped"))
    return kept


def _log_of(frame: pl.DataFrame, faults: RowFaults, *, seed: str, max_bad_share: float) -> EventLog:
    """The valid rows of `frame` (`ROW` and some columns of an event) as a log, missing columns filled in."""
    frame = frame.with_columns(
        pl.lit(None, dtype=dtype).alias(name) for name, dtype in SCHEMA.items() if name not in frame.columns
    )
    if frame["event_id"].is_null().all() and frame.height:
        # Ids of the same file are the same each time: the random bits come from the file's digest and the row.
        generator = np.random.Generator(np.random.Philox(key=int(hashlib.sha256(seed.encode()).hexdigest()[:16], 16)))
        random = generator.integers(0, 256, size=(frame.height, 10), dtype=np.uint8)
        times = frame["timestamp_ms"].clip(0, 2**48 - 1).to_numpy()
        frame = frame.with_columns(uuid7_column(times, random))
    good = sift(frame.select(ROW, *SCHEMA), faults)
    faults.stop_above(max_bad_share)
    if not good.height:
        raise SourceError("no row is a usable event", "give a file with events in it")
    return EventLog.sorted(good)


def _most_frequent(texts: pl.DataFrame, name: str) -> pl.DataFrame:
    """(item, name): each item's most frequent non-empty text; of equals the first in the alphabet."""
    return (
        texts.filter(pl.col(name).is_not_null(), pl.col("item").is_not_null())
        .group_by("item", name)
        .len()
        .sort("len", name, descending=[True, False])
        .group_by("item", maintain_order=True)
        .agg(pl.col(name).first())
    )


def derive_items(log: EventLog, texts: pl.DataFrame | None) -> pl.DataFrame:
    """A catalogue from events and the texts that came with them (item, and any of title, description, category).

    Title, description and category are the most frequent ones (a description alone becomes the title),
    price is the median paid, first seen is the first event.
    """
    seen = (
        log.frame.filter(pl.col("item").is_not_null())
        .group_by("item")
        .agg(pl.col("price").median(), pl.col("timestamp_ms").min().alias("first_seen_ms"))
    )
    given = [name for name in TEXT_COLUMNS if texts is not None and name in texts.columns]
    for name in given:
        if texts is not None:
            seen = seen.join(_most_frequent(texts, name), on="item", how="left")
    absent = [name for name in TEXT_COLUMNS if name not in given]
    items = seen.with_columns(
        *(pl.lit(None, dtype=pl.String).alias(name) for name in absent),
        pl.lit([], dtype=pl.List(pl.Float32)).alias("image"),
        pl.lit(value=True).alias("in_stock"),
    )
    items = items.with_columns(pl.coalesce("title", "description").alias("title")).with_columns(
        pl.when(pl.col("description") != pl.col("title")).then(pl.col("description")).alias("description")
    )
    return items.with_columns(pl.col(*TEXT_COLUMNS).fill_null("")).select(*ITEM_SCHEMA).sort("item")


CATEGORY_ITEMS_MIN: Final = 8
CATEGORIES_MAX: Final = 96
OTHER: Final = "other"

_NOT_A_HEAD: Final = frozenset(
    """
    a an and the of in on for with to by at from or x set pack box assorted asstd asst design designs colour colours
    color colors small medium large mini big tall short new old vintage retro red blue green pink white black cream
    ivory silver gold grey gray yellow orange purple brown lilac turquoise beige clear multi natural antique spot spots
    polkadot stripe stripes heart hearts star stars flower flowers butterfly christmas xmas easter home love piece
    pieces cm inch retrospot rose girl boy garden hanging paisley french england
    """.split()  # noqa: SIM905 - a list of a hundred quoted words is no easier to read
)
"""Words that end a product's name without saying what it is."""


def derive_categories(titles: pl.Series) -> pl.Series:
    """A coarse category per title: its head word, the last word that says what the thing is.

    English product names end in their noun ("cream cupid hearts coat HANGER"), before any "of", "in" or
    "with". Colours, sizes and motifs are no heads; plurals count as singulars. Head words of fewer than 8
    products, and all but the 96 most frequent, become "other". The same titles give the same categories.
    """
    candidates = [_heads(title) for title in titles.to_list()]
    count = Counter(words[0] for words in candidates if words)
    kept = {
        word
        for word, times in sorted(count.items(), key=lambda e: (-e[1], e[0]))[:CATEGORIES_MAX]
        if times >= CATEGORY_ITEMS_MIN
    }
    return pl.Series(
        "category", [next((word for word in words if word in kept), OTHER) for words in candidates], dtype=pl.String
    )


def _heads(title: str) -> list[str]:
    """Words of a title that may say what it is, the likeliest first."""
    words = "".join(letter if letter.isalpha() else " " for letter in title.lower()).split()
    cut = next((place for place, word in enumerate(words) if place and word in {"with", "in", "for", "w"}), len(words))
    ordered = words[:cut][::-1] + words[cut:][::-1]
    return [_singular(word) for word in ordered if word not in _NOT_A_HEAD and len(word) > 2]


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
