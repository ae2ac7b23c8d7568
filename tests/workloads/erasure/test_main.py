"""The job as a process: what it says, how it ends, and that a kill loses nobody."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import polars as pl
import pytest

from workloads.data import custody, preparation
from workloads.data.__main__ import main as prepare
from workloads.data.preparation import Request
from workloads.data.profiles import Profile, SqliteProfiles, write_profiles
from workloads.data.source import SourceData
from workloads.erasure.__main__ import main
from workloads.erasure.places import DataSets
from workloads.lake.lake import Lake
from workloads.privacy.audit import entries
from workloads.privacy.pseudonym import key_path
from workloads.privacy.vault import SqliteVault
from workloads.telemetry.progress import FaultLine, Line, Progress, ResultLine, parse


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[SqliteVault]:
    made = SqliteVault(tmp_path / "onprem" / "vault.sqlite", create=True)
    made.admit(["ada", "bob"])
    yield made
    made.close()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[Line]]:
    code = main(arguments, {})
    lines = [parse(line) for line in capsys.readouterr().out.splitlines()]
    assert None not in lines
    return code, [line for line in lines if line is not None]


def test_a_queue_is_emptied_and_said_in_the_audit_log(
    tmp_path: Path, vault: SqliteVault, capsys: pytest.CaptureFixture[str]
):
    erasure = vault.forget("ada")
    assert erasure is not None
    code, lines = run(capsys, "run", "--home", str(tmp_path), "--no-replicas", "--settle", "0")
    assert code == 0
    assert isinstance(lines[-1], ResultLine)
    assert lines[-1].figures == {"erased": 1.0}
    assert vault.queue() == []
    (entry,) = entries(tmp_path / "onprem" / "audit.jsonl")
    assert (entry.action, entry.subject) == ("person.erased", erasure.ticket)


def test_an_empty_queue_is_no_fault(tmp_path: Path, vault: SqliteVault, capsys: pytest.CaptureFixture[str]):
    assert list(vault.all_users()) == ["ada", "bob"]
    assert run(capsys, "run", "--home", str(tmp_path), "--no-replicas")[0] == 0


def test_somebody_must_say_whether_there_are_replicas(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--home", str(tmp_path)], {})
    assert ended.value.code == 2
    assert "--data-bucket --no-replicas" in capsys.readouterr().err


def test_a_home_without_a_vault_is_a_fault_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = run(capsys, "run", "--home", str(tmp_path), "--no-replicas")
    assert code == 2
    assert isinstance(lines[-1], FaultLine)
    assert "no such vault" in lines[-1].fault
    assert lines[-1].remedy


def test_a_spool_whose_intake_is_down_is_a_fault_and_the_person_stays_in_the_queue(
    tmp_path: Path, vault: SqliteVault, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "onprem" / "events.sqlite").touch()
    vault.forget("ada")
    where = ["--home", str(tmp_path), "--no-replicas", "--settle", "0"]
    for arguments, said in (([], "only a running intake"), (["--intake", "http://127.0.0.1:1"], "does not answer")):
        code, lines = run(capsys, "run", *where, *arguments)
        assert code == 2
        assert isinstance(lines[-1], FaultLine)
        assert said in lines[-1].fault
    assert len(vault.queue()) == 1


def test_a_key_is_changed_by_two_commands(tmp_path: Path, vault: SqliteVault, capsys: pytest.CaptureFixture[str]):
    first = vault.pseudonym("ada")
    assert run(capsys, "rotate", "--home", str(tmp_path))[0] == 0
    assert (vault.pseudonym("ada") or "")[:3] == "p2-"
    code, lines = run(capsys, "rotate", "--home", str(tmp_path))
    assert code == 2
    assert isinstance(lines[-1], FaultLine)
    assert "key 1 is still retiring" in lines[-1].fault
    os.utime(
        key_path(vault.keys, 2), (1, 1)
    )  # made long ago by a rotation that was killed: it is the switch that counts
    code, lines = run(capsys, "finish", "--home", str(tmp_path), "--no-replicas")
    assert code == 2
    assert isinstance(lines[-1], FaultLine)
    assert "may still be on their way" in lines[-1].fault
    code, lines = run(capsys, "status", "--home", str(tmp_path))
    assert code == 0
    assert isinstance(lines[-1], ResultLine)
    assert lines[-1].figures == {"people": 2.0, "current": 2.0, "retiring": 1.0}
    assert first is not None


def test_who_is_erased_from_a_store_that_gateways_share_is_erased_from_the_homes_own_file_too(
    tmp_path: Path, vault: SqliteVault, capsys: pytest.CaptureFixture[str]
):
    names = vault.admit(["ada", "bob"])
    stores = [tmp_path / "onprem" / "profiles.sqlite", tmp_path / "shared.sqlite"]
    for path in stores:
        write_profiles(path, [Profile(names[user], []) for user in sorted(names, key=names.__getitem__)], {})
    where = ["--home", str(tmp_path), "--profiles", str(stores[1])]
    vault.forget("ada")
    assert run(capsys, "run", *where, "--no-replicas", "--settle", "0")[0] == 0
    assert run(capsys, "rotate", *where)[0] == 0
    for path in stores:
        with SqliteProfiles(path) as store:
            assert store.get(names["ada"]) is None
            assert store.get(vault.pseudonym("bob") or "") is not None


@pytest.fixture
def lake_home(tmp_path: Path, vault: SqliteVault, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """A home whose lake and data set have a history, and somebody in both."""
    words = ["--source", "simulator", "--users", "40", "--items", "60", "--events", "3000", "--days", "20"]
    assert prepare([*words, "--home", str(tmp_path)]) == 0
    capsys.readouterr()
    (made,) = (tmp_path / "onprem" / "datasets").glob("simulator-*")
    with Lake.open(tmp_path / "onprem" / "lake") as lake:
        lake.load(made)
    events = pl.read_parquet(made / "events.parquet")
    named = events["user"].drop_nulls()[0]
    return tmp_path, next(user for user in vault.all_users() if vault.pseudonym(user) == named)


def knows(home: Path, name: str) -> list[str]:
    """Where a pseudonym is found."""
    found = [
        path.parent.name
        for path in (home / "onprem" / "datasets").glob("*/events.parquet")
        if name in pl.read_parquet(path)["user"].to_list()
    ]
    with Lake.open(home / "onprem" / "lake") as lake:
        return found + ["lake"] * (name in lake.events(columns=["user"]).read_all()["user"].to_pylist())


def test_nobody_is_called_erased_whom_a_preparation_under_way_brings_back(
    lake_home: tuple[Path, str],
    vault: SqliteVault,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    home, user = lake_home
    name = vault.pseudonym(user) or ""
    arguments = ("run", "--home", str(home), "--no-replicas", "--settle", "0")
    read = preparation._load

    def read_and_erase_meanwhile(request: Request, progress: Progress) -> SourceData:
        source = read(request, progress)
        vault.forget(user)
        assert main(arguments, {}) == 2
        return source

    monkeypatch.setattr(custody, "WAIT_S", 0.0)
    monkeypatch.setattr(preparation, "_load", read_and_erase_meanwhile)
    assert prepare(["--source", "lake", "--home", str(home)]) == 0
    assert "data is being prepared" in capsys.readouterr().out
    assert len(vault.queue()) == 1
    assert run(capsys, *arguments)[0] == 0
    assert vault.queue() == []
    assert knows(home, name) == []


def test_a_data_set_that_is_loaded_during_an_erasure_brings_nobody_into_the_lake(
    lake_home: tuple[Path, str],
    vault: SqliteVault,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    home, user = lake_home
    name = vault.pseudonym(user) or ""
    vault.forget(user)
    remove = DataSets.remove

    def load_and_remove(self: DataSets, people: Collection[str]) -> int:
        (made,) = (home / "onprem" / "datasets").glob("simulator-*")
        with Lake.open(home / "onprem" / "lake") as lake:
            lake.load(made, origin="again")
        return remove(self, people)

    monkeypatch.setattr(DataSets, "remove", load_and_remove)
    assert run(capsys, "run", "--home", str(home), "--no-replicas", "--settle", "0")[0] == 0
    assert knows(home, name) == []


def test_the_key_is_not_changed_under_a_preparation(
    tmp_path: Path, vault: SqliteVault, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = vault.pseudonym("ada")
    monkeypatch.setattr(custody, "WAIT_S", 0.0)
    with custody.custody(tmp_path, alone=False):
        assert run(capsys, "rotate", "--home", str(tmp_path))[0] == 2
    assert vault.pseudonym("ada") == before
    with custody.custody(tmp_path, alone=True):
        assert prepare(["--source", "simulator", "--home", str(tmp_path)]) == 2
    assert "change of key is under way" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_whatever_ends_the_watch_the_next_run_goes_on(
    tmp_path: Path, vault: SqliteVault, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
):
    vault.forget("ada")
    command = [sys.executable, "-m", "workloads.erasure", "run", "--watch", "--no-replicas", "--home", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:  # the first pass is over, the last one is due in a minute
            if re.search("the last pass follows", line):
                break
        process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait(60) == code
    assert "Traceback" not in errors
    assert len(vault.queue()) == 1
    assert run(capsys, "run", "--home", str(tmp_path), "--no-replicas", "--settle", "0")[0] == 0
    assert vault.queue() == []
