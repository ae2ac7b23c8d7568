"""Replication against a real S3 interface: processes killed, connections cut at any byte, and what the bucket holds.

The whole form (a gigabyte, 50 cuts) runs where RANKBRIDGE_LONG=1 is set; `make test` has the same on tens of megabytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import boto3
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.emulator import Emulator
from workloads.contract.storage import replica_manifest_key
from workloads.data import replica
from workloads.data.dataset import Dataset
from workloads.data.events import SCHEMA
from workloads.objects.s3 import S3Objects
from workloads.privacy.columns import DEFAULT
from workloads.replication.__main__ import main
from workloads.telemetry.progress import FaultLine, Progress, ProgressLine, ResultLine, parse

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = [pytest.mark.real_parts, pytest.mark.usefixtures("aws")]

LONG = os.environ.get("RANKBRIDGE_LONG") == "1"
MIB = 1 << 20
CHUNK, PARALLEL = 5 * MIB, 2
PART = 40 * MIB
CUTS = 50 if LONG else 4
BYTES = 1_000_000_000 if LONG else 30_000_000


class Shop(Protocol):
    """What the fixture `shop` is."""

    home: Path
    dataset: Path


Rewritten = Callable[[Path, Path, pl.DataFrame], Path]


@pytest.fixture
def aws(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> str:
    """The standard AWS configuration, pointed at the emulator; returns its endpoint."""
    for name, value in {
        "AWS_ENDPOINT_URL": emulator.endpoint,
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    return emulator.endpoint


@pytest.fixture
def client(aws: str) -> S3Client:  # noqa: ARG001 - it is configured by then
    return boto3.client("s3")


@pytest.fixture
def bucket(client: S3Client) -> str:
    """Versioned and under a key of its own, as the foundation's is."""
    name = f"replication-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    key = boto3.client("kms").create_key()["KeyMetadata"]["Arn"]
    client.put_bucket_encryption(
        Bucket=name,
        ServerSideEncryptionConfiguration={
            "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}}]
        },
    )
    return name


def last_line(text: str) -> object:
    return parse(text.strip().splitlines()[-1])


def push_command(shop: Shop, bucket: str, dataset: Path | None = None, *more: str) -> list[str]:
    command = ["push", "--dataset", str(dataset or shop.dataset), "--home", str(shop.home), "--data-bucket", bucket]
    return [*command, *more]


# --- the commands ---------------------------------------------------------------------------------


def test_a_data_set_goes_to_the_bucket_and_comes_back(
    shop: Shop, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(push_command(shop, bucket)) == 0
    text = capsys.readouterr().out
    line = last_line(text)
    assert isinstance(line, ResultLine)
    assert line.made == {"replica": shop.dataset.name, "manifest": replica_manifest_key(shop.dataset.name)}
    assert line.figures["sent"] == line.figures["verified"] == line.figures["bytes"] > 0
    stages = {each.stage: each for each in map(parse, text.splitlines()) if isinstance(each, ProgressLine)}
    assert stages["upload"].unit == "bytes"
    assert stages["upload"].done == stages["upload"].total == line.figures["bytes"]

    assert main(["list", "--data-bucket", bucket]) == 0
    assert shop.dataset.name in capsys.readouterr().out
    into = ["--data-bucket", bucket, "--into", str(tmp_path / "in")]
    assert main(["fetch", "--dataset", shop.dataset.name, *into]) == 0
    line = last_line(capsys.readouterr().out)
    assert isinstance(line, ResultLine)
    got = Dataset.load(Path(line.made["dataset"]))
    assert got.meta.replica is not None

    assert main(["remove", "--dataset", shop.dataset.name, "--home", str(shop.home), "--data-bucket", bucket]) == 0
    assert list(S3Objects(bucket).list("")) == []
    audit = (shop.home / "onprem" / "audit.jsonl").read_text(encoding="utf-8")
    assert audit.index("replica.export") < audit.index("replica.remove")
    capsys.readouterr()
    assert main(["fetch", "--dataset", shop.dataset.name, *into]) == 2
    line = last_line(capsys.readouterr().out)
    assert isinstance(line, FaultLine)
    assert "push it" in line.remedy


def test_a_bucket_that_ssm_names_gets_every_object_under_its_key(
    shop: Shop, bucket: str, client: S3Client, capsys: pytest.CaptureFixture[str]
):
    name = f"/rankbridge/{uuid.uuid4().hex[:8]}/buckets"
    boto3.client("ssm").put_parameter(Name=name, Value=json.dumps({"data": bucket}), Type="String")
    assert main(push_command(shop, f"ssm:{name}#data")) == 0
    capsys.readouterr()
    (rule,) = client.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    key = rule["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"]
    objects = [client.head_object(Bucket=bucket, Key=one.key) for one in S3Objects(bucket).list("")]
    assert objects
    assert {(one["ServerSideEncryption"], one["SSEKMSKeyId"]) for one in objects} == {("aws:kms", key)}
    audit = (shop.home / "onprem" / "audit.jsonl").read_text(encoding="utf-8")
    assert f'"bucket":"{bucket}"' in audit  # where it is, and not how it was found


@pytest.mark.parametrize(
    ("option", "word"),
    [
        (["--chunk-size", "1MiB"], "5 MiB"),
        (["--part-size", "1MiB"], "--part-size"),
        (["--parallel", "0"], "--parallel 0"),
        (["--policy", "/nowhere/columns.toml"], "/nowhere/columns.toml"),
    ],
)
def test_an_option_out_of_range_is_a_fault(
    shop: Shop, bucket: str, option: list[str], word: str, capsys: pytest.CaptureFixture[str]
):
    assert main(push_command(shop, bucket, None, *option)) == 2
    line = last_line(capsys.readouterr().out)
    assert isinstance(line, FaultLine)
    assert word in line.fault + line.remedy


def test_a_bucket_that_is_not_there_is_a_fault(shop: Shop, capsys: pytest.CaptureFixture[str]):
    assert main(push_command(shop, "no-such-bucket-here")) == 2
    line = last_line(capsys.readouterr().out)
    assert isinstance(line, FaultLine)
    assert "no-such-bucket-here" in line.fault


# --- canaries -------------------------------------------------------------------------------------

CANARIES = {
    "user": "canary-raw-user-7391",
    "session": "canary-session-of-7391",
    "email": "canary.person@example.org",
    "phone": "+49 170 1234567",
    "address": "17 Canary Wharf, 2nd floor",
    "context": "canary-context-cookie-5544",
    "rare": "canary words that one person typed",
    "event_id": "canary-event",
}


def with_canaries(frame: pl.DataFrame) -> pl.DataFrame:
    """Something of each person-bound kind in every private column, in many rows."""
    row = pl.int_range(pl.len())
    query = (
        pl.when(row % 7 == 0).then(pl.format("shoes {} please", pl.lit(CANARIES["email"])))
        .when(row % 7 == 1).then(pl.format("call {}", pl.lit(CANARIES["phone"])))
        .when(row % 4000 == 2).then(pl.lit(CANARIES["rare"]))
        .otherwise(pl.col("query"))
    )  # fmt: skip
    return frame.with_columns(
        pl.when(row % 5 == 0).then(pl.lit(CANARIES["user"])).otherwise("user").alias("user"),
        pl.when(row % 5 == 1).then(pl.lit(CANARIES["session"])).otherwise("session").alias("session"),
        query.alias("query"),
        pl.lit(CANARIES["address"]).alias("address"),
        pl.lit(CANARIES["context"]).alias("context"),
    )


def every_byte(client: S3Client, bucket: str) -> Iterator[tuple[str, bytes]]:
    """All that the bucket holds, every version and open upload: keys, headers, tags, bytes, pages and values."""
    for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket):
        for version in page.get("Versions", []):
            key, asked = version["Key"], {"Key": version["Key"], "VersionId": version["VersionId"], "Bucket": bucket}
            yield f"{key}: key", key.encode()
            yield f"{key}: headers", repr(client.head_object(**asked)).encode()
            yield f"{key}: tags", repr(client.get_object_tagging(**asked)["TagSet"]).encode()
            data = client.get_object(**asked)["Body"].read()
            yield f"{key}: bytes", data
            if data[:4] == b"PAR1":
                yield from parquet_bytes(key, data)
    yield "open uploads", repr(client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])).encode()


def parquet_bytes(key: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Decompressed pages (dictionaries included, whether a row uses them or not), values, the file's metadata."""
    at = data.find(b"\x28\xb5\x2f\xfd")  # a frame of zstd
    while at >= 0:
        page = bytearray()
        with contextlib.suppress(OSError), pa.CompressedInputStream(pa.BufferReader(data[at:]), "zstd") as stream:
            while byte := stream.read(1):  # more at a time, and what follows the frame would cost its last bytes
                page += byte
        yield f"{key}: page at {at}", bytes(page)
        at = data.find(b"\x28\xb5\x2f\xfd", at + 4)
    file = pq.ParquetFile(io.BytesIO(data))
    statistics = [
        file.metadata.row_group(group).column(column).statistics
        for group in range(file.num_row_groups)
        for column in range(file.metadata.num_columns)
    ]
    yield f"{key}: metadata", f"{file.metadata} {file.metadata.metadata} {file.schema} {statistics}".encode()
    for name in file.schema_arrow.names:
        values = file.read([name])[name].to_pylist()
        yield f"{key}: values of {name}", repr(set(map(str, values))).encode()


def found_canaries(client: S3Client, bucket: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for place, data in every_byte(client, bucket):
        for name, canary in CANARIES.items():
            digits = canary.replace(" ", "").removeprefix("+")
            if canary.encode() in data or (name == "phone" and digits.encode() in data):
                found.setdefault(name, []).append(place)
    return found


def canary_shop(shop: Shop, rewritten: Rewritten, tmp_path: Path) -> Path:
    return rewritten(shop.dataset, tmp_path / "canaries", with_canaries(Dataset.load(shop.dataset).events))


def test_no_canary_of_a_person_is_in_any_byte_of_the_bucket(
    shop: Shop,
    bucket: str,
    client: S3Client,
    rewritten: Rewritten,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    policy = tmp_path / "columns.toml"
    text = DEFAULT.read_text(encoding="utf-8")
    policy.write_text(text.replace("[tables.items]", 'address = { do = "never" }\n[tables.items]'), encoding="utf-8")
    dataset = canary_shop(shop, rewritten, tmp_path)
    assert main(push_command(shop, bucket, dataset, "--policy", str(policy))) == 0
    out = capsys.readouterr()
    assert found_canaries(client, bucket) == {}
    assert not [name for name, canary in CANARIES.items() if canary in out.out + out.err]
    got = replica.fetch(S3Objects(bucket), dataset.name, tmp_path / "in", _quiet())
    log = Dataset.load(got).events
    assert log["query"].drop_nulls().str.contains("shoes please").any()  # scrubbed, and common: it may leave
    assert log["user"].is_null().sum() >= log.height // 6


def test_the_search_for_canaries_finds_each_that_is_let_out(
    shop: Shop,
    bucket: str,
    client: S3Client,
    open_policy: Path,
    rewritten: Rewritten,
    tmp_path: Path,
):
    """The same search, and a policy that leaves everything: users and sessions are the only ones home keeps anyway."""
    policy = tmp_path / "open.toml"
    text = open_policy.read_text(encoding="utf-8")
    policy.write_text(text.replace("[tables.items]", 'address = { do = "leave" }\n[tables.items]'), encoding="utf-8")
    dataset = canary_shop(shop, rewritten, tmp_path)
    assert main(push_command(shop, bucket, dataset, "--policy", str(policy))) == 2  # raw users are refused outright
    assert found_canaries(client, bucket) == {}
    lines = policy.read_text(encoding="utf-8").splitlines()
    kinds = {"user": "user", "session": "session"}
    lines = [
        f'{name} = {{ do = "pseudonymise", as = "{name}" }}' if (name := line.split(" = ")[0]) in kinds else line
        for line in lines
    ]
    policy.write_text("\n".join(lines), encoding="utf-8")
    assert main(push_command(shop, bucket, dataset, "--policy", str(policy))) == 0
    found = found_canaries(client, bucket)
    assert set(found) == {"email", "phone", "address", "context", "rare"}
    kinds_of_places = {place.split(": ")[1].split(" ")[0] for place in found["email"]}
    assert {"page", "values"} <= kinds_of_places
    store = S3Objects(bucket)
    store.put_new("replica/objects/" + CANARIES["user"], b"x")
    client.put_object(Bucket=bucket, Key="tagged", Body=b"", Metadata={"who": CANARIES["session"]})
    assert {"user", "session"} <= set(found_canaries(client, bucket))


# --- cuts -----------------------------------------------------------------------------------------


class Cutter:
    """A TCP proxy before the store that counts bytes of requests and can cut every connection at once."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.uploaded = 0
        self.cut_at: int | None = None
        self.cuts = 0
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._mutex = threading.Lock()
        self._on_cut: Callable[[], None] = lambda: None
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, after: int, on_cut: Callable[[], None] = lambda: None) -> None:
        """Cut everything when this many more bytes have gone up."""
        with self._mutex:
            self._on_cut = on_cut
            self.cut_at = self.uploaded + after

    def disarm(self) -> None:
        with self._mutex:
            self.cut_at = None

    def close(self) -> None:
        self._server.close()
        self._cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
                upstream = socket.create_connection(self._target)
            except OSError:
                return
            pair = (client, upstream)
            with self._mutex:
                self._pairs.add(pair)
            threading.Thread(target=self._pump, args=(client, upstream, pair), kwargs={"up": True}, daemon=True).start()
            threading.Thread(
                target=self._pump, args=(upstream, client, pair), kwargs={"up": False}, daemon=True
            ).start()

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        pair: tuple[socket.socket, socket.socket],
        *,
        up: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if up and (on_cut := self._count(len(data))) is not None:
                    self._cut()
                    on_cut()
                    return
                sink.sendall(data)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._mutex:
            self._pairs.discard(pair)
        for end in pair:
            end.close()

    def _count(self, size: int) -> Callable[[], None] | None:
        """What is to happen now, if this is where the cut is."""
        with self._mutex:
            self.uploaded += size
            if self.cut_at is None or self.uploaded < self.cut_at:
                return None
            self.cut_at = None
            self.cuts += 1
            return self._on_cut

    def _cut(self) -> None:
        with self._mutex:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    # Reset, not a polite end: what is in the buffers is lost. Who reads it at the moment is woken.
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                    end.shutdown(socket.SHUT_RDWR)
                with contextlib.suppress(OSError):
                    end.close()


@pytest.fixture
def cutter(emulator: Emulator) -> Iterator[Cutter]:
    made = Cutter(("127.0.0.1", emulator.port))
    yield made
    made.close()


BYTES_PER_ROW = 205
"""Of 245 random printable characters, compressed."""


def large(shop: Shop, rewritten: Rewritten, target: Path, size: int) -> Path:
    """A data set whose replica has about `size` bytes: no compression makes its queries much smaller."""
    original = Dataset.load(shop.dataset).events
    first = original.filter(pl.col("item").is_not_null()).row(0, named=True)
    draw = np.random.default_rng(7)
    rows = size // BYTES_PER_ROW
    parts = []
    for start in range(0, rows, 200_000):
        count = min(200_000, rows - start)
        letters = draw.integers(33, 126, size=(count, 245), dtype=np.uint8)
        same = {name: pl.repeat(first[name], count, dtype=dtype, eager=True) for name, dtype in SCHEMA.items()}
        part = pl.DataFrame(same).with_columns(
            pl.Series("query", [row.tobytes().decode() for row in letters]),
            (pl.lit(first["timestamp_ms"]) + start + pl.int_range(pl.len())).alias("timestamp_ms"),
            pl.lit("click").cast(SCHEMA["type"]).alias("type"),
        )
        parts.append(part)
    return rewritten(shop.dataset, target, pl.concat(parts))


def _quiet() -> Progress:
    return Progress(io.StringIO())


def run_push(command: list[str], endpoint: str, *, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "workloads.replication", *command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def test_a_push_killed_or_cut_at_any_byte_sends_again_no_more_than_what_was_on_its_way(
    shop: Shop,
    bucket: str,
    cutter: Cutter,
    open_policy: Path,
    rewritten: Rewritten,
    tmp_path: Path,
):
    """By turns the process is killed (SIGKILL) and its connections are reset; bytes are counted on the wire."""
    dataset = large(shop, rewritten, tmp_path / "large", BYTES)
    more = ["--policy", str(open_policy), "--chunk-size", str(CHUNK), "--parallel", str(PARALLEL), "--no-read-back"]
    more += ["--part-size", str(PART)]
    command = push_command(shop, bucket, dataset, *more)
    rng = random.Random(11)
    log = tmp_path / "log"
    step = BYTES // CUTS
    killed = 0
    process = run_push(command, cutter.endpoint, log=log)

    def gone_on_with() -> bool:
        """Whether it is not through yet; started again where it gave up on a store that it could not reach."""
        nonlocal process
        if process.poll() in {2, -signal.SIGKILL}:
            process = run_push(command, cutter.endpoint, log=log)
        return process.returncode is None

    def kill() -> None:
        process.kill()  # whichever runs by then

    for number in range(CUTS):
        cutter.arm(rng.randrange(1, 2 * step), kill if number % 2 else lambda: None)
        while cutter.cut_at is not None and gone_on_with():
            time.sleep(0.01)
        if cutter.cut_at is not None:
            break  # it was through before the next cut
        if number % 2:
            killed += process.wait() == -signal.SIGKILL
    cutter.disarm()
    while gone_on_with():
        time.sleep(0.01)
    assert process.returncode == 0, log.read_text()[-2000:]
    manifest = replica.read_manifest(S3Objects(bucket), dataset.name)
    size = sum(part.bytes for part in manifest.parts)
    again = cutter.uploaded - size
    # LocalStack may make a torso of an upload whose completion is tried twice; the push notices and mends it.
    torsos = log.read_text().count("it is sent again") + log.read_text().count("less of its parts")
    sys.stdout.write(
        f"{torsos} torsos, {size} bytes, {cutter.cuts} cuts ({killed} kills), {again} sent again: "
        f"{again / CHUNK / cutter.cuts:.2f} parts a cut\n"
    )
    assert killed >= CUTS // 4
    assert cutter.cuts >= CUTS // 2
    assert size > BYTES * 0.9
    heads = 64_000 * (cutter.cuts + len(manifest.parts)) + size // 100  # of requests, and their chunked encoding
    assert again <= cutter.cuts * PARALLEL * CHUNK + heads + torsos * 2 * PART
    store = S3Objects(bucket)
    for part in manifest.parts:
        assert hashlib.sha256(store.get(f"replica/objects/sha256/{part.sha256}").data).hexdigest() == part.sha256
    assert not boto3.client("s3").list_multipart_uploads(Bucket=bucket).get("Uploads")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_push_that_is_asked_to_end_says_so_and_goes_on_later(
    shop: Shop, bucket: str, aws: str, number: signal.Signals, tmp_path: Path
):
    command = push_command(shop, bucket, None, "--bandwidth", "100KB/s")
    log = tmp_path / "log"
    process = run_push(command, aws, log=log)
    while b'"upload"' not in (log.read_bytes() if log.exists() else b"") and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) in {128 + number, 0}
    assert b"Traceback" not in log.read_bytes()
    if process.returncode:
        assert replica.replicas(S3Objects(bucket)) == []
    assert main(push_command(shop, bucket)) == 0


def test_a_secret_of_the_environment_is_in_no_line(
    shop: Shop, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    secret = secrets.token_hex(16)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    log = tmp_path / "log"
    process = run_push(push_command(shop, bucket), os.environ["AWS_ENDPOINT_URL"], log=log)
    assert process.wait(60) == 0
    key = (shop.home / "onprem" / "key" / "pseudonym-1.key").read_bytes()
    assert secret.encode() not in log.read_bytes()
    assert key.hex().encode() not in log.read_bytes()
