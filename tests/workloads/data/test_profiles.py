"""Profiles: the latest touches of a person, the strongest sign on each, found by pseudonym alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from workloads.contract.events import POSITIVE_TYPES, EventType
from workloads.contract.tensors import STRENGTH
from workloads.data.events import SCHEMA, EventLog
from workloads.data.profile_builder import _STRONGEST_FIRST, build_profiles
from workloads.data.profiles import (
    TOUCHES_MAX,
    MemoryProfiles,
    Profile,
    ProfileStore,
    ProfileStoreError,
    SqliteProfiles,
    Touch,
    write_profiles,
)
from workloads.data.simulator import Simulation

AT = 1_767_600_000_000


def a_log(*rows: tuple[str, str | None, str, int]) -> EventLog:
    """Rows of (type, user, item, minutes)."""
    frame = pl.DataFrame(
        [
            dict.fromkeys(SCHEMA)
            | {
                "event_id": f"019b8b7c-b201-7000-8000-{number:012x}",
                "type": kind,
                "timestamp_ms": AT + minutes * 60_000,
                "user": user,
                "item": item,
                "rating": 4.0 if kind == "rating" else None,
            }
            for number, (kind, user, item, minutes) in enumerate(rows)
        ],
        schema=dict(SCHEMA),
        orient="row",
    )
    return EventLog.sorted(frame)


def test_a_profile_has_one_touch_per_item_the_longest_ago_first():
    log = a_log(
        ("click", "ada", "mug", 0),
        ("view", "ada", "mug", 1),
        ("cart", "ada", "mug", 2),
        ("purchase", "ada", "mug", 3),
        ("view", "ada", "mug", 9),
        ("view", "ada", "lamp", 5),
        ("view", "bob", "lamp", 6),
    )
    ada, bob = build_profiles(log)
    assert ada.touches == [
        Touch("lamp", EventType.VIEW, 1, 0, AT + 5 * 60_000),
        Touch("mug", EventType.PURCHASE, 5, 1, AT + 9 * 60_000),
    ]
    assert bob == Profile("bob", [Touch("lamp", EventType.VIEW, 1, 0, AT + 6 * 60_000)])


def test_what_was_only_shown_or_done_by_nobody_is_in_no_profile():
    log = a_log(("impression", "ada", "mug", 0), ("view", None, "mug", 1))
    assert list(build_profiles(log)) == []


def test_a_profile_keeps_the_latest_items_only():
    log = a_log(*(("view", "ada", f"sku-{n}", n) for n in range(TOUCHES_MAX + 40)))
    (ada,) = build_profiles(log)
    assert len(ada.touches) == TOUCHES_MAX
    assert ada.touches[0].item == "sku-40"
    assert ada.touches[-1].item == f"sku-{TOUCHES_MAX + 39}"


def test_the_order_of_strength_is_the_contracts():
    assert set(_STRONGEST_FIRST) == POSITIVE_TYPES
    strengths = [STRENGTH[kind] for kind in _STRONGEST_FIRST]
    assert strengths == sorted(strengths, reverse=True)


def test_the_file_and_the_fake_answer_alike(tmp_path: Path, simulation: Simulation):
    profiles = list(build_profiles(simulation.log))
    path = tmp_path / "profiles.sqlite"
    assert write_profiles(path, profiles, {"dataset": "simulator-0"}) == len(profiles)
    fake: ProfileStore = MemoryProfiles(profiles)
    with SqliteProfiles(path) as stored:
        assert len(stored) == len(profiles)
        assert stored.meta["dataset"] == "simulator-0"
        for profile in profiles[::50]:
            assert stored.get(profile.pseudonym) == fake.get(profile.pseudonym) == profile
        assert stored.get("nobody") is None
    assert fake.get("nobody") is None
    fake.close()


def test_the_file_is_private_and_cannot_be_written_through_the_store(tmp_path: Path):
    path = tmp_path / "profiles.sqlite"
    write_profiles(path, [Profile("p1-" + "0" * 32, [])], {})
    assert path.stat().st_mode & 0o777 == 0o600
    with SqliteProfiles(path) as stored, pytest.raises(sqlite3.OperationalError, match="readonly"):
        stored._connection.execute("DELETE FROM profiles")
    assert [entry.name for entry in tmp_path.iterdir()] == ["profiles.sqlite"]


def test_an_open_store_keeps_answering_while_the_file_is_replaced(tmp_path: Path):
    path = tmp_path / "profiles.sqlite"
    touch = Touch("mug", EventType.VIEW, 1, 0, AT)
    write_profiles(path, [Profile("p1-a", [touch])], {})
    with SqliteProfiles(path) as before:
        write_profiles(path, [Profile("p1-b", [touch])], {})
        assert before.get("p1-a") is not None
    with SqliteProfiles(path) as after:
        assert after.get("p1-a") is None
        assert after.get("p1-b") is not None


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "profiles.sqlite"
    write_profiles(path, [Profile("p1-a", [])], {})

    def broken() -> Iterator[Profile]:
        yield Profile("p1-b", [])
        raise RuntimeError("the source ended")

    with pytest.raises(RuntimeError, match="the source ended"):
        write_profiles(path, broken(), {})
    with SqliteProfiles(path) as stored:
        assert stored.get("p1-a") is not None
    assert [entry.name for entry in tmp_path.iterdir()] == ["profiles.sqlite"]


def test_a_missing_a_foreign_and_an_old_file_are_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(ProfileStoreError, match="no such profile store; prepare a data set"):
        SqliteProfiles(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("not a database, though long enough to look like a header" * 4)
    with pytest.raises(ProfileStoreError, match="not a profile store"):
        SqliteProfiles(tmp_path / "text.sqlite")
    write_profiles(tmp_path / "old.sqlite", [], {})
    with sqlite3.connect(tmp_path / "old.sqlite") as connection:
        connection.execute("UPDATE meta SET value = 'rankbridge-profiles-0' WHERE name = 'format'")
    connection.close()
    with pytest.raises(ProfileStoreError, match="format 'rankbridge-profiles-0'"):
        SqliteProfiles(tmp_path / "old.sqlite")
