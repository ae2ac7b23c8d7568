"""Training and export kept to their own home: the same result as free, and no way to what is private."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import boto3
import msgspec
import polars as pl
import pytest
from landlock import LandlockError
from landlock.plumbing import landlock_abi_version

from infra.emulator import Emulator
from workloads.data.dataset import Dataset, write_dataset
from workloads.data.events import EventLog
from workloads.privacy.columns import DEFAULT
from workloads.telemetry.progress import FaultLine, NoteLine, Progress, ResultLine, parse
from workloads.training import job
from workloads.training.job import TrainingConfig

replace = msgspec.structs.replace

try:
    ABI = landlock_abi_version()
except LandlockError:
    ABI = 0
LONG = os.environ.get("RANKBRIDGE_LONG") == "1"
pytestmark = [
    pytest.mark.real_parts,
    pytest.mark.skipif(ABI == 0, reason="this kernel has no Landlock"),
]


def run(module: str, *options: str) -> tuple[subprocess.CompletedProcess[str], object]:
    ended = subprocess.run(
        [sys.executable, "-m", module, *options], capture_output=True, text=True, timeout=300, check=False
    )
    return ended, parse(ended.stdout.strip().splitlines()[-1]) if ended.stdout.strip() else None


@pytest.fixture
def aws(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> str:
    """The standard AWS configuration, pointed at the emulator, and an empty bucket there."""
    for name, value in {
        "AWS_ENDPOINT_URL": emulator.endpoint,
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"confined-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    return bucket


@pytest.fixture
def shop(dataset: Dataset, tmp_path: Path) -> Path:
    """A home with its key and one data set, whose sessions are pseudonyms as its users are."""
    sessions = dataset.events["session"].drop_nulls().unique()
    named = [f"s1-{hashlib.sha256(each.encode()).hexdigest()[:32]}" for each in sessions]
    named_in = pl.col("session").replace_strict(sessions, named, default=None, return_dtype=pl.String)
    key = tmp_path / "onprem" / "key" / "pseudonym-1.key"
    key.parent.mkdir(parents=True)
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(32))
    meta = dataset.meta
    return write_dataset(
        tmp_path / "onprem" / "datasets",
        name=meta.name,
        source=meta.source,
        input_digest=meta.input_digest,
        key_epoch=1,
        protocol=meta.protocol,
        cut=meta.boundaries,
        log=EventLog(dataset.events.with_columns(named_in)),
        items=dataset.items,
        splits=dataset.splits,
        rules=[],
        faults=meta.faults,
        parameters={},
    ).path


def test_a_confined_training_from_the_bucket_alone_makes_what_one_at_home_makes(shop: Path, aws: str, tmp_path: Path):
    """Pushed under a policy that leaves all columns alone, fetched, trained and exported in confinement."""
    policy = tmp_path / "open.toml"
    lines = DEFAULT.read_text(encoding="utf-8").splitlines()
    opened = [f'{line.split(" = ")[0]} = {{ do = "leave" }}' if " = { do" in line else line for line in lines]
    policy.write_text("\n".join(opened), encoding="utf-8")
    ended, line = run(
        "workloads.replication", "push", "--dataset", str(shop), "--home", str(tmp_path), "--data-bucket", aws,
        "--policy", str(policy),
    )  # fmt: skip
    assert isinstance(line, ResultLine), ended.stdout[-500:] + ended.stderr
    private_name = shop.name
    private = shop.rename(tmp_path / "away")  # whatever the cloud's half may do: it is not there any more

    home = tmp_path / "aws" / "training"
    ended, line = run(
        "workloads.training", "--replica", line.made["replica"], "--data-bucket", aws, "--home", str(home), "--confine",
        "--small", "--threads", "1", "--rounds", "2", "--epochs", "1",
    )  # fmt: skip
    assert isinstance(line, ResultLine), ended.stdout[-500:] + ended.stderr
    lines_said = [parse(each) for each in ended.stdout.splitlines()]
    (confined,) = [each for each in lines_said if isinstance(each, NoteLine) and each.stage == "confine"]
    assert str(home) in confined.text
    assert sum(isinstance(each, ResultLine) for each in lines_said) == 1
    fetched, trained = Path(line.made["dataset"]), Path(line.made["training"])
    assert fetched.is_relative_to(home)
    assert fetched.name == private_name
    if LONG:  # elsewhere it is tested that equal data sets make equal trainings
        config = TrainingConfig(threads=1).small()
        config = replace(config, towers=replace(config.towers, rounds=2), ranker=replace(config.ranker, epochs=1))
        free = job.train(private, tmp_path / "free", config, Progress(io.StringIO()))
        assert free.name == trained.name
        for name in (job.METRICS, job.TABLES, "weights/two_tower.safetensors", "weights/ranker.safetensors"):
            assert (trained / name).read_bytes() == (free / name).read_bytes(), name

    ended, line = run(
        "workloads.export", "--training", str(trained), "--dataset", str(fetched), "--home", str(home), "--confine"
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
