"""The whole job: what it leaves behind, what it never lets out, and how it ends when it cannot go on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest

from workloads.contract.http import PSEUDONYM_PATTERN
from workloads.data.__main__ import main
from workloads.data.dataset import Dataset
from workloads.data.events import RowFault
from workloads.data.profiles import SqliteProfiles
from workloads.data.truth import Truth
from workloads.privacy.vault import SqliteVault
from workloads.telemetry.progress import FaultLine, Line, NoteLine, ProgressLine, ResultLine, parse

SIMULATOR = ["--source", "simulator", "--users", "120", "--items", "90", "--events", "4000"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[Line]]:
    code = main(list(arguments))
    written = capsys.readouterr().out.splitlines()
    lines = [parse(line) for line in written]
    assert None not in lines, written
    return code, [line for line in lines if line is not None]


def made(lines: list[Line]) -> ResultLine:
    assert isinstance(lines[-1], ResultLine), lines[-1]
    return lines[-1]


def fault(lines: list[Line]) -> FaultLine:
    assert isinstance(lines[-1], FaultLine), lines[-1]
    return lines[-1]


def a_log(folder: Path, *, bad: int = 0, users: int = 20) -> Path:
    """An event log of people whose ids cannot stand anywhere by chance; sessions hold them too."""
    lines = ["type,timestamp_ms,user,item,session,title"]
    for number in range(400):
        user = f"secret-{number % users:02d}-zebra"
        at = 1_767_600_000_000 + number * 3_600_000
        lines.append(f"purchase,{at},{user},sku-{number % 37},{user}-visit-{number},Blue Mug")
    lines += [f"purchase,never,secret-99-zebra,sku-{n},," for n in range(bad)]
    path = folder / "shop.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_simulators_job_leaves_what_the_architecture_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = run(capsys, *SIMULATOR, "--home", str(tmp_path))
    result = made(lines)
    assert code == 0
    data = Dataset.load(Path(result.made["dataset"]))
    assert data.path.parent == tmp_path / "onprem" / "datasets"
    assert result.figures["events"] == len(data.log)
    assert result.figures["reused"] == 0.0
    assert data.meta.protocol == "next_item"
    assert data.meta.parameters["seed"] == 1
    assert sorted(p.name for p in data.path.iterdir()) == [
        "dataset.json",
        "events.parquet",
        "items.parquet",
        "splits.json",
        "truth",
    ]
    with SqliteProfiles(Path(result.made["profiles"])) as profiles:
        assert profiles.meta["dataset"] == data.path.name
        for user in data.events.filter(pl.col("type") == "purchase")["user"].drop_nulls().unique():
            assert profiles.get(user) is not None
    assert any(isinstance(line, ProgressLine) and line.done == line.total for line in lines)


def test_truth_and_profiles_meet_under_one_pseudonym(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, lines = run(capsys, *SIMULATOR, "--home", str(tmp_path))
    result = made(lines)
    vault = SqliteVault(Path(result.made["vault"]))
    data = Dataset.load(Path(result.made["dataset"]))
    assert data.truth is not None
    truth = Truth.load(data.truth)
    assert truth.users[0] == vault.pseudonym("user-000001")
    assert set(data.events["user"].drop_nulls()) <= set(truth.users.tolist())
    sample = msgspec.json.decode(Path(result.made["users_sample"]).read_bytes(), type=list[str])
    with SqliteProfiles(Path(result.made["profiles"])) as profiles:
        assert all(profiles.get(vault.pseudonym(user) or "nobody") for user in sample)
        assert len(sample) == len(profiles) == len(set(sample))
    vault.close()


def test_a_raw_user_id_is_in_no_byte_of_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    home = tmp_path / "home"
    _, lines = run(capsys, "--source", f"events={a_log(tmp_path, bad=3)}", "--home", str(home))
    folder = Path(made(lines).made["dataset"])
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        assert b"zebra" not in path.read_bytes()
        if path.suffix == ".parquet":  # compressed: look at the values too
            text = pl.read_parquet(path).select(pl.exclude("image").cast(pl.String)).to_series().to_list()
            assert not any("zebra" in str(value) for value in text)
            frame = pl.read_parquet(path).select(pl.col(pl.String))
            assert not frame.select(pl.any_horizontal(pl.all().str.contains("zebra").any())).item()
    events = Dataset.load(folder).events
    assert events.select(pl.col("user").str.contains(PSEUDONYM_PATTERN).all()).item()
    assert events.select(pl.col("session").str.contains("^s1-[0-9a-f]{32}$").all()).item()
    assert b"zebra" not in (home / "onprem" / "profiles.sqlite").read_bytes()
    assert b"zebra" not in Path(made(lines).made["fault_report"]).read_bytes()
    # It is where it must be: on the home side, and private.
    sample = home / "onprem" / "users-sample.json"
    assert b"secret-00-zebra" in sample.read_bytes()
    vault = home / "onprem" / "vault.sqlite"
    for private in (sample, vault, home / "onprem" / "key" / "pseudonym-1.key", home / "onprem" / "profiles.sqlite"):
        assert private.stat().st_mode & 0o777 == 0o600


def test_the_truth_of_a_simulation_holds_no_raw_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, lines = run(capsys, *SIMULATOR, "--home", str(tmp_path))
    folder = Path(made(lines).made["dataset"])
    with zipfile.ZipFile(folder / "truth" / "truth.npz") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert b"user-0" not in content
            assert "user-0".encode("utf-32-le") not in content  # how numpy writes text
    for path in folder.glob("*.parquet"):
        frame = pl.read_parquet(path).select(pl.col(pl.String))
        assert not frame.select(pl.any_horizontal(pl.all().str.contains("user-0").any())).item()


def test_the_same_input_is_not_prepared_twice_and_another_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    home = ["--home", str(tmp_path)]
    first = made(run(capsys, *SIMULATOR, *home)[1])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = made(run(capsys, *SIMULATOR, *home)[1])
    assert again.made == first.made
    assert again.figures == {**first.figures, "reused": 1.0}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    asked = made(run(capsys, *SIMULATOR, "--again", *home)[1])
    assert (asked.made, asked.figures) == (first.made, first.figures)
    assert [path.name for path in (tmp_path / "onprem" / "datasets").iterdir()] == [Path(first.made["dataset"]).name]
    other = made(run(capsys, *SIMULATOR, "--seed", "2", *home)[1])
    assert other.made["dataset"] != first.made["dataset"]
    assert other.figures["reused"] == 0.0


@pytest.mark.parametrize(
    "victim", ["profiles.sqlite", "users-sample.json", "events.parquet", "dataset.json", "prepared.json"]
)
def test_what_was_damaged_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], victim: str):
    first = made(run(capsys, *SIMULATOR, "--home", str(tmp_path))[1])
    (path,) = tmp_path.rglob(victim)
    path.write_bytes(path.read_bytes()[:-7])
    again = made(run(capsys, *SIMULATOR, "--home", str(tmp_path))[1])
    assert again.figures["reused"] == 0.0
    assert again.made == first.made
    Dataset.load(Path(again.made["dataset"]))
    SqliteProfiles(Path(again.made["profiles"])).close()


def test_profiles_always_belong_to_the_data_set_prepared_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    home = ["--home", str(tmp_path)]
    for arguments in (SIMULATOR, ["--source", f"events={a_log(tmp_path)}"], SIMULATOR):
        result = made(run(capsys, *arguments, *home)[1])
        with SqliteProfiles(Path(result.made["profiles"])) as profiles:
            assert profiles.meta["dataset"] == Path(result.made["dataset"]).name


def test_another_home_has_another_key_and_other_pseudonyms(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    users = []
    for home in ("a", "b"):
        result = made(run(capsys, *SIMULATOR, "--home", str(tmp_path / home))[1])
        users.append(set(Dataset.load(Path(result.made["dataset"])).events["user"].drop_nulls()))
    assert not users[0] & users[1]


def test_bad_rows_below_the_threshold_are_reported_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = run(capsys, "--source", f"events={a_log(tmp_path, bad=5)}", "--home", str(tmp_path))
    assert code == 0
    report = Path(made(lines).made["fault_report"])
    assert report.stat().st_mode & 0o777 == 0o600
    faults = [msgspec.json.decode(line, type=RowFault) for line in report.read_bytes().splitlines()]
    assert [(f.row, f.field, f.value) for f in faults] == [(402 + n, "timestamp_ms", "never") for n in range(5)]
    summary = Dataset.load(Path(made(lines).made["dataset"])).meta.faults
    assert (summary.rows_read, summary.bad_rows) == (405, 5)
    assert any(isinstance(line, NoteLine) and line.text.startswith("bad rows: timestamp_ms") for line in lines)


def test_too_many_bad_rows_stop_the_job_with_counts_and_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = ["--source", f"events={a_log(tmp_path, bad=50)}", "--home", str(tmp_path / "home")]
    code, lines = run(capsys, *source)
    assert code == 2
    assert fault(lines).fault.startswith(
        "50 of 450 rows are bad (11.1%), more than the allowed 5.0%: 50 x timestamp_ms"
    )
    assert "first at line 402: timestamp_ms = 'never'" in fault(lines).remedy
    assert "--max-bad-share" in fault(lines).remedy
    assert not (tmp_path / "home" / "onprem" / "datasets").exists()
    assert run(capsys, *source, "--max-bad-share", "0.2")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source", "oracle"], "source 'oracle' is unknown"),
        (["--source", "simulator=x"], "takes no file"),
        (["--source", "events"], "needs a file"),
        (["--source", "events=none.csv"], "none.csv: no such file"),
        (["--source", "simulator", "--users", "-1"], "users=-1: must be 20 to"),
        (["--source", "simulator", "--events", "0"], "events=0: must be 500 to"),
        (["--source", "simulator", "--max-bad-share", "2"], "--max-bad-share 2.0"),
        (["--source", "simulator", "--max-bad-share", "nan"], "--max-bad-share nan"),
        (["--source", "events=x", "--column", "user"], "--column user: must be OURS=THEIRS"),
    ],
)
def test_wrong_arguments_end_with_a_fault_and_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    code, lines = run(capsys, *arguments, "--home", str(tmp_path))
    assert code == 2
    assert said in fault(lines).fault
    assert fault(lines).remedy


def test_an_open_key_stops_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys, *SIMULATOR, "--home", str(tmp_path))
    (tmp_path / "onprem" / "key" / "pseudonym-1.key").chmod(0o644)
    code, lines = run(capsys, *SIMULATOR, "--home", str(tmp_path))
    assert code == 2
    assert "lets others read it" in fault(lines).fault
    assert fault(lines).remedy == "run chmod 600 on it"


def test_a_home_that_cannot_be_written_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "home").write_text("a file where a directory should be")
    code, lines = run(capsys, *SIMULATOR, "--home", str(tmp_path / "home"))
    assert code == 2
    assert "cannot write below" in fault(lines).fault


def test_a_log_of_one_moment_is_a_fault_and_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "shop.csv"
    rows = [f"view,1767600000000,u{n},sku" for n in range(20)]
    path.write_text("\n".join(["type,timestamp_ms,user,item", *rows]) + "\n")
    code, lines = run(capsys, "--source", f"events={path}", "--home", str(tmp_path))
    assert code == 2
    assert "covers a longer time" in fault(lines).fault + fault(lines).remedy


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_and_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals, code: int):
    command = [sys.executable, "-m", "workloads.data", *SIMULATOR[:2], "--events", "3000000", "--home", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if re.search('"stage":"simulate"', line):
                break
        process.send_signal(number)
        rest, errors = process.stdout.read(), process.stderr.read()
        assert process.wait(60) == code
    assert "Traceback" not in errors
    assert '"kind":"result"' not in rest
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["onprem/custody.lock", "onprem/key/pseudonym-1.key", "onprem/vault.sqlite"]


def test_the_jobs_stdout_is_only_progress_lines_when_run_as_a_process(tmp_path: Path):
    command = [sys.executable, "-W", "error", "-m", "workloads.data", *SIMULATOR, "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines = [parse(line) for line in done.stdout.splitlines()]
    assert None not in lines
    assert isinstance(lines[-1], ResultLine)
    assert done.stderr == ""


# --- real data ---


def test_online_retail_is_prepared_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str], shared_data: Path):
    source = shared_data / "online-retail" / "online_retail.csv.gz"
    code, lines = run(capsys, "--source", f"online-retail={source}", "--home", str(tmp_path))
    assert code == 0
    data = Dataset.load(Path(made(lines).made["dataset"]))
    assert data.meta.faults.rows_read == 541_909
    assert data.meta.faults.bad_rows == 0
    assert data.meta.protocol == "next_basket"
    rows = {rule.rule: rule.rows for rule in data.meta.rules}
    assert rows["line repeated in every field"] == 5_268
    matched = sum(count for rule, count in rows.items() if rule.startswith("cancellation"))
    assert matched > 8_000
    assert 500_000 < len(data.log) < 530_000
    assert 3_500 < data.items.height < 4_000
    assert 4_200 < data.meta.users < 4_372
    assert not {"POST", "M", "BANK CHARGES"} & set(data.items["item"])
    assert data.events["user"].null_count() > 100_000
    assert data.events.filter((pl.col("price") <= 0) | (pl.col("quantity") <= 0)).height == 0
    test_share = len(data.part("test")) / len(data.log)
    assert test_share == pytest.approx(0.1, abs=0.002)
    assert (data.items["category"] == "other").mean() < 0.4
    # The raw ids have five digits, which chance alone writes anywhere; as whole values they are nowhere.
    raw = pl.read_csv(source, columns=["CustomerID"], infer_schema=False)["CustomerID"].drop_nulls().unique()
    known = set(raw.str.replace(r"\.0$", ""))
    for name in data.events.select(pl.col(pl.String)).columns:
        if name != "item":
            assert not known & set(data.events[name].drop_nulls().unique())


def test_beauty_sequences_split_as_in_the_literature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shared_data: Path
):
    source = shared_data / "amazon-beauty" / "beauty.txt.gz"
    _, lines = run(capsys, "--source", f"sequences={source}", "--home", str(tmp_path))
    data = Dataset.load(Path(made(lines).made["dataset"]))
    assert (data.meta.users, data.items.height, len(data.log)) == (22_363, 12_101, 198_502)
    assert len(data.part("test")) == len(data.part("validation")) == 22_363
    last = data.events.group_by("user", maintain_order=True).agg(pl.col("item").last())
    held_out = data.part("test").frame.select("user", "item")
    assert set(held_out.iter_rows()) == set(last.iter_rows())
    assert np.all(data.items["first_seen_ms"].to_numpy() == data.meta.boundaries.start_ms)


def test_whom_the_gateway_knows_keeps_the_pseudonym_and_all_come_in_by_one_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    vault = SqliteVault(tmp_path / "onprem" / "vault.sqlite", create=True)
    known = vault.admit(["user-000001"])["user-000001"]
    commits: list[int] = []
    admit = SqliteVault.admit
    monkeypatch.setattr(SqliteVault, "admit", lambda self, users: commits.append(1) or admit(self, users))
    _, lines = run(capsys, *SIMULATOR, "--home", str(tmp_path))
    data = Dataset.load(Path(made(lines).made["dataset"]))
    assert known in data.events["user"].to_list()
    assert len(commits) == 1
    vault.close()


def test_a_damaged_vault_is_a_fault_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys, *SIMULATOR, "--home", str(tmp_path))
    (tmp_path / "onprem" / "vault.sqlite").chmod(0o644)
    code, lines = run(capsys, *SIMULATOR, "--home", str(tmp_path))
    assert code == 2
    assert "vault.sqlite: mode 0644" in fault(lines).fault
    assert fault(lines).remedy == "run chmod 600 on it"
