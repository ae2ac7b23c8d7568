"""In a whole home a forgotten person is in no byte of it or its bucket, and nobody else has lost anything."""

from __future__ import annotations

import io
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from workloads.contract.events import Event, EventType
from workloads.contract.http import PATH_INTAKE, PATH_TRIM, TrimRequest
from workloads.data import preparation, removal, replica
from workloads.data.dataset import Dataset
from workloads.data.preparation import Prepared, Request, prepare
from workloads.data.profiles import SqliteProfiles
from workloads.data.simulator import SimulatorConfig
from workloads.erasure import rotation as rotation_module
from workloads.erasure.job import ACTION, run_pass
from workloads.erasure.places import Place, Replicas, places_of
from workloads.erasure.rotation import Rotation, RotationError
from workloads.lake.lake import Lake
from workloads.lake.spool import SqliteSpool
from workloads.objects.memory import MemoryObjects
from workloads.privacy.audit import AuditLog, entries, verify
from workloads.privacy.pseudonym import key_path
from workloads.privacy.vault import SqliteVault
from workloads.replication.push import push
from workloads.telemetry.progress import Progress

PERSON, OTHER = "user-000007", "user-000011"
SHOP = SimulatorConfig(users=60, items=80, events=2500, days=28, seed=3)

pytestmark = pytest.mark.real_parts


class Home:
    """A home directory, its intake's process, and its bucket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.intake: str | None = None
        self.bucket = MemoryObjects()
        self.vault = SqliteVault(path / "onprem" / "vault.sqlite")
        self.audit = AuditLog(path / "onprem" / "audit.jsonl")
        self.progress = Progress(io.StringIO())

    def send(self, *events: Event) -> None:
        self._post(PATH_INTAKE, {"events": events})

    def trim(self) -> None:
        self._post(PATH_TRIM, TrimRequest(up_to_seq=10**6, received_before_ms=now_ms() + 1000))

    def _post(self, path: str, message: object) -> None:
        request = urllib.request.Request(  # noqa: S310 - a loopback address
            f"{self.intake}{path}",
            msgspec.msgpack.encode(message),
            {"content-type": "application/msgpack"},
            method="POST",
        )
        with urllib.request.urlopen(request) as answer:  # noqa: S310 - as above
            assert answer.status == 200

    def event(self, user: str | None, item: str, **fields: object) -> Event:
        """A click under the pseudonym that the edge would give."""
        at = time.time_ns() // 1_000_000
        return Event(
            event_id=f"{at:012x}"[:8] + "-" + f"{at:012x}"[8:] + "-7" + str(uuid.uuid4())[15:],
            type=EventType.CLICK,
            timestamp_ms=at,
            item=item,
            user=None if user is None else self.vault.admit([user])[user],
            **fields,
        )

    def ingest(self) -> None:
        with Lake.open(self.path / "onprem" / "lake") as lake:
            lake.ingest(SqliteSpool(self.path / "onprem" / "events.sqlite"), progress=self.progress)

    def replicate(self) -> str:
        """Push the newest data set, and fetch it "in aws"; the replica's name."""
        (dataset,) = [path for path in (self.path / "onprem" / "datasets").iterdir() if path.name[0] != "."]
        push(dataset, self.path, self.bucket, "data", self.progress, audit=self.audit)
        into = self.path / "aws" / "training" / "replica"
        into.mkdir(parents=True, exist_ok=True)
        replica.fetch(self.bucket, dataset.name, into, self.progress)
        return dataset.name

    def found(self, *needles: str) -> list[str]:
        """Where these texts are: every file of the home, raw and decoded, and every version of every object."""
        places = [
            f"{path.relative_to(self.path)}: {how}"
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
            for how in holds(path.read_bytes(), path, needles)
        ]
        for key, versions in self.bucket._versions.items():
            for version in versions:
                places += [f"s3: {key}: {how}" for how in holds(version.data, Path(key), needles)]
        return places


def holds(data: bytes, path: Path, needles: tuple[str, ...]) -> list[str]:
    """How some bytes hold one of the needles."""
    found = [f"bytes hold {needle}" for needle in needles if needle.encode() in data]
    if data[:4] == b"PAR1":
        table = pq.read_table(io.BytesIO(data))
        for name in table.column_names:
            column = pc.cast(table[name], pa.string()) if pa.types.is_dictionary(table[name].type) else table[name]
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                found += [
                    f"column {name} holds {needle}"
                    for needle in needles
                    if pc.any(pc.match_substring(column, needle)).as_py()
                ]
    if data[:15] == b"SQLite format 3" and path.exists():
        dump = "\n".join(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True).iterdump())
        found += [f"rows hold {needle}" for needle in needles if needle in dump]
    if path.suffix == ".npz":
        with np.load(io.BytesIO(data)) as stored:
            texts = {str(text) for name in stored.files if stored[name].dtype.kind == "U" for text in stored[name]}
        found += [f"arrays hold {needle}" for needle in needles if needle in texts]
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A prepared home, to be copied."""
    return prepare(Request("simulator", simulation=SHOP), tmp_path_factory.mktemp("home"), Progress(io.StringIO()))


@pytest.fixture
def bare(prepared: Prepared, tmp_path: Path) -> Iterator[Home]:
    """A home without an intake: data sets, profiles, vault, lake."""
    shutil.copytree(prepared.vault.parents[1], tmp_path / "home")
    made = Home(tmp_path / "home")
    with Lake.open(made.path / "onprem" / "lake") as lake:
        lake.load(made.path / "onprem" / "datasets" / prepared.dataset.name, progress=made.progress)
    yield made
    made.vault.close()


@pytest.fixture
def home(bare: Home, tmp_path: Path) -> Iterator[Home]:
    """The same with a running intake."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "workloads.intake", "--listen", f"127.0.0.1:{port}"]
    command += ["--store", str(bare.path / "onprem" / "events.sqlite")]
    with (tmp_path / "intake.log").open("wb") as log:
        intake = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        bare.intake = f"http://127.0.0.1:{port}"
        eventually(lambda: _ready(f"http://127.0.0.1:{port}"))
        yield bare
    finally:
        intake.terminate()
        intake.wait(20)


def eventually(question: Callable[[], bool], patience_s: float = 30) -> None:
    until = time.monotonic() + patience_s
    while not question():
        assert time.monotonic() < until
        time.sleep(0.02)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/readyz") as answer:  # noqa: S310 - a loopback address
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


class Killed(BaseException):
    """The process is gone."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def passes(home: Home) -> Sequence[Place]:
    profiles = SqliteProfiles(home.path / "onprem" / "profiles.sqlite")
    try:
        places = places_of(
            home.path,
            intake=home.intake,
            profiles=profiles,
            bucket=home.bucket,
            knows=lambda user: home.vault.pseudonym(user) is not None,
        )
        run_pass(home.vault, places, home.audit, home.progress, clock=now_ms, settle_ms=0)
    finally:
        profiles.close()
    return places


def counts(home: Home, names: Collection[str]) -> dict[str, int]:
    """How much each place has of these names."""
    (dataset,) = [path for path in (home.path / "onprem" / "datasets").iterdir() if path.name[0] != "."]
    events = Dataset.load(dataset).events
    quoted = ", ".join(f"'{name}'" for name in names)
    with Lake.open(home.path / "onprem" / "lake") as lake:
        in_lake = lake.query(f'SELECT count(*) FROM events WHERE "user" IN ({quoted})').fetchall()[0][0]  # noqa: S608 - ours
    if home.intake is None:
        return {"data set": events.filter(events["user"].is_in(list(names))).height, "lake": int(in_lake)}
    with sqlite3.connect(home.path / "onprem" / "events.sqlite") as spool:
        in_spool = spool.execute(f"SELECT count(*) FROM events WHERE user IN ({quoted})").fetchone()[0]  # noqa: S608 - ours
    return {
        "data set": events.filter(events["user"].is_in(list(names))).height,
        "lake": int(in_lake),
        "spool": int(in_spool),
    }


def test_a_forgotten_person_is_in_no_byte_of_home_or_bucket_and_nobody_else_has_lost_anything(home: Home):
    before, other = home.vault.pseudonym(PERSON), home.vault.pseudonym(OTHER)
    assert before is not None
    assert other is not None
    home.send(*(home.event(user, "item-00001", session=None) for user in (PERSON, OTHER, OTHER)))
    home.ingest()
    home.send(home.event(PERSON, "item-00002", context={"page": before}), home.event(OTHER, "item-00002"))
    home.replicate()
    others = counts(home, [other])
    assert min(others.values()) > 0
    assert min(counts(home, [before]).values()) > 0
    where = home.found(PERSON, before)
    for place in ("vault", "users-sample", "lake/", "datasets/", "truth", "events.sqlite", "profiles", "s3:", "aws/"):
        assert any(place in text for text in where), place

    erasure = home.vault.forget(PERSON)
    assert erasure is not None
    assert erasure.pseudonyms == [before]
    passes(home)

    assert home.found(PERSON, before) == []
    assert home.vault.queue() == []
    assert counts(home, [other]) == others
    found = home.found(other)
    assert any("profiles" in text for text in found)
    assert verify(home.audit.path).faults == ()
    assert [entry.subject for entry in entries(home.audit.path) if entry.action == ACTION] == [erasure.ticket]

    home.send(home.event(PERSON, "item-00003"))  # and is somebody new when they come back
    after = home.vault.pseudonym(PERSON)
    assert after not in {None, before}
    assert home.found(before) == []


def test_what_was_prepared_before_is_found_again_without_the_person_and_can_be_replicated(bare: Home):
    name = bare.vault.pseudonym(PERSON)
    assert name is not None
    old = bare.replicate()
    bare.vault.forget(PERSON)
    passes(bare)
    again = prepare(Request("simulator", simulation=SHOP), bare.path, bare.progress)
    assert again.reused
    assert bare.vault.pseudonym(PERSON) is None
    new = bare.replicate()
    assert new != old
    assert bare.found(name) == []


def test_a_push_that_was_cut_leaves_nothing_of_the_person_in_the_bucket(bare: Home):
    name = bare.vault.pseudonym(PERSON)
    assert name is not None
    bare.replicate()
    manifest = next(each.key for each in bare.bucket.list("replica/manifests/"))
    bare.bucket.delete(manifest)  # parts that no manifest names, as a cut push leaves them
    assert any("s3:" in text for text in bare.found(name))
    bare.vault.forget(PERSON)
    passes(bare)
    assert bare.found(name) == []


def test_a_removal_that_is_killed_between_the_new_data_set_and_the_old_is_completed(
    bare: Home, monkeypatch: pytest.MonkeyPatch
):
    name = bare.vault.pseudonym(PERSON)
    assert name is not None
    bare.vault.forget(PERSON)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "refill_mark", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            passes(bare)
    assert len(list((bare.path / "onprem" / "datasets").glob("simulator-*"))) == 2
    passes(bare)
    assert len(list((bare.path / "onprem" / "datasets").glob("simulator-*"))) == 1
    assert bare.found(name, PERSON) == []


# a new key


def rotation_of(home: Home, profiles: SqliteProfiles) -> Rotation:
    return Rotation(
        home.path,
        home.vault,
        profiles,
        home.audit,
        progress=home.progress,
        replicas=[Replicas(home.path, home.bucket)],
        settle_ms=0,
    )


def test_a_rotation_keeps_everybodys_history_and_ends_with_the_old_key_and_every_old_name_gone(home: Home):
    first = home.vault.admit([PERSON])[PERSON]
    home.send(home.event(PERSON, "item-00001", session="s1-" + "0a" * 16, context={"page": first}))
    home.replicate()
    before = counts(home, [first])
    secret = key_path(home.vault.keys, 1).read_bytes()
    with SqliteProfiles(home.path / "onprem" / "profiles.sqlite") as profiles:
        known = profiles.get(first)
        assert known is not None
        rotation = rotation_of(home, profiles)
        rotation.begin()
        second = home.vault.pseudonym(PERSON)
        assert second is not None
        assert second.startswith("p2-")
        between = profiles.get(second)  # at once, under the name that gateways now ask for
        assert between is not None
        assert between.touches == known.touches

        with pytest.raises(RotationError, match="the spool has 1 events under old names"):
            rotation.finish()
        home.ingest()
        home.trim()
        rotation.finish()
        after = profiles.get(second)
        assert after is not None
        assert after.touches == known.touches
        assert profiles.get(first) is None
        with pytest.raises(RotationError, match="no rotation is under way"):
            rotation.finish()

    names = counts(home, [second])
    assert names["data set"] == before["data set"] > 0
    assert names["lake"] == before["lake"] + 1
    # What was trimmed lies in the spool's log until the intake's next quiet moment, or the next erasure.
    assert [text for text in home.found(first, "p1-", "s1-") if "events.sqlite-wal" not in text] == []
    assert not any(secret in path.read_bytes() for path in home.path.rglob("*") if path.is_file())
    assert [entry.action for entry in entries(home.audit.path) if entry.action.startswith("key.")] == [
        "key.rotated",
        "key.destroyed",
    ]
    home.replicate()
    assert prepare(Request("simulator", simulation=SHOP), home.path, home.progress).reused
    erasure = home.vault.forget(PERSON)  # and who is forgotten after it is found everywhere
    assert erasure is not None
    assert erasure.pseudonyms == [second]
    passes(home)
    assert home.found(PERSON, first, second) == []


def test_a_finish_that_is_killed_anywhere_is_completed_by_the_next(bare: Home, monkeypatch: pytest.MonkeyPatch):
    first = bare.vault.admit([PERSON])[PERSON]
    before = counts(bare, [first])
    bare.replicate()
    with SqliteProfiles(bare.path / "onprem" / "profiles.sqlite") as profiles:
        rotation = rotation_of(bare, profiles)
        rotation.begin()
        steps = (
            (rotation_module, "rename_people"),
            (removal, "follow"),
            (profiles, "delete"),
            (replica, "remove"),
            (bare.vault, "retire"),
        )
        for where, step in steps if os.environ.get("RANKBRIDGE_LONG") else steps[1::3]:
            with monkeypatch.context() as patch:
                patch.setattr(where, step, lambda *_, **__: (_ for _ in ()).throw(Killed()))
                with pytest.raises(Killed):
                    rotation.finish()
        rotation.finish()
    second = bare.vault.pseudonym(PERSON)
    assert second is not None
    after = counts(bare, [second])
    assert (after["lake"], after["data set"]) == (before["lake"], before["data set"])
    assert "\n".join(bare.found("p1-", "s1-")) == ""
