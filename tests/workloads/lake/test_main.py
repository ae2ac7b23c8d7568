"""The command line: results, faults and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workloads.intake.records import Batch
from workloads.intake.store import COLUMNS, SqliteStore
from workloads.lake.__main__ import main
from workloads.lake.lake import Lake

if TYPE_CHECKING:
    from tests.workloads.lake.conftest import Shop


@pytest.fixture
def home(tmp_path: Path, shop: Shop) -> Path:
    store = SqliteStore(tmp_path / "onprem" / "events.sqlite")
    rows = [tuple(shop.event(n, day=n % 2, user=n % 3).get(name) for name in COLUMNS) for n in range(40)]
    store.append([Batch(rows, [])], 1)
    store.close()
    return tmp_path


def last_of(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_whole_way_from_spool_to_answer(home: Path, capsys: pytest.CaptureFixture[str], shop: Shop):
    assert main(["ingest", "--home", str(home)]) == 0
    assert last_of(capsys)["figures"] == {"events": 40, "duplicates": 0, "taken": 40, "commits": 1}
    assert main(["verify", "--home", str(home)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"2026-03-01 view: spool 20, lake 20", "2026-03-02 view: spool 20, lake 20"} <= {
        line.get("text") for line in lines
    }
    assert main(["query", "--home", str(home), "--sql", "SELECT count(*) AS n, min(day) AS d FROM events"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {"n": 40, "d": "2026-03-01"}
    assert main(["compact", "--home", str(home)]) == 0
    (home / "names").write_text(f"{shop.user(1)}\n")
    capsys.readouterr()
    assert main(["erase", "--home", str(home), "--pseudonyms", str(home / "names")]) == 0
    assert last_of(capsys)["figures"]["events"] == 13
    assert main(["verify", "--home", str(home)]) == 1
    assert "13 missing" in last_of(capsys)["fault"]


def test_a_moved_lake_is_named_and_relocated(
    home: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
):
    main(["ingest", "--home", str(home)])
    moved = tmp_path_factory.mktemp("moved") / "home"
    home.rename(moved)
    capsys.readouterr()
    assert main(["verify", "--home", str(moved)]) == 2
    assert "relocate" in last_of(capsys)["remedy"]
    assert main(["relocate", "--home", str(moved)]) == 0
    assert main(["verify", "--home", str(moved)]) == 0
    capsys.readouterr()
    assert main(["ingest", "--home", str(moved)]) == 0
    assert last_of(capsys)["figures"]["events"] == 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["ingest"], "no such spool"),
        (["verify"], "there is no lake"),
        (["compact"], "there is no lake"),
        (["relocate"], "there is no lake"),
        (["load", "--dataset", "nowhere"], "has no events.parquet"),
    ],
)
def test_a_fault_is_said_in_one_line_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], fault: str
):
    assert main([*words, "--home", str(tmp_path)]) == 2
    line = last_of(capsys)
    assert line["kind"] == "fault"
    assert fault in line["fault"]
    assert line["remedy"]


def test_a_bad_question_and_a_bad_list_are_faults(home: Path, capsys: pytest.CaptureFixture[str]):
    main(["ingest", "--home", str(home)])
    assert main(["query", "--home", str(home), "--sql", "SELECT shoe FROM events"]) == 2
    (home / "names").write_text("alice@example.org\n")
    capsys.readouterr()
    assert main(["erase", "--home", str(home), "--pseudonyms", str(home / "names")]) == 2
    assert "alice" not in capsys.readouterr().out


_KILLED = """
import os, signal, sys
from pathlib import Path
from pyiceberg.catalog.sql import SqlCatalog
from workloads.lake import durable
from workloads.lake.__main__ import main
left = int(sys.argv[1])
def counted(change):
    def done(*given):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*given)
    return done
durable.place = counted(durable.place)
SqlCatalog.commit_table = counted(SqlCatalog.commit_table)
main(["ingest", "--home", sys.argv[2]])
"""


@pytest.mark.real_parts
def test_a_killed_ingest_leaves_all_or_nothing_and_the_next_completes_it(
    home: Path,
):
    steps = range(1, 13) if os.environ.get("RANKBRIDGE_LONG") else (3, 7)
    for step in steps:
        process = subprocess.run(
            [sys.executable, "-c", _KILLED, str(step), str(home)], capture_output=True, check=False
        )
        assert process.returncode in (0, -signal.SIGKILL), process.stderr
        with Lake.open(home / "onprem" / "lake") as lake:
            assert lake.events().read_all().num_rows == lake.taken
            assert lake.taken in (0, 40)
    assert main(["ingest", "--home", str(home)]) == 0
    assert main(["verify", "--home", str(home)]) == 0


_SLOW = """
import sys, time
from workloads.lake import __main__ as job, lake
def ingest(*given, **named):
    print("in", flush=True)
    time.sleep(60)
lake.Lake.ingest = ingest
sys.exit(job.main(sys.argv[1:]))
"""


@pytest.mark.real_parts
def test_a_stopped_job_ends_with_its_signal(home: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, "ingest", "--home", str(home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert errors == b""


def test_a_damaged_catalogue_and_a_damaged_file_are_faults(home: Path, capsys: pytest.CaptureFixture[str]):
    main(["ingest", "--home", str(home)])
    lake = home / "onprem" / "lake"
    for file in lake.rglob("*.parquet"):
        file.write_bytes(b"no parquet at all")
    capsys.readouterr()
    assert main(["verify", "--home", str(home)]) == 2
    assert "not as it should be" in last_of(capsys)["fault"]
    (lake / "catalog.sqlite").write_bytes(b"no database" * 1000)
    assert main(["verify", "--home", str(home)]) == 2
    assert "cannot be read" in last_of(capsys)["fault"]
