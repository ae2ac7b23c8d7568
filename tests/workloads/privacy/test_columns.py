"""What the policy names leaves as the policy says, and nothing else leaves."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.contract.events import Event, is_uuid7
from workloads.data.cleaning import ITEM_SCHEMA
from workloads.data.events import SCHEMA
from workloads.privacy.columns import DEFAULT, Context, Policy, PolicyError
from workloads.privacy.pseudonym import PseudonymKey

KEY = PseudonymKey(epoch=1, secret=bytes(range(32)))
POLICY = Policy.read()
ADA, BOB = f"p1-{'a' * 32}", f"p2-{'b' * 32}"
IDS = [f"0190a5b2-c3d4-7{n:03x}-8123-456789abcdef" for n in range(20)]


def _events(**columns: list[object]) -> pa.Table:
    return pa.table({name: pa.array(values) for name, values in columns.items()})


def _applied(table: pa.Table, policy: Policy = POLICY, name: str = "events") -> dict[str, list[object]]:
    found: dict[str, list[object]] = policy.apply(name, table, policy.context(KEY, {name: [table]})).to_pydict()
    return found


def _policy(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text("version = 1\n" + text)
    return Policy.read(path)


def test_the_default_decides_about_every_column_that_there_is():
    POLICY.check("events", [*SCHEMA, *Event.__struct_fields__, "seq", "received_ms"])
    POLICY.check("items", ITEM_SCHEMA)


def test_a_column_that_nobody_decided_about_does_not_leave():
    table = _events(item=["a"], loyalty_card=["1"])
    with pytest.raises(PolicyError, match=r"'loyalty_card' of table 'events' may not leave.*\[tables.events\]"):
        POLICY.apply("events", table, Context(KEY))
    with pytest.raises(PolicyError, match="'loyalty_card'"):
        POLICY.context(KEY, {"events": [table]})


def test_a_table_that_nobody_decided_about_does_not_leave():
    with pytest.raises(PolicyError, match=r"'profiles' may not leave.*\[tables.profiles\]"):
        POLICY.apply("profiles", _events(item=["a"]), Context(KEY))


def test_never_is_never():
    out = _applied(_events(item=["a"], context=["secret"], received_ms=[1]))
    assert out == {"item": ["a"]}


def test_pseudonyms_pass_and_raw_ids_are_mapped_or_vanish():
    table = _events(user=[ADA, BOB, "ada@example.org", "stranger", None])
    context = Context(KEY, users=lambda user: ADA if user == "ada@example.org" else None)
    assert POLICY.apply("events", table, context).to_pydict() == {"user": [ADA, BOB, ADA, None, None]}


def test_sessions_become_keyed_ones():
    keyed = KEY.session("basket-1")
    assert _applied(_events(session=["basket-1", keyed, None]))["session"] == [keyed, keyed, None]


@given(st.lists(st.integers(-(2**52), 2**52) | st.none(), min_size=1))
def test_times_are_rounded_down_and_keep_their_order(times: list[int | None]):
    table = pa.table({"timestamp_ms": pa.array(times, pa.int64())})
    out = _applied(table)["timestamp_ms"]
    assert out == [None if t is None else t - t % 60_000 for t in times]


def test_prices_go_in_steps_and_quantities_end_at_the_cap():
    out = _applied(_events(price=[1.04, 1.06, None, 12.5], quantity=[1, 100, 80_995, None]))
    assert out["price"] == [1.0, 1.1, None, 12.5]
    assert out["quantity"] == [1, 100, 100, None]


def test_a_new_event_id_is_one_of_the_contract_and_knows_only_the_minute():
    out = _applied(_events(event_id=IDS))["event_id"]
    assert all(isinstance(value, str) and is_uuid7(value) for value in out)
    assert len(set(out)) == len(IDS)
    assert not set(out) & set(IDS)
    clocks = {int(str(value).replace("-", "")[:12], 16) for value in out}
    assert clocks == {0x0190A5B2C3D4 - 0x0190A5B2C3D4 % 60_000}
    assert _applied(_events(event_id=IDS))["event_id"] == out
    other = PseudonymKey(epoch=1, secret=b"o" * 32)
    assert POLICY.apply("events", _events(event_id=IDS), Context(other)).to_pydict()["event_id"] != out


@pytest.mark.parametrize(
    "private",
    [
        "ada.lovelace@example.org",
        "ada@münchen.example",
        "+44 20 7946 0958",
        "(030) 12 34 56-78",
        "4111-1111-1111-1111",
        "order12345",
        "https://shop.example/?token=abc",
        "www.ada.example/me",
    ],
)
def test_what_points_at_a_person_is_taken_out_of_a_query(private: str):
    table = _events(query=[f"red {private} shoes"] * 5, user=[f"p1-{n:032x}" for n in range(5)])
    assert _applied(table)["query"] == ["red shoes"] * 5


@pytest.mark.parametrize("harmless", ["iphone 15 pro", "size 42", "4k tv 55 inch", "2024 calendar", "set of 12 cups"])
def test_what_is_only_about_goods_stays_in_a_query(harmless: str):
    table = _events(query=[harmless] * 5, user=[f"p1-{n:032x}" for n in range(5)])
    assert _applied(table)["query"] == [harmless] * 5


def test_a_query_leaves_only_where_enough_different_people_typed_it():
    people = [f"p1-{n:032x}" for n in range(5)]
    queries = ["shoes"] * 5 + ["lamp"] * 5 + ["my neighbour"] * 5 + ["anonymous"] * 5
    users = people + people[:4] + people[:1] + people[:1] * 5 + [None] * 5
    table = _events(query=queries, user=users, type=["click"] * 20)
    assert _applied(table)["query"] == ["shoes"] * 5 + [None] * 15


def test_people_are_counted_over_all_parts_of_a_table():
    parts = [_events(query=["shoes"], user=[f"p1-{n:032x}"]) for n in range(5)]
    context = POLICY.context(KEY, {"events": iter(parts)})
    assert POLICY.apply("events", parts[0], context).to_pydict()["query"] == ["shoes"]
    assert POLICY.apply("events", parts[0], POLICY.context(KEY, {"events": parts[:4]}))["query"].to_pylist() == [None]
    assert POLICY.apply("events", parts[0], Context(KEY))["query"].to_pylist() == [None]


def test_a_search_that_lost_its_query_stays_at_home():
    table = _events(query=["ada@example.org", "x", None], user=[ADA] * 3, type=["search", "click", "view"])
    out = _applied(table)
    assert out == {"query": [None, None], "user": [ADA, ADA], "type": ["click", "view"]}


def test_no_value_hides_in_a_dictionary_or_in_metadata():
    canary = "ada@example.org"
    table = pa.table({"query": pa.array([canary, "b"]).dictionary_encode(), "user": pa.array([ADA, ADA])})
    table = table.replace_schema_metadata({"pandas": canary})
    table = table.set_column(0, pa.field("query", table["query"].type, metadata={"seen": canary}), table["query"])
    context = POLICY.context(KEY, {"events": [table]})
    sink = pa.BufferOutputStream()
    out = POLICY.apply("events", table, context)
    with pa.ipc.new_stream(sink, out.schema) as writer:
        writer.write_table(out)
    assert canary.encode() not in sink.getvalue().to_pybytes()


def test_tables_of_polars_come_back_with_their_rows():
    frame = pl.DataFrame({"type": ["search", "click"], "query": ["a", None], "user": [ADA, BOB]}).cast(
        {"type": SCHEMA["type"]}
    )
    out = _applied(frame.to_arrow())
    assert out == {"type": ["click"], "query": [None], "user": [BOB]}


def test_an_empty_table_is_no_special_case():
    frame_types = {"event_id": pa.string(), "timestamp_ms": pa.int64(), "user": pa.large_string(), "query": pa.null()}
    table = pa.table({name: pa.array([], kind) for name, kind in frame_types.items()})
    assert all(values == [] for values in _applied(table).values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[tables.t]\nc = { do = "publish" }', "t.c: there is no action 'publish'"),
        ('[tables.t]\nc = { do = "generalise", rule = "blur" }', "t.c: there is no rule 'blur'"),
        ('[tables.t]\nc = { do = "generalise", rule = "time" }', "missing required field `to_ms`"),
        ('[tables.t]\nc = { do = "generalise", rule = "time", to_ms = 0 }', "> 0|>= 1"),
        ('[tables.t]\nc = { do = "leave", really = true }', "unknown field `really`"),
        ('[tables.t]\nc = { do = "pseudonymise", as = "item" }', "Invalid enum value 'item'"),
        ('[tables.t]\nc = "leave"', "t.c is 'leave'"),
        ('[tables.t]\nc = { do = "generalise", rule = "text", min_users = 5, of = "u" }', "speaks of column 'u'"),
        ("", "no column policy of version 1"),
        ("[tables", "TOML"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_with_the_place(tmp_path: Path, text: str, said: str):
    with pytest.raises(PolicyError, match=said):
        _policy(tmp_path, text)


def test_a_missing_policy_is_a_fault_and_not_an_open_door(tmp_path: Path):
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.read(tmp_path / "none.toml")


def test_a_rule_for_another_type_of_column_is_refused_by_name(tmp_path: Path):
    with pytest.raises(PolicyError, match="column 'user' of table 'events' is of type int64"):
        POLICY.apply("events", _events(user=[1]), Context(KEY))
    policy = _policy(tmp_path, '[tables.t]\nc = { do = "generalise", rule = "time", to_ms = 5 }')
    with pytest.raises(PolicyError, match="of type string"):
        policy.apply("t", pa.table({"c": ["now"]}), Context(KEY))


def test_the_default_is_shipped_with_the_package():
    assert DEFAULT.is_file()
