"""Training and export kept to their own home: the same result as free, and no way to what is private."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from landlock import LandlockError
from landlock.plumbing import landlock_abi_version

from workloads.data.dataset import Dataset
from workloads.telemetry.progress import FaultLine, NoteLine, ResultLine, parse
from workloads.training import job

try:
    ABI = landlock_abi_version()
except LandlockError:
    ABI = 0
pytestmark = [
    pytest.mark.real_parts,
    pytest.mark.skipif(ABI == 0, reason="this kernel has no Landlock"),
]


def run(module: str, *options: str) -> tuple[subprocess.CompletedProcess[str], object]:
    ended = subprocess.run(
        [sys.executable, "-m", module, *options], capture_output=True, text=True, timeout=300, check=False
    )
    return ended, parse(ended.stdout.strip().splitlines()[-1]) if ended.stdout.strip() else None


def test_a_confined_training_and_export_make_what_free_ones_make(dataset: Dataset, tmp_path: Path):
    home = tmp_path / "aws" / "training"
    copy = home / "replica" / dataset.path.name
    shutil.copytree(dataset.path, copy)
    settings = ["--small", "--threads", "1", "--rounds", "2", "--epochs", "1"]
    ended, line = run("workloads.training", "--dataset", str(copy), "--home", str(home), "--confine", *settings)
    assert isinstance(line, ResultLine), ended.stdout[-500:] + ended.stderr
    assert line.made["dataset"] == str(copy)
    assert any(
        isinstance(note := parse(each), NoteLine) and note.stage == "confine" for each in ended.stdout.splitlines()
    )
    trained = Path(line.made["training"])
    _, free = run("workloads.training", "--dataset", str(dataset.path), "--home", str(tmp_path / "free"), *settings)
    assert isinstance(free, ResultLine)
    for name in (job.METRICS, job.TABLES, "weights/two_tower.safetensors", "weights/ranker.safetensors"):
        assert (trained / name).read_bytes() == (Path(free.made["training"]) / name).read_bytes(), name

    ended, line = run(
        "workloads.export", "--training", str(trained), "--dataset", str(copy), "--home", str(home), "--confine"
    )
    assert isinstance(line, ResultLine), ended.stdout[-500:] + ended.stderr
    assert (Path(line.made["bundle"]) / "manifest.json").is_file()
    assert "Traceback" not in ended.stderr


def test_a_confined_training_does_not_take_the_lake_s_data_set(dataset: Dataset, tmp_path: Path):
    home = tmp_path / "aws" / "training"
    for module, more in (("workloads.training", []), ("workloads.export", ["--training", str(home / "work")])):
        ended, line = run(module, "--dataset", str(dataset.path), "--home", str(home), "--confine", *more)
        assert ended.returncode == 2
        assert isinstance(line, FaultLine)
        assert "lies outside" in line.fault
        assert "--replica" in line.remedy


def test_a_link_in_the_home_leads_a_confined_training_nowhere(dataset: Dataset, tmp_path: Path):
    """The folder is the home's own; the events in it are a link to the lake's, which the kernel does not follow."""
    home = tmp_path / "aws" / "training"
    copy = home / "replica" / dataset.path.name
    shutil.copytree(dataset.path, copy)
    (copy / "events.parquet").unlink()
    (copy / "events.parquet").symlink_to(dataset.path / "events.parquet")
    ended, line = run("workloads.training", "--dataset", str(copy), "--home", str(home), "--confine", "--small")
    assert ended.returncode == 2, ended.stdout
    assert isinstance(line, FaultLine)
    assert "events.parquet" in line.fault
    assert "Permission denied" in line.fault


def test_a_replica_without_its_bucket_is_a_fault(tmp_path: Path):
    ended, line = run("workloads.training", "--replica", "shop-0123456789ab", "--home", str(tmp_path))
    assert ended.returncode == 2
    assert isinstance(line, FaultLine)
    assert "--data-bucket" in line.remedy


def test_settings_of_the_run_are_read_with_those_of_the_place(tmp_path: Path, dataset: Dataset):
    ended, line = run("workloads.training", "--dataset", str(dataset.path), "--home", str(tmp_path), "--rounds", "0")
    assert ended.returncode == 2
    assert msgspec.to_builtins(line)["fault"].startswith("--rounds 0")
