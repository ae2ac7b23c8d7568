"""The whole job on a small shop: what it leaves, that it repeats itself, and that it can be interrupted."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file

from workloads.contract.quality import QualityReport
from workloads.contract.tensors import ITEM_TABLES, USER_TOWER, FeatureSchema
from workloads.data.dataset import Dataset
from workloads.data.features import ItemTables
from workloads.models import ranker, student, two_tower
from workloads.models.ladder import LADDER_FILE, PROTOCOLS, RankedLists, measure
from workloads.telemetry.progress import FaultLine, Progress, ResultLine, parse
from workloads.training import job
from workloads.training.__main__ import main
from workloads.training.job import TrainingConfig, TrainingFacts, digest_of, train
from workloads.training.ranking import probabilities

pytestmark = pytest.mark.real_parts


@pytest.fixture(scope="module")
def finished(dataset: Dataset, quick: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(dataset.path, tmp_path_factory.mktemp("home"), quick, Progress(io.StringIO()))


def results(directory: Path) -> dict[str, bytes]:
    """Content of every file but the durations."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    facts = json.loads(files.pop(job.FACTS))
    facts.pop("durations_s")
    return files | {job.FACTS: json.dumps(facts).encode()}


def test_a_finished_run_holds_all_that_export_reads(finished: Path, dataset: Dataset):
    schema = msgspec.json.decode((finished / job.FEATURES).read_bytes(), type=FeatureSchema)
    tables = load_file(finished / job.TABLES)
    assert set(tables) == set(ITEM_TABLES)
    assert len(ItemTables.of(tables).category) == schema.items + 1 == dataset.items.height + 1
    assert schema.reference_ms == dataset.meta.validation_end_ms
    assert tables["in_stock"][1:].tolist() == dataset.items["in_stock"].cast(pl.UInt8).to_list()
    facts = msgspec.json.decode((finished / job.FACTS).read_bytes(), type=TrainingFacts)
    assert facts.dataset_digest == dataset.meta.digest
    assert finished.name == f"train-{facts.digest[:12]}"
    assert not list(finished.parent.glob(".*")), "no draft is left"


def test_no_file_of_a_run_knows_a_person(finished: Path, dataset: Dataset):
    people = [name.encode() for name in dataset.events["user"].drop_nulls().unique()]
    assert len(people) > 100
    for file in finished.parent.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(name in content for name in people), file.name


def test_the_vectors_in_the_tables_are_the_towers_own(finished: Path):
    towers = two_tower.load(finished / job.WEIGHTS_DIR)
    tables = load_file(finished / job.TABLES)
    assert np.array_equal(towers.user.table.numpy(), tables["vectors"])
    inputs = [torch.zeros((1, *spec.shape), dtype=getattr(torch, spec.dtype)) for spec in USER_TOWER.inputs]
    assert torch.isfinite(towers.user(*inputs)).all()
    assert not ranker.load(finished / job.WEIGHTS_DIR).training


def test_the_report_has_every_row_on_the_same_requests(finished: Path):
    report = msgspec.json.decode((finished / job.METRICS).read_bytes(), type=QualityReport)
    names = {
        "ours",
        "fused",
        "two_tower",
        "item_knn",
        "traditional",
        "popularity",
        "popularity_30d",
        "personal_frequency",
    }
    for protocol in ("novel", "repeats"):
        rows = [row for row in report.rows if row.protocol == protocol]
        assert {row.name for row in rows} == names
        assert len({row.requests for row in rows}) == 1
        assert all({"recall@10", "ndcg@20", "hr@20", "coverage@20"} <= set(row.metrics) for row in rows)
    assert {row.name for row in report.rows if row.protocol == "search"} == {"two_tower", "popularity"}
    assert 0 < report.ranker.base_rate < 1
    assert report.statements


def test_the_ladder_is_measured_on_the_very_lists_of_the_table(finished: Path):
    report = msgspec.json.decode((finished / job.METRICS).read_bytes(), type=QualityReport)
    schema = msgspec.json.decode((finished / job.FEATURES).read_bytes(), type=FeatureSchema)
    for protocol in PROTOCOLS:
        rungs = {row.rung: row for row in report.rungs if row.protocol == protocol}
        assert set(rungs) == {1, 2, 3, 4}
        for rung, name in ((1, "ours"), (3, "fused"), (4, "traditional")):
            assert rungs[rung].ndcg_at_10 == pytest.approx(report.metric(name, protocol, "ndcg@10"), abs=1e-6)
        assert rungs[1].loss == 0.0
        assert report.loss(2, protocol) == rungs[2].loss
        assert {row.requests for row in rungs.values()} == {
            row.requests for row in report.rows if row.protocol == protocol
        }
    lists = RankedLists.load(finished / LADDER_FILE)
    mean, scale = (np.array(values, dtype=np.float32) for values in (schema.dense_mean, schema.dense_scale))
    inputs = (lists.sparse.astype(np.int64), (lists.dense - mean) / scale)
    models = {1: ranker.load(finished / job.WEIGHTS_DIR), 2: student.load(finished / job.WEIGHTS_DIR)}
    assert measure(lists, {rung: probabilities(one, *inputs) for rung, one in models.items()}) == report.rungs


def test_the_same_seed_gives_the_same_bytes(finished: Path, dataset: Dataset, quick: TrainingConfig, tmp_path: Path):
    again = train(dataset.path, tmp_path, quick, Progress(io.StringIO()))
    assert again.name == finished.name
    first, second = results(finished), results(again)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_another_seed_is_another_run(dataset: Dataset, quick: TrainingConfig):
    other = msgspec.structs.replace(quick, seed=1)
    assert digest_of(dataset.meta.digest, quick) != digest_of(dataset.meta.digest, other)
    assert digest_of("another data set", quick) != digest_of(dataset.meta.digest, quick)


class _InterruptedError(BaseException):
    """As a signal's."""


class _Interrupting(io.StringIO):
    """A stream that breaks the run off at a line which holds `at`, `times` lines in."""

    def __init__(self, at: str, times: int) -> None:
        super().__init__()
        self._at, self._left = at, times

    def write(self, text: str) -> int:
        self._left -= self._at in text
        if self._left < 0:
            raise _InterruptedError
        return super().write(text)


@pytest.mark.parametrize(
    ("at", "times"), [('"towers"', 2), ('"lists"', 1), ('"ranker"', 3), ('"student"', 2), ('"evaluate"', 0)]
)
def test_an_interrupted_run_goes_on_to_the_same_result(
    finished: Path, dataset: Dataset, quick: TrainingConfig, tmp_path: Path, at: str, times: int
):
    with pytest.raises(_InterruptedError):
        train(dataset.path, tmp_path, quick, Progress(_Interrupting(at, times), interval=0))
    work = tmp_path / "work"
    assert [path.name for path in work.iterdir()] == [f".{finished.name}.draft"], "nothing looks finished"
    again = train(dataset.path, tmp_path, quick, Progress(io.StringIO()))
    first, second = results(finished), results(again)
    assert [name for name in first if first[name] != second[name]] == []


def test_a_finished_run_is_used_again_only_when_asked(finished: Path, dataset: Dataset, quick: TrainingConfig):
    before = (finished / job.FACTS).stat().st_mtime_ns
    assert train(dataset.path, finished.parents[1], quick, Progress(io.StringIO()), reuse=True) == finished
    assert (finished / job.FACTS).stat().st_mtime_ns == before


def test_each_slice_learns_from_the_latest_requests_before_it(dataset: Dataset, quick: TrainingConfig, tmp_path: Path):
    """Fewer requests than lie between the first cut and the last: the first slice must not be left without."""
    replace = msgspec.structs.replace
    config = replace(quick, towers=replace(quick.towers, requests=60))
    assert (train(dataset.path, tmp_path, config, Progress(io.StringIO())) / job.FACTS).is_file()


# --- the command ----------------------------------------------------------------------------------


def last_line(text: str) -> object:
    return parse(text.strip().splitlines()[-1])


def test_a_data_set_that_is_none_is_a_fault_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--dataset", str(tmp_path), "--home", str(tmp_path / "home")]) == 2
    line = last_line(capsys.readouterr().out)
    assert isinstance(line, FaultLine)
    assert "dataset.json" in line.fault
    assert "workloads.data" in line.remedy


def test_a_damaged_data_set_is_a_fault(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / dataset.path.name
    shutil.copytree(dataset.path, copy)
    with (copy / "events.parquet").open("r+b") as file:
        file.write(b"xxxx")
    assert main(["--dataset", str(copy), "--home", str(tmp_path / "home")]) == 2
    line = last_line(capsys.readouterr().out)
    assert isinstance(line, FaultLine)
    assert "events.parquet was changed" in line.fault


@pytest.mark.parametrize(
    "option", [["--seed", "-1"], ["--rounds", "0"], ["--student-epochs", "0"], ["--threads", "9999"]]
)
def test_an_option_out_of_range_is_a_fault_that_names_it(
    option: list[str], dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--dataset", str(dataset.path), "--home", str(tmp_path), *option]) == 2
    line = last_line(capsys.readouterr().out)
    assert isinstance(line, FaultLine)
    assert " ".join(option) in line.fault


def test_ctrl_c_ends_the_job_cleanly_and_the_next_run_finishes(dataset: Dataset, tmp_path: Path):
    command = [sys.executable, "-m", "workloads.training", "--dataset", str(dataset.path), "--home", str(tmp_path)]
    command += ["--small", "--threads", "1", "--rounds", "2", "--epochs", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if '"stage":"towers"' in line:
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("work/train-*"))
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    line = last_line(finished.stdout)
    assert isinstance(line, ResultLine)
    assert (Path(line.made["training"]) / job.FACTS).is_file()
