"""The job as it is started: lines on stdout, exit codes, nothing half-made; and against a real bucket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from infra.emulator import Emulator
from workloads.bundle.delta import verify_delta
from workloads.bundle.registry import Registry
from workloads.bundle.signature import Trust, make_key, sign
from workloads.contract.storage import Release
from workloads.delta.__main__ import main
from workloads.objects.s3 import S3Objects
from workloads.telemetry.progress import FaultLine, NoteLine, ResultLine, parse

BUCKET = "new-items-models"


Run = Callable[..., tuple[int, list[object], str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The job in this process, which is a second faster: exit code, lines and standard error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object, **environment: str) -> tuple[int, list[object], str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        code = main([*map(str, arguments)])
        said = capfd.readouterr()
        return code, [parse(line) for line in said.out.splitlines()], said.err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_file_of_new_items_becomes_a_delta(run: Run, made: Path, items: Path, tmp_path: Path):
    code, lines, errors = run("make", "--bundle", made, "--items", items, "--out", tmp_path / "deltas")
    assert (code, errors) == (0, "")
    result = lines[-1]
    assert isinstance(result, ResultLine)
    assert verify_delta(Path(result.made["delta"])).items == 3
    code, lines, _ = run(
        "make", "--bundle", made, "--deltas", result.made["delta"], "--items", items, "--out", tmp_path / "deltas"
    )
    fault = lines[-1]
    assert isinstance(fault, FaultLine)
    assert (code, "3 x item must be new" in fault.fault) == (2, True)


def test_bad_rows_are_named_and_no_delta_is_made(run: Run, made: Path, tmp_path: Path):
    (tmp_path / "new.csv").write_text("item,title,price\na,Good,1\nb,,2\nc,Free,0\n")
    code, lines, errors = run("make", "--bundle", made, "--items", tmp_path / "new.csv", "--out", tmp_path / "deltas")
    assert (code, errors) == (2, "")
    notes = [line.text for line in lines if isinstance(line, NoteLine)]
    assert any("row 3: title must have a word" in note for note in notes)
    assert any("row 4: price must be a number above 0" in note and "'0'" in note for note in notes)
    fault = lines[-1]
    assert isinstance(fault, FaultLine)
    assert "2 of 3 rows" in fault.fault
    assert "correct these rows" in fault.remedy
    assert not (tmp_path / "deltas").exists()


def test_a_category_that_the_bundle_does_not_know_is_said(run: Run, made: Path, tmp_path: Path):
    (tmp_path / "new.csv").write_text("item,title,category\na,Good,Spaceships\n")
    code, lines, _ = run("make", "--bundle", made, "--items", tmp_path / "new.csv", "--out", tmp_path / "deltas")
    assert code == 0
    assert any(isinstance(line, NoteLine) and "no category 'Spaceships'" in line.text for line in lines)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"--bundle": "nowhere"}, "there is no such directory"),
        ({"--items": "nowhere.csv"}, "no such file"),
        ({"--deltas": "nowhere"}, "there is no such directory"),
        ({"--out": "/proc/nowhere"}, "cannot be read or written"),
    ],
)
def test_what_cannot_be_used_ends_with_a_fault_and_no_traceback(
    run: Run, made: Path, items: Path, tmp_path: Path, change: dict[str, str], fault: str
):
    options = {"--bundle": str(made), "--items": str(items), "--out": str(tmp_path / "deltas")} | change
    code, lines, errors = run("make", *(word for option in options.items() for word in option))
    assert (code, errors) == (2, "")
    last = lines[-1]
    assert isinstance(last, FaultLine)
    assert fault in last.fault
    assert last.remedy


def test_a_name_that_no_channel_may_have_is_a_fault(run: Run, items: Path, tmp_path: Path):
    make_key(tmp_path / "publisher.key")
    where = ["--channel", "../x", "--models-bucket", "b", "--key", tmp_path / "publisher.key", "--trust", tmp_path]
    code, lines, errors = run("add", "--items", items, "--work", tmp_path, "--actor", "x", *where)
    assert (code, errors) == (2, "")
    assert isinstance(lines[-1], FaultLine)
    assert "no channel's name" in lines[-1].fault


def _when_read(pipe: Path, job: subprocess.Popen[bytes]) -> int:
    """The pipe's other end, once the job reads it."""
    until = time.monotonic() + 30
    while time.monotonic() < until and job.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.02)
    job.kill()
    pytest.fail("the job never came to read its file")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_job_that_is_asked_to_end_leaves_nothing(made: Path, tmp_path: Path, number: signal.Signals, code: int):
    slow = tmp_path / "new.jsonl"  # a shop that takes its time
    os.mkfifo(slow)
    out = tmp_path / "deltas"
    command = ["make", "--bundle", made, "--items", slow, "--out", out]
    with subprocess.Popen(
        [sys.executable, "-m", "workloads.delta", *map(str, command)], stdout=subprocess.DEVNULL
    ) as job:
        writer = _when_read(slow, job)
        job.send_signal(number)
        try:
            assert job.wait(30) == code
        finally:
            job.kill()
            os.close(writer)
    assert not out.exists() or not list(out.rglob("*"))


@pytest.mark.real_parts
def test_items_are_added_to_what_a_channel_in_a_bucket_serves(
    run: Run, emulator: Emulator, made: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    aws = {
        "AWS_ENDPOINT_URL": emulator.endpoint,
        "AWS_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    for name, value in aws.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    password = "correct horse"  # noqa: S105 - of this test's key
    key = make_key(tmp_path / "signing" / "publisher.key", password=password)
    registry = Registry(S3Objects(BUCKET), Trust.of(key))
    signature = sign(made, key.private, password=password, signature=tmp_path / f"{made.name}.sig")
    registry.publish(made, signature, actor="tester")
    registry.promote("stable", Release(bundle=made.name), "tester")
    where = ["--channel", "stable", "--models-bucket", BUCKET, "--key", key.private, "--trust", key.public.parent]
    options = ["--items", items, "--work", tmp_path / "work", "--actor", "tester", "--audit", tmp_path / "audit.jsonl"]
    code, lines, errors = run("add", *options, *where, RANKBRIDGE_SIGNING_PASSWORD=password)
    assert (code, errors) == (0, ""), lines[-1]
    result = lines[-1]
    assert isinstance(result, ResultLine)
    assert (result.made["deltas"], result.made["sequence"]) == ("1", "2")
    [delta] = registry.pointer("stable")[0].current.deltas
    fetched = registry.fetch_delta(delta, tmp_path / "site", made.name, 1)
    assert verify_delta(fetched).items == 3
    assert "channel.promote" in (tmp_path / "audit.jsonl").read_text()
    code, lines, errors = run("add", *options, *where, RANKBRIDGE_SIGNING_PASSWORD=password)
    assert (code, errors) == (2, ""), "they are there already"
    code, lines, errors = run("publish", "--delta", fetched, "--actor", "x", *where)
    assert (code, errors) == (0, ""), "it is there already: nothing is signed"
