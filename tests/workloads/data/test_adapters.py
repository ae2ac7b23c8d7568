"""Sources that are files: every rule on rows made by hand, every fault with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.data.adapters import (
    SERVICE_CODES,
    derive_categories,
    load_events,
    load_online_retail,
    load_sequences,
)
from workloads.data.cleaning import check_items
from workloads.data.events import TooManyFaultsError
from workloads.data.reading import SourceError
from workloads.data.source import SourceData

HEADER = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"


def retail(folder: Path, *lines: str, header: str = HEADER, max_bad_share: float = 0.05) -> SourceData:
    path = folder / "retail.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return load_online_retail(path, max_bad_share=max_bad_share)


def line(
    invoice: str = "536365",
    stock: str = "85123A",
    quantity: int = 6,
    day: int = 1,
    *,
    text: str = "WHITE HEART HOLDER",
    price: float = 2.55,
    customer: str = "17850.0",
) -> str:
    return f"{invoice},{stock},{text},{quantity},2010-12-{day:02d} 08:26:00,{price},{customer},United Kingdom"


def rules(source: SourceData) -> dict[str, int]:
    return {rule.rule: rule.rows for rule in source.rules}


def rule_rows(source: SourceData, beginning: str) -> int:
    (found,) = [rows for rule, rows in rules(source).items() if rule.startswith(beginning)]
    return found


def test_an_invoice_line_becomes_a_purchase_in_its_basket(tmp_path: Path):
    source = retail(tmp_path, line())
    (event,) = source.log.events()
    assert (event.type, event.user, event.item, event.session) == ("purchase", "17850", "85123A", "536365")
    assert (event.quantity, event.price, event.timestamp_ms) == (6, 2.55, 1_291_191_960_000)
    assert source.protocol == "next_basket"


def test_the_same_file_gives_the_same_ids_and_another_file_others(tmp_path: Path):
    first = retail(tmp_path, line())
    again = retail(tmp_path, line())
    other = retail(tmp_path, line(quantity=7))
    assert first.log.frame.equals(again.log.frame)
    assert first.log.frame["event_id"][0] != other.log.frame["event_id"][0]


def test_a_cancellation_and_the_purchase_it_cancels_both_go(tmp_path: Path):
    source = retail(tmp_path, line(), line("536366", "22633", day=2), line("C536379", quantity=-6, day=3))
    assert source.log.frame["item"].to_list() == ["22633"]
    assert rule_rows(source, "cancellation matched") == 1
    assert rule_rows(source, "purchase cancelled in full") == 1


def test_a_cancellation_takes_the_latest_purchase_of_just_its_quantity(tmp_path: Path):
    source = retail(
        tmp_path, line("1", day=1), line("2", day=2), line("3", quantity=9, day=3), line("C4", quantity=-6, day=4)
    )
    assert source.log.frame.select("session", "quantity").rows() == [("1", 6), ("3", 9)]


def test_a_cancellation_of_some_pieces_leaves_the_others(tmp_path: Path):
    source = retail(tmp_path, line(), line("C2", quantity=-2, day=2))
    assert source.log.frame["quantity"].to_list() == [4]
    assert rule_rows(source, "cancellation that took pieces") == 1
    assert rule_rows(source, "purchase cancelled in part") == 1


def test_a_cancellation_of_more_than_one_purchase_goes_through_them_from_the_latest(tmp_path: Path):
    source = retail(tmp_path, line("1", day=1), line("2", day=2), line("C3", quantity=-8, day=3))
    assert source.log.frame.select("session", "quantity").rows() == [("1", 4)]


def test_a_cancellation_never_touches_a_later_purchase_another_customer_or_another_product(tmp_path: Path):
    source = retail(
        tmp_path,
        line("C1", quantity=-6, day=1),
        line("2", day=2),
        line("3", day=2, customer="12345"),
        line("4", "22633", day=2),
        line("C5", "84029G", quantity=-6, day=3),
    )
    assert source.log.frame["session"].to_list() == ["2", "3", "4"]
    assert rule_rows(source, "cancellation without a purchase") == 2


def test_a_cancellation_without_a_customer_is_dropped_and_said(tmp_path: Path):
    source = retail(tmp_path, line(customer=""), line("C2", quantity=-6, day=2, customer=""))
    assert len(source.log) == 1
    assert rule_rows(source, "cancellation without a customer") == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(1, 28)), min_size=1, max_size=12))
def test_cancelling_never_creates_pieces_and_takes_back_no_more_than_was_bought(
    tmp_path_factory: pytest.TempPathFactory, trades: list[tuple[bool, int, int]]
):
    lines = [
        line(f"C{n}" if back else str(n), quantity=-pieces if back else pieces, day=day)
        for n, (back, pieces, day) in enumerate(trades)
    ]
    bought = sum(pieces for back, pieces, _ in trades if not back)
    returned = sum(pieces for back, pieces, _ in trades if back)
    folder = tmp_path_factory.mktemp("trades")
    if not bought:
        with pytest.raises(SourceError):
            retail(folder, *lines)
        return
    try:
        left = int(retail(folder, *lines).log.frame["quantity"].sum())
    except SourceError:  # everything was taken back
        left = 0
    assert max(0, bought - returned) <= left <= bought


def test_service_lines_are_no_goods(tmp_path: Path):
    codes = [*sorted(SERVICE_CODES), "gift_0001_20", "m", "TEST001"]
    source = retail(tmp_path, line(), *(line(str(n), code) for n, code in enumerate(codes)))
    assert source.log.frame["item"].to_list() == ["85123A"]
    assert rule_rows(source, "service line") == len(codes)


def test_adjustments_gifts_and_write_offs_are_dropped_and_counted(tmp_path: Path):
    source = retail(
        tmp_path,
        line(),
        line("2", quantity=-5, customer=""),
        line("3", price=0.0),
        line("4", price=-11062.06),
    )
    assert len(source.log) == 1
    assert rule_rows(source, "quantity not positive") == 1
    assert rule_rows(source, "price not positive") == 2


def test_a_basket_without_a_customer_stays_a_basket(tmp_path: Path):
    source = retail(tmp_path, line(customer=""), line(stock="22633", customer=""), line("2"))
    baskets = source.log.frame.filter(pl.col("user").is_null())
    assert baskets["session"].to_list() == ["536365", "536365"]
    assert rule_rows(source, "line without a customer") == 2


def test_repeated_lines_go_and_lines_of_one_product_in_one_invoice_add_up(tmp_path: Path):
    source = retail(tmp_path, line(), line(), line(quantity=2, price=3.35), line(stock="85123a", quantity=1))
    assert source.log.frame.select("quantity", "price").rows() == [(9, pytest.approx(2.7278, abs=1e-4))]
    assert rule_rows(source, "line repeated") == 1
    assert rule_rows(source, "line of a product") == 2


def test_the_catalogue_takes_the_most_frequent_text_the_median_price_and_the_first_day(tmp_path: Path):
    source = retail(
        tmp_path,
        line("1", day=3, price=2.0),
        line("2", day=2, price=9.0, text="white heart holder??"),
        line("3", day=4, price=4.0),
    )
    (row,) = check_items(source.items).iter_rows(named=True)
    assert row["title"] == "WHITE HEART HOLDER"
    assert row["price"] == 4.0
    assert row["first_seen_ms"] == 1_291_191_960_000 + 86_400_000
    assert row["in_stock"] is True


def test_bad_rows_are_reported_by_line_and_field_and_good_rows_kept(tmp_path: Path):
    source = retail(
        tmp_path,
        line(),
        line("2").replace(",6,", ",six,"),
        line("3").replace("2010-12-01 08:26:00", "yesterday"),
        line("4").replace("2.55", "cheap"),
        line("5").replace("85123A", ""),
        "6,85123A",
        max_bad_share=1.0,
    )
    assert len(source.log) == 1
    assert (source.faults.rows_read, source.faults.bad_rows) == (6, 5)
    found = {(f.row, f.field, f.value) for f in source.faults.samples}
    assert found == {
        (3, "quantity", "six"),
        (4, "moment", "yesterday"),
        (5, "price", "cheap"),
        (6, "stock", ""),
        (7, "line", "2 fields"),
    }


def test_too_many_bad_rows_stop_with_the_counts(tmp_path: Path):
    with pytest.raises(TooManyFaultsError, match=r"1 of 4 rows are bad \(25.0%\)"):
        retail(tmp_path, line(), line("2"), line("3"), line("4").replace(",6,", ",six,"))


def test_a_missing_column_stops_at_once_and_is_named(tmp_path: Path):
    with pytest.raises(SourceError, match="missing column 'StockCode'"):
        retail(tmp_path, "1", header="InvoiceNo,Quantity")


def test_the_second_edition_and_the_original_dates_are_read(tmp_path: Path):
    header = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country"
    source = retail(tmp_path, line().replace("2010-12-01 08:26:00", "12/1/2010 8:26"), header=header)
    assert source.log.frame["timestamp_ms"].to_list() == [1_291_191_960_000]


def test_nothing_left_is_said_and_not_an_empty_data_set(tmp_path: Path):
    with pytest.raises(SourceError, match="no usable row"):
        retail(tmp_path)
    with pytest.raises(SourceError, match="no row is a usable event"):
        retail(tmp_path, line(stock="POST"))


def test_pound_signs_of_windows_are_read_and_said(tmp_path: Path):
    path = tmp_path / "retail.csv"
    path.write_bytes(f"{HEADER}\n{line(text='GIFT £5')}\n".encode("cp1252"))
    notes: list[str] = []
    source = load_online_retail(path, note=notes.append)
    assert source.items["title"].to_list() == ["GIFT £5"]
    assert notes == ["retail.csv: read as cp1252: line 2 has the byte 0xa3, which is not UTF-8"]


def test_categories_are_head_words_that_enough_products_share():
    titles = pl.Series([f"{colour} CERAMIC MUGS" for colour in ("RED", "BLUE") * 5] + ["BLUE STOOL OF OAK", ""])
    found = derive_categories(titles).to_list()
    assert found == ["mug"] * 10 + ["other"] * 2
    assert derive_categories(titles).to_list() == found


# --- sequences ---


def sequences(folder: Path, text: str, max_bad_share: float = 0.05) -> SourceData:
    path = folder / "beauty.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return load_sequences(path, max_bad_share=max_bad_share)


def test_the_split_by_time_of_sequences_is_leave_one_out(tmp_path: Path):
    source = sequences(tmp_path, "u1 a b c d e\nu2 c d\nu3 e a b\n")
    assert source.cut is not None
    parts = {name: source.cut.part(source.log, name).frame for name in ("train", "validation", "test")}
    assert sorted(parts["test"].select("user", "item").rows()) == [("u1", "e"), ("u3", "b")]
    assert sorted(parts["validation"].select("user", "item").rows()) == [("u1", "d"), ("u3", "a")]
    assert sum(frame.height for frame in parts.values()) == len(source.log) == 10
    for user, order in (("u1", list("abcde")), ("u2", list("cd")), ("u3", list("eab"))):
        assert source.log.frame.filter(pl.col("user") == user)["item"].to_list() == order
    assert source.name == "beauty"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=20))
def test_invented_times_keep_every_order_and_every_boundary(
    tmp_path_factory: pytest.TempPathFactory, histories: list[list[int]]
):
    text = "\n".join(" ".join(["u" + str(n), *map(str, items)]) for n, items in enumerate(histories))
    source = sequences(tmp_path_factory.mktemp("sequences"), text)
    cut = source.cut
    assert cut is not None
    by_user = dict(
        source.log.frame.group_by("user", maintain_order=True)
        .agg("item", "timestamp_ms")
        .select("user", "item")
        .iter_rows()
    )
    assert by_user == {f"u{n}": [str(item) for item in items] for n, items in enumerate(histories)}
    assert sum(len(cut.part(source.log, name)) for name in ("train", "validation", "test")) == len(source.log)
    held_out = sum(len(items) >= 3 for items in histories)
    assert len(cut.part(source.log, "test")) == len(cut.part(source.log, "validation")) == held_out


def test_a_user_twice_without_items_or_with_an_impossible_one_is_a_bad_line(tmp_path: Path):
    source = sequences(tmp_path, f"u1 a b\n\nu2\nu1 c d\nu3 a\nu4 b {'x' * 129} c\n", max_bad_share=1.0)
    assert {(f.row, f.field) for f in source.faults.samples} == {(3, "item"), (4, "user"), (6, "item")}
    assert (source.faults.rows_read, source.faults.bad_rows) == (5, 3)
    assert source.log.frame["user"].n_unique() == 2


# --- any event log ---

EVENTS = "event_id,type,timestamp_ms,user,item,session,price,rating,title"
UUID = "019b8b7c-b201-7000-8000-00000000000"


def events(folder: Path, *lines: str, header: str = EVENTS, max_bad_share: float = 0.05, **columns: str) -> SourceData:
    path = folder / "shop.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return load_events(path, columns=columns, max_bad_share=max_bad_share)


def test_an_event_log_is_read_with_its_texts(tmp_path: Path):
    source = events(
        tmp_path,
        f"{UUID}1,view,1767600000000,ada,mug,s1,,,Blue Mug",
        f"{UUID}2,PURCHASE,2026-01-05T12:00:00Z,ada,mug,s1,4.5,,Blue Mug",
        f"{UUID}3,rating,2026-01-06 12:00:00,,mug,,,5,Mug",
    )
    assert source.log.frame["type"].to_list() == ["view", "purchase", "rating"]
    assert source.log.frame["timestamp_ms"].to_list() == [1_767_600_000_000, 1_767_614_400_000, 1_767_700_800_000]
    assert source.items.select("item", "title", "price").rows() == [("mug", "Blue Mug", 4.5)]
    assert source.protocol == "next_item"


def test_columns_of_other_names_are_mapped(tmp_path: Path):
    source = events(
        tmp_path, "view,1767600000000,ada,mug", header="what,at,customer,sku",
        type="what", timestamp_ms="at", user="customer", item="sku",
    )  # fmt: skip
    assert source.log.frame.select("user", "item").rows() == [("ada", "mug")]


def test_a_missing_required_column_stops_at_once_with_its_name_and_the_remedy(tmp_path: Path):
    with pytest.raises(SourceError, match="missing column 'user', 'item'") as caught:
        events(tmp_path, "view,1", header="type,timestamp_ms")
    assert caught.value.remedy == "add it, or say which column it is: --column user=<name in the file>"


def test_mapping_a_field_that_no_event_has_is_refused(tmp_path: Path):
    with pytest.raises(SourceError, match="'colour': an event has no such field"):
        events(tmp_path, colour="what")


def test_wrong_types_and_duplicate_ids_are_reported_by_row(tmp_path: Path):
    source = events(
        tmp_path,
        f"{UUID}1,view,1767600000000,ada,mug,,,,",
        f"{UUID}2,teleport,1767600000000,ada,mug,,,,",
        f"{UUID}3,view,soon,ada,mug,,,,",
        f"{UUID}4,view,1767600000000,ada,,,,,",
        f"{UUID}5,view,1767600000000,ada,mug,,cheap,,",
        f"{UUID}1,view,1767600000001,ada,mug,,,,",
        "17,view,1767600000000,ada,mug,,,,",
        f"{UUID}8,view,1767600000,ada,mug,,,,",
        f"{UUID}9,rating,1767600000000,ada,mug,,,nan,",
        max_bad_share=1.0,
    )
    assert len(source.log) == 1
    assert source.faults.bad_rows == 8
    found = {(f.row, f.field) for f in source.faults.samples}
    assert found == {
        (3, "type"),
        (4, "timestamp_ms"),
        (5, "item"),
        (6, "price"),
        (7, "event_id"),
        (8, "event_id"),
        (9, "timestamp_ms"),
        (10, "rating"),
    }


def test_without_ids_the_same_file_gives_the_same_made_ids(tmp_path: Path):
    lines = ["view,1767600000000,ada,mug", "view,1767600000001,ada,mug"]
    first = events(tmp_path, *lines, header="type,timestamp_ms,user,item")
    again = events(tmp_path, *lines, header="type,timestamp_ms,user,item")
    assert first.log.frame.equals(again.log.frame)


def test_parquet_gives_the_same_log_as_csv(tmp_path: Path):
    from_csv = events(tmp_path, f"{UUID}1,view,1767600000000,7,12,s1,1.5,,Mug", f"{UUID}2,view,1767600000005,8,13,,,,")
    pl.read_csv(tmp_path / "shop.csv").with_columns(pl.from_epoch("timestamp_ms", time_unit="ms")).write_parquet(
        tmp_path / "shop.parquet"
    )
    from_parquet = load_events(tmp_path / "shop.parquet")
    assert from_parquet.log.frame.equals(from_csv.log.frame)
    assert from_parquet.items.equals(from_csv.items)


def test_values_of_persons_never_stand_in_a_report(tmp_path: Path):
    bad = "x" * 129
    source = events(tmp_path, f"view,1767600000000,{bad},mug", "view,1767600000000,ada,mug",
                    header="type,timestamp_ms,user,item", max_bad_share=1.0)  # fmt: skip
    assert {f.value for f in source.faults.samples if f.field == "user"} == {"<129 characters>"}
