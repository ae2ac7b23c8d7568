"""A data set prepared from the lake: the same pseudonyms, the loaded catalogue, and what the intake took since."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from workloads.data import lake_source
from workloads.data.__main__ import main
from workloads.data.dataset import Dataset
from workloads.data.definitions import sign_of
from workloads.data.profiles import MemoryProfiles, SqliteProfiles, Watermark
from workloads.data.reading import SourceError
from workloads.lake.lake import Lake
from workloads.lake.spool import MemorySpool


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    words = ["--source", "simulator", "--users", "40", "--items", "60", "--events", "3000", "--days", "20"]
    assert main([*words, "--home", str(tmp_path)]) == 0
    made = Path(result(capsys)["made"]["dataset"])
    with Lake.open(tmp_path / "onprem" / "lake") as lake:
        lake.load(made)
    return tmp_path


def loaded(home: Path) -> Dataset:
    (folder,) = (home / "onprem" / "datasets").glob("simulator-*")
    return Dataset.load(folder)


def taken_in(home: Path, original: Dataset, user: str) -> None:
    """Two events that the intake took after the data set's end: on a known item, and on one of no catalogue."""
    spool = MemorySpool()
    end = original.meta.end_ms
    for number, item in enumerate([original.items["item"][0], "unheard-of"]):
        moment = end + 60_000 + number
        identity = f"{moment:012x}7000800000000000000{number}"
        spool.add(
            event_id=f"{identity[:8]}-{identity[8:12]}-{identity[12:16]}-{identity[16:20]}-{identity[20:32]}",
            type="view",
            timestamp_ms=moment,
            user=user,
            item=item,
            schema_version=1,
        )
    with Lake.open(home / "onprem" / "lake") as lake:
        assert lake.ingest(spool).events == 2


def test_what_was_loaded_comes_back_with_the_same_pseudonyms(home: Path, capsys: pytest.CaptureFixture[str]):
    original = loaded(home)
    sample = (home / "onprem" / "users-sample.json").read_bytes()
    assert main(["--source", "lake", "--home", str(home)]) == 0
    again = Dataset.load(Path(result(capsys)["made"]["dataset"]))
    assert again.path.name.startswith("lake-")
    order = ["timestamp_ms", "event_id"]
    assert again.events.sort(order).equals(original.events.sort(order))
    assert again.items.sort("item").equals(original.items.sort("item"))
    assert (again.meta.protocol, again.meta.boundaries) == (original.meta.protocol, original.meta.boundaries)
    assert (home / "onprem" / "users-sample.json").read_bytes() == sample


def test_events_that_came_since_are_in_it_and_unknown_items_are_not(home: Path, capsys: pytest.CaptureFixture[str]):
    original = loaded(home)
    user = original.events["user"].drop_nulls()[0]
    taken_in(home, original, user)
    assert main(["--source", f"lake={original.path.name}", "--home", str(home)]) == 0
    again = Dataset.load(Path(result(capsys)["made"]["dataset"]))
    assert again.events.height == original.events.height + 1
    newest = again.events.sort("timestamp_ms").row(-1, named=True)
    assert (newest["user"], newest["item"]) == (user, original.items["item"][0])
    assert again.meta.boundaries.end_ms > original.meta.end_ms
    with SqliteProfiles(home / "onprem" / "profiles.sqlite") as profiles:
        assert profiles.watermark() == Watermark(2, newest["timestamp_ms"])  # feedback applies neither a second time
        known = profiles.get(user)
    assert known is not None
    assert known.touches[-1].item == original.items["item"][0]


def test_a_late_event_is_in_no_history_from_before_it_was_received(home: Path, capsys: pytest.CaptureFixture[str]):
    original = loaded(home)
    user, item = original.events["user"].drop_nulls()[0], original.items["item"][0]
    end = original.meta.end_ms
    clocks = {  # event's own clock -> home's: hours late, and one of a clock that is ahead
        "0": (end - 5 * 3_600_000, end + 60_000),
        "1": (end + 120_000, end + 61_000),
    }
    spool = MemorySpool()
    for number, (happened, received) in clocks.items():
        identity = f"{happened:012x}7000800000000000000{number}"
        name = f"{identity[:8]}-{identity[8:12]}-{identity[12:16]}-{identity[16:20]}-{identity[20:32]}"
        event = {"event_id": name, "type": "view", "user": user, "item": item, "schema_version": 1}
        spool.add(**event, timestamp_ms=happened, received_ms=received)
    with Lake.open(home / "onprem" / "lake") as lake:
        lake.ingest(spool)
    assert main(["--source", "lake", "--home", str(home)]) == 0
    again = Dataset.load(Path(result(capsys)["made"]["dataset"]))
    assert again.events["timestamp_ms"][-2:].to_list() == [end + 60_000, end + 120_000]
    assert [rule.rows for rule in again.meta.rules if "counts from then" in rule.rule] == [1]
    # Profiles have both clocks, as the feedback process has them.
    online = MemoryProfiles()
    signs = [
        sign_of(seq=n, kind="view", timestamp_ms=at, user=user, item=item, price=None, received_ms=known)
        for n, (at, known) in enumerate(clocks.values(), 1)
    ]
    online.apply([sign for sign in signs if sign is not None], Watermark(2, end + 61_000))
    with SqliteProfiles(home / "onprem" / "profiles.sqlite") as profiles:
        touched, followed = profiles.get(user), online.get(user)
        assert touched is not None
        assert followed is not None
        assert touched.touches[-1].last_ms == followed.touches[-1].last_ms == end + 61_000
        assert profiles.watermark() == Watermark(2, end + 61_000)


def test_an_unchanged_lake_is_not_prepared_twice(home: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--source", "lake", "--home", str(home)]) == 0
    assert result(capsys)["figures"]["reused"] == 0
    assert main(["--source", "lake", "--home", str(home)]) == 0
    assert result(capsys)["figures"]["reused"] == 1
    taken_in(home, loaded(home), loaded(home).events["user"].drop_nulls()[0])
    assert main(["--source", "lake", "--home", str(home)]) == 0
    assert result(capsys)["figures"]["reused"] == 0


def test_the_intake_alone_brings_a_catalogue_of_what_was_touched(home: Path):
    original = loaded(home)
    taken_in(home, original, original.events["user"].drop_nulls()[0])
    made = lake_source.load_lake(home / "onprem" / "lake", "intake", print)
    assert made.items["item"].sort().to_list() == sorted([original.items["item"][0], "unheard-of"])
    assert made.pseudonymous


def test_a_lake_with_several_data_sets_wants_one_named(home: Path, capsys: pytest.CaptureFixture[str]):
    with Lake.open(home / "onprem" / "lake") as lake:
        lake.load(loaded(home).path, origin="second")
    assert main(["--source", "lake", "--home", str(home)]) == 2
    assert "several data sets" in result(capsys)["fault"]
    assert main(["--source", "lake=third", "--home", str(home)]) == 2
    assert "was not loaded" in result(capsys)["fault"]


def test_no_lake_and_a_raw_user_are_faults_that_repeat_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--source", "lake", "--home", str(tmp_path)]) == 2
    assert "no lake" in result(capsys)["fault"]
    folder = tmp_path / "raw"
    folder.mkdir()
    event = {"event_id": "0195f0b4-0000-7000-8000-000000000001", "type": "view", "timestamp_ms": 1_772_323_200_000}
    pl.DataFrame([{**event, "user": "alice", "item": "a"}]).write_parquet(folder / "events.parquet")
    pl.DataFrame({"item": ["a"]}).write_parquet(folder / "items.parquet")
    (folder / "dataset.json").write_text("{}")
    with Lake.open(tmp_path / "onprem" / "lake") as lake:
        lake.load(folder)
    with pytest.raises(SourceError, match="1 events of the lake name their user") as refused:
        lake_source.load_lake(tmp_path / "onprem" / "lake", "", print)
    assert "alice" not in str(refused.value)
