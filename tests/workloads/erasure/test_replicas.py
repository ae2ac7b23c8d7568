"""Replicas in a bucket that keeps versions: what names a person goes, every version of it, and nothing else."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import boto3
import polars as pl
import pytest

from infra.emulator import Emulator
from workloads.contract.storage import replica_object_key
from workloads.erasure.places import PlaceError, Replicas
from workloads.objects.memory import MemoryObjects
from workloads.objects.s3 import S3Objects

BUCKET = "erasure-replicas"
PERSON, OTHER = f"p1-{'a' * 32}", f"p1-{'b' * 32}"


def part(user: str | None, **columns: object) -> bytes:
    file = io.BytesIO()
    pl.DataFrame({"user": pl.Series([user], dtype=pl.String), **columns}).write_parquet(file)
    return file.getvalue()


def key_of(data: bytes) -> str:
    return replica_object_key(hashlib.sha256(data).hexdigest())


@pytest.mark.real_parts
def test_every_version_of_a_part_that_names_the_person_goes(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in (
        ("AWS_ENDPOINT_URL", emulator.endpoint),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "eu-central-1"),
    ):
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    theirs, others, items = part(PERSON), part(OTHER), part(None, item="a")
    for data in (theirs, others, items, theirs):
        client.put_object(Bucket=BUCKET, Key=key_of(data), Body=data)
    place = Replicas(tmp_path, S3Objects(BUCKET))
    assert place.remove({PERSON}) == 1
    assert place.remove({PERSON}) == 0
    left = client.list_object_versions(Bucket=BUCKET)
    assert {version["Key"] for version in left.get("Versions", [])} == {key_of(others), key_of(items)}
    assert left.get("DeleteMarkers", []) == []


def test_parts_that_are_packed_at_home_go_with_the_uploads_that_were_begun(tmp_path: Path):
    store, data = MemoryObjects(), part(PERSON)
    key = key_of(data)
    folder = tmp_path / "onprem" / "replication" / "simulator-0123456789ab-cdef01234567"
    other = tmp_path / "onprem" / "replication" / "simulator-ba9876543210-cdef01234567"
    for each, content in ((folder, data), (other, part(OTHER))):
        each.mkdir(parents=True)
        (each / f"{hashlib.sha256(content).hexdigest()}.parquet").write_bytes(content)
    upload = store.begin(key)
    store.put_part(key, upload, 1, data)
    assert Replicas(tmp_path, store).remove({PERSON}) == 1
    assert not folder.exists()
    assert other.exists()
    assert list(store.uploads(key)) == []


def test_a_push_that_is_running_is_waited_for(tmp_path: Path):
    room = tmp_path / "onprem" / "replication"
    folder = room / "simulator-0123456789ab-cdef01234567"
    folder.mkdir(parents=True)
    (folder / "part.draft").write_bytes(b"half a file")
    place = Replicas(tmp_path, MemoryObjects())
    with (
        place._no_push("simulator-0123456789ab"),
        pytest.raises(PlaceError, match="simulator-0123456789ab is being replicated; wait for the push"),
    ):
        place.remove({PERSON})
    assert place.remove({PERSON}) == 1


def test_what_cannot_be_read_may_name_the_person(tmp_path: Path):
    store = MemoryObjects()
    store.plant(replica_object_key("0" * 64), b"no Parquet at all")
    assert Replicas(tmp_path, store).remove({PERSON}) == 1
    assert list(store.keys()) == []
