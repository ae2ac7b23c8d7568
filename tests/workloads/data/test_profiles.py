"""Profiles: the latest touches of a person, the strongest sign on each, found by pseudonym alone."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from workloads.contract.events import POSITIVE_TYPES, EventType
from workloads.contract.tensors import STRENGTH
from workloads.data.definitions import REMEMBERED_MAX, STRONGEST_FIRST, TOUCHES_MAX, Sign, Touch
from workloads.data.events import SCHEMA, EventLog
from workloads.data.profile_builder import build_profiles
from workloads.data.profiles import (
    FORGOTTEN_MS,
    PASSWORD_VARIABLE,
    MemoryProfiles,
    Profile,
    ProfilesDownError,
    ProfileStore,
    ProfileStoreError,
    SqliteProfiles,
    Watermark,
    filled_from,
    open_profiles,
    tombstone,
    write_profiles,
)
from workloads.data.redis_profiles import RedisProfiles
from workloads.data.simulator import Simulation

AT = 1_767_600_000_000


def a_sign(
    seq: int, pseudonym: str, item: str, kind: EventType = EventType.VIEW, *, at_ms: int = AT, known_ms: int = AT
) -> Sign:
    return Sign(seq, pseudonym, item, kind, at_ms, known_ms)


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
    (all_of_them,) = build_profiles(log, REMEMBERED_MAX)
    assert len(all_of_them.touches) == TOUCHES_MAX + 40
    (ada,) = build_profiles(log)
    assert len(ada.touches) == TOUCHES_MAX
    assert ada.touches[0].item == "sku-40"
    assert ada.touches[-1].item == f"sku-{TOUCHES_MAX + 39}"


def test_the_order_of_strength_is_the_contracts():
    assert set(STRONGEST_FIRST) == POSITIVE_TYPES
    strengths = [STRENGTH[kind] for kind in STRONGEST_FIRST]
    assert strengths == sorted(strengths, reverse=True)


def test_the_file_and_the_fake_answer_alike(tmp_path: Path, simulation: Simulation):
    profiles = list(build_profiles(simulation.log))
    path = tmp_path / "profiles.sqlite"
    assert write_profiles(path, profiles, {"dataset": "simulator-0"}) == len(profiles)
    assert filled_from(path) == "simulator-0"
    fake: ProfileStore = MemoryProfiles(profiles)
    with SqliteProfiles(path) as stored:
        assert len(stored) == len(profiles)
        assert list(stored.everybody()) == profiles
        for profile in profiles[::50]:
            assert stored.get(profile.pseudonym) == fake.get(profile.pseudonym) == profile
        assert stored.get("nobody") is None
    assert fake.get("nobody") is None
    fake.close()


def test_the_file_and_its_log_are_private(tmp_path: Path):
    path = tmp_path / "profiles.sqlite"
    write_profiles(path, [], {})
    with SqliteProfiles(path) as stored:
        stored.apply([a_sign(1, "p1-a", "mug")], Watermark(1, AT))
        modes = {entry.name: entry.stat().st_mode & 0o777 for entry in tmp_path.iterdir()}
    assert modes == {"profiles.sqlite": 0o600, "profiles.sqlite-wal": 0o600, "profiles.sqlite-shm": 0o600}
    assert [entry.name for entry in tmp_path.iterdir()] == ["profiles.sqlite"]


def test_an_open_store_sees_what_it_is_filled_with_anew_and_forgotten_people_stay_so(tmp_path: Path):
    path = tmp_path / "profiles.sqlite"
    touch = Touch("mug", EventType.VIEW, 1, 0, AT)
    write_profiles(path, [Profile("p1-a", [touch]), Profile("p1-gone", [touch])], {"dataset": "one"})
    with SqliteProfiles(path) as gateway:
        with SqliteProfiles(path) as feedback:
            feedback.apply([a_sign(7, "p1-a", "lamp")], Watermark(7, AT))
            feedback.delete(["p1-gone"])
        assert gateway.get("p1-gone") is None
        anew = [Profile("p1-b", [touch]), Profile("p1-gone", [touch])]
        write_profiles(path, anew, {"dataset": "two"}, watermark=Watermark(0, AT))
        assert [profile.pseudonym for profile in gateway.everybody()] == ["p1-b"]
        assert gateway.watermark() == Watermark(0, AT)
    assert filled_from(path) == "two"


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
        assert len(stored) == 1
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_missing_a_foreign_and_an_old_file_are_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(ProfileStoreError, match="no such profile store; prepare a data set"):
        SqliteProfiles(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("not a database, though long enough to look like a header" * 4)
    with pytest.raises(ProfileStoreError, match="not a profile store"):
        SqliteProfiles(tmp_path / "text.sqlite")
    write_profiles(tmp_path / "old.sqlite", [], {})
    with sqlite3.connect(tmp_path / "old.sqlite") as connection:
        connection.execute("UPDATE meta SET value = 'rankbridge-profiles-1' WHERE name = 'format'")
    connection.close()
    with pytest.raises(ProfileStoreError, match="format 'rankbridge-profiles-1'"):
        SqliteProfiles(tmp_path / "old.sqlite")
    assert filled_from(tmp_path / "old.sqlite") is None
    assert write_profiles(tmp_path / "old.sqlite", [], {"dataset": "new"}) == 0
    assert filled_from(tmp_path / "old.sqlite") == "new"


# --- what every store does ------------------------------------------------------------------------


class RedisServer:
    """Debian's redis-server on a port of its own, in a folder of its own."""

    def __init__(self, folder: Path, port: int, password: str | None = None) -> None:
        self.port, self.folder = port, folder
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
        configuration = folder / "redis.conf"
        configuration.write_text(f"requirepass {password}\n" if password else "")
        self._process = subprocess.Popen(
            [command[0], str(configuration), *command[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while True:
            assert self._process.poll() is None, "redis-server ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start_redis(folder: Path, password: str | None = None) -> RedisServer:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    return RedisServer(folder, free_port(), password)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


class Clock:
    """The wall clock, standing still."""

    now = AT

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Clock
) -> Iterator[MemoryProfiles | SqliteProfiles | RedisProfiles]:
    """Each kind of store, empty."""
    made: MemoryProfiles | SqliteProfiles | RedisProfiles
    if request.param == "memory":
        made = MemoryProfiles(clock_ms=clock)
    elif request.param == "sqlite":
        write_profiles(tmp_path / "profiles.sqlite", [], {})
        made = SqliteProfiles(tmp_path / "profiles.sqlite", clock_ms=clock)
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        made = RedisProfiles("127.0.0.1", server.port, clock_ms=clock)
        made._redis.flushdb()
    yield made
    made.close()


async def test_signs_become_touches_and_the_watermark_moves_with_them(store: ProfileStore):
    assert store.watermark() == Watermark()
    signs = [
        a_sign(3, "p1-a", "mug", EventType.CLICK, at_ms=AT - 9),
        a_sign(4, "p1-a", "mug", EventType.PURCHASE, at_ms=AT - 7),
        a_sign(6, "p1-a", "lamp", at_ms=AT - 8),
        a_sign(7, "p1-b", "mug"),
    ]
    assert store.apply(signs, Watermark(9, AT)) == 4
    expected = [Touch("lamp", EventType.VIEW, 1, 0, AT - 8), Touch("mug", EventType.PURCHASE, 2, 1, AT - 7)]
    assert store.get("p1-a") == Profile("p1-a", expected)
    if not isinstance(store, RedisProfiles):  # whose own test closes its connections from inside the loop
        assert await store.look_up("p1-a") == store.get("p1-a")
    assert store.get("p1-c") is None
    assert store.watermark() == Watermark(9, AT)
    mug = store.activity("mug")
    assert mug is not None
    assert (mug.people, mug.first_ms) == (2, AT - 9)
    assert mug.strength_recent(AT + 1) == pytest.approx(STRENGTH[EventType.PURCHASE] + 2 * STRENGTH[EventType.VIEW])
    assert store.activity("sofa") is None


def test_what_comes_again_after_a_crash_changes_nothing(store: ProfileStore):
    signs = [a_sign(seq, "p1-a", f"sku-{seq}") for seq in range(1, 6)]
    store.apply(signs[:3], Watermark(3, AT))
    assert store.apply(signs, Watermark(5, AT)) == 2
    assert store.apply(signs, Watermark(5, AT)) == 0
    assert store.apply(signs[:2], Watermark(2, AT)) == 0
    profile = store.get("p1-a")
    assert profile is not None
    assert [touch.count for touch in profile.touches] == [1] * 5
    assert store.watermark() == Watermark(5, AT)


def test_who_is_forgotten_is_gone_at_once_and_events_under_way_bring_nobody_back(store: ProfileStore, clock: Clock):
    store.apply([a_sign(1, "p1-a", "mug"), a_sign(2, "p1-b", "mug")], Watermark(2, AT))
    clock.now = AT + 1000
    assert store.delete(["p1-a", "p1-a", "p1-nobody"]) == 1
    assert store.delete(["p1-a"]) == 0
    assert store.delete([]) == 0
    assert store.get("p1-a") is None
    assert store.apply([a_sign(3, "p1-a", "mug", known_ms=AT + 999)], Watermark(3, AT + 999)) == 0
    assert store.get("p1-a") is None
    assert store.apply([a_sign(4, "p1-a", "mug", known_ms=AT + 1001)], Watermark(4, AT + 1001)) == 1
    again = store.get("p1-a")
    assert again is not None
    assert again.touches[0].count == 1  # the life before is not in it
    other = store.get("p1-b")
    assert other is not None


def test_people_get_second_names_and_what_is_there_under_one_stays(store: ProfileStore):
    many = [a_sign(n, "p1-a", f"sku-{n}", at_ms=AT + n) for n in range(1, TOUCHES_MAX + 11)]
    end = len(many)
    store.apply([*many, a_sign(end + 1, "p1-b", "mug"), a_sign(end + 2, "p2-b", "lamp")], Watermark(end + 2, AT))
    names = {"p1-a": "p2-a", "p1-b": "p2-b", "p1-nobody": "p2-nobody"}
    assert store.copy(names) == 1
    assert store.copy(names) == 0
    first, second, other = (store.get(name) for name in ("p1-a", "p2-a", "p2-b"))
    assert first is not None
    assert second is not None
    assert other is not None
    assert second.touches == first.touches
    assert [touch.item for touch in other.touches] == ["lamp"]
    assert store.get("p2-nobody") is None
    store.apply([a_sign(900, "p2-a", "sku-1", at_ms=AT + 900)], Watermark(900, AT))  # beyond the latest, too
    again = store.get("p2-a")
    assert again is not None
    assert again.touches[-1].count == 2


def test_an_item_that_fell_out_of_the_latest_comes_back_with_its_count(store: ProfileStore):
    many = [a_sign(n, "p1-a", f"sku-{n}", at_ms=AT + n) for n in range(1, TOUCHES_MAX + 11)]
    store.apply(many, Watermark(len(many), AT))
    latest = store.get("p1-a")
    assert latest is not None
    assert [latest.touches[0].item, len(latest.touches)] == ["sku-11", TOUCHES_MAX]
    store.apply([a_sign(900, "p1-a", "sku-1", at_ms=AT + 900)], Watermark(900, AT))
    latest = store.get("p1-a")
    assert latest is not None
    assert latest.touches[-1] == Touch("sku-1", EventType.VIEW, 2, 0, AT + 900)


def test_a_batch_is_applied_whole_or_not_at_all(store: ProfileStore):
    if isinstance(store, MemoryProfiles):
        pytest.skip("the fake knows no crash")
    store.apply([a_sign(1, "p1-a", "mug")], Watermark(1, AT))
    poisoned = [a_sign(2, "p1-a", "lamp"), a_sign(3, "p1-a", "sofa", "no type")]  # type: ignore[arg-type]  # on purpose
    with pytest.raises(KeyError):
        store.apply(poisoned, Watermark(3, AT))
    profile = store.get("p1-a")
    assert profile is not None
    assert [touch.item for touch in profile.touches] == ["mug"]
    assert store.watermark() == Watermark(1, AT)
    assert store.apply([a_sign(2, "p1-a", "lamp")], Watermark(2, AT)) == 1


# --- SQLite ---------------------------------------------------------------------------------------


def test_gateways_read_while_feedback_writes_and_never_see_half_a_batch(tmp_path: Path):
    path = tmp_path / "profiles.sqlite"
    write_profiles(path, [], {})
    uneven: list[tuple[int, int]] = []
    stop = threading.Event()

    def read() -> None:
        with SqliteProfiles(path) as gateway:
            while not stop.is_set():
                rows = gateway._reader.execute("SELECT touches FROM profiles").fetchall()
                if len(rows) % 2:
                    uneven.append((len(rows), gateway.watermark().seq))

    reader = threading.Thread(target=read)
    reader.start()
    with SqliteProfiles(path) as feedback:
        for n in range(1, 40):
            feedback.apply([a_sign(n, f"p1-{n}", "mug"), a_sign(n, f"p1-{n}-too", "mug")], Watermark(n, AT))
    stop.set()
    reader.join(20)
    assert uneven == []


def test_a_forgotten_profile_is_in_no_byte_of_the_files(tmp_path: Path):
    path = tmp_path / "profiles.sqlite"
    write_profiles(path, [], {})
    with SqliteProfiles(path) as store:
        store.apply([a_sign(1, "p1-a", "a-telltale-item")], Watermark(1, AT))
        assert b"a-telltale-item" in b"".join(file.read_bytes() for file in tmp_path.iterdir())
        store.delete(["p1-a"])
        with store._transaction() as connection:  # the item's own count names nobody, and is not the question here
            connection.execute("DELETE FROM items")
        store.delete([])
        assert b"a-telltale-item" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_a_deletion_that_a_reader_keeps_in_the_log_is_said_and_can_be_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("workloads.data.profiles._BUSY_S", 0.05)
    path = tmp_path / "profiles.sqlite"
    write_profiles(path, [], {})
    with SqliteProfiles(path) as store, contextlib.closing(sqlite3.connect(path)) as reader:
        store.apply([a_sign(1, "p1-a", "a-telltale-item")], Watermark(1, AT))
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM profiles").fetchall()
        with pytest.raises(ProfilesDownError, match="log"):
            store.delete(["p1-a"])
        assert store.get("p1-a") is None
        assert store.apply([a_sign(2, "p1-b", "sku-2")], Watermark(2, AT + 1)) == 1
        reader.rollback()
        assert store.delete(["p1-a"]) == 0
        assert not (tmp_path / "profiles.sqlite-wal").read_bytes()


def test_a_store_that_loses_its_file_says_so_and_nothing_else_is_raised(tmp_path: Path):
    path = tmp_path / "profiles.sqlite"
    write_profiles(path, [Profile("p1-a", [])], {})
    with SqliteProfiles(path) as store:
        with store._transaction() as connection:
            connection.execute("UPDATE profiles SET touches = x'ff'")
        with pytest.raises(ProfilesDownError, match="cannot be read"):
            store.get("p1-a")
        with store._transaction() as connection:
            connection.execute("DROP TABLE profiles")
        with pytest.raises(ProfilesDownError, match="no such table"):
            store.get("p1-a")


def test_the_memory_of_who_was_forgotten_ends(tmp_path: Path, clock: Clock):
    write_profiles(tmp_path / "profiles.sqlite", [], {})
    with SqliteProfiles(tmp_path / "profiles.sqlite", clock_ms=clock) as store:
        store.delete(["p1-a"])
        clock.now += FORGOTTEN_MS + 1
        store.delete(["p1-b"])
        assert store._one("SELECT count(*), max(mark) FROM forgotten") == (1, tombstone("p1-b"))


# --- Redis ----------------------------------------------------------------------------------------


async def test_gateways_read_redis_from_their_loop_and_a_silent_one_costs_them_little(redis_server: RedisServer):
    store = RedisProfiles("127.0.0.1", redis_server.port)
    store._redis.flushdb()
    store.apply([a_sign(1, "p1-a", "mug")], Watermark(1, AT))
    assert await store.look_up("p1-a") == store.get("p1-a") != None  # noqa: E711 - one chain: equal, and there
    assert await store.look_up("p1-b") is None
    await store.aclose()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes connections; nobody reads them
        hung = RedisProfiles("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(ProfilesDownError):
            await hung.look_up("p1-a")
        await hung.aclose()


def test_a_deletion_while_a_batch_is_put_together_is_not_lost(redis_server: RedisServer, clock: Clock):
    store = RedisProfiles("127.0.0.1", redis_server.port, clock_ms=clock)
    store._redis.flushdb()
    store.apply([a_sign(1, "p1-a", "mug", known_ms=AT - 5)], Watermark(1, AT))
    whole = RedisProfiles._apply
    raced: list[int] = []

    def with_a_race(pipe: object, signs: list[Sign], watermark: Watermark) -> int:
        if not raced:
            raced.append(1)
            reading = pipe.mget  # type: ignore[attr-defined]  # a pipeline of redis

            def then_deleted(names: object) -> object:
                found = reading(names)
                store.delete(["p1-a"])
                return found

            pipe.mget = then_deleted  # type: ignore[attr-defined]  # a pipeline of redis
        return whole(pipe, signs, watermark)

    store._apply = with_a_race  # type: ignore[method-assign]  # the race, made sure
    assert store.apply([a_sign(2, "p1-a", "lamp", known_ms=AT - 4)], Watermark(2, AT)) == 0
    assert raced == [1]
    assert store.get("p1-a") is None
    store.close()


def test_a_redis_that_is_gone_is_one_kind_of_fault_and_is_used_again_when_it_is_back(tmp_path: Path):
    server = start_redis(tmp_path)
    store = RedisProfiles("127.0.0.1", server.port)
    assert store.apply([a_sign(1, "p1-a", "mug")], Watermark(1, AT)) == 1
    server.stop()
    for call in (store.watermark, lambda: store.get("p1-a"), lambda: store.delete(["p1-a"])):
        with pytest.raises(ProfilesDownError, match="redis at 127"):
            call()
    with pytest.raises(ProfilesDownError):
        store.apply([a_sign(2, "p1-a", "mug")], Watermark(2, AT))
    again = RedisServer(tmp_path, server.port)
    assert store.watermark() == Watermark()  # it kept nothing: feedback starts over from the spool
    store.close()
    again.stop()


def test_credentials_come_from_the_environment_and_never_from_the_command_line(tmp_path: Path):
    with pytest.raises(ProfileStoreError, match="command line") as refused:
        open_profiles("redis://:hunter2@127.0.0.1:6379/0", {})
    assert "hunter2" not in str(refused.value)
    for wrong in ("redis://", "redis://host:port/0", "redis://host:6379/zero", "redis://host:6379/0?ssl=no"):
        with pytest.raises(ProfileStoreError, match="no address of a Redis"):
            open_profiles(wrong, {})
    server = start_redis(tmp_path, "hunter2")
    address = f"redis://127.0.0.1:{server.port}/0"
    with pytest.raises(ProfilesDownError, match=r"(?i)auth"):
        open_profiles(address, {}).watermark()
    store = open_profiles(address, {PASSWORD_VARIABLE: "hunter2"})
    assert store.watermark() == Watermark()
    store.close()
    server.stop()


def test_filling_redis_brings_nobody_back_who_was_forgotten_there(redis_server: RedisServer):
    store = RedisProfiles("127.0.0.1", redis_server.port)
    store._redis.flushdb()
    store.delete(["p1-a"])
    both = [Profile(who, [Touch("sku-1", EventType.VIEW, 1, 0, AT)]) for who in ("p1-a", "p1-b")]
    assert store.fill(both, {}) == 1
    assert store.get("p1-a") is None
    assert store.get("p1-b") == both[1]
    store.close()


def test_redis_is_filled_from_a_file(tmp_path: Path, redis_server: RedisServer):
    touches = [Touch(f"sku-{n}", EventType.VIEW, 1, 0, AT + n) for n in range(TOUCHES_MAX + 5)]
    write_profiles(tmp_path / "profiles.sqlite", [Profile("p1-a", touches)], {}, watermark=Watermark(0, AT))
    store = RedisProfiles("127.0.0.1", redis_server.port)
    store._redis.flushdb()
    with SqliteProfiles(tmp_path / "profiles.sqlite") as file:
        assert store.fill(file.everybody(), file.meta, items=file.items(), watermark=file.watermark()) == 1
        assert store.get("p1-a") == file.get("p1-a")
    store.apply([a_sign(1, "p1-a", "sku-0", at_ms=AT + 900)], Watermark(1, AT))
    profile = store.get("p1-a")
    assert profile is not None
    assert profile.touches[-1].count == 2
    store.close()
