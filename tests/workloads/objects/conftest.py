"""Both forms of a bucket: the fake, and S3 on LocalStack."""

from __future__ import annotations

import itertools

import boto3
import pytest

from infra.emulator import Emulator
from workloads.objects.memory import MemoryObjects
from workloads.objects.s3 import S3Objects, s3_client
from workloads.objects.store import ObjectStore

REGION = "eu-central-1"
_NUMBERS = itertools.count(1)


@pytest.fixture
def aws(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> str:
    """The standard AWS configuration, pointed at the emulator; returns its endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", emulator.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    return emulator.endpoint


def make_bucket(*, locked: bool = False) -> str:
    """Versioned and under a key of its own, as the foundation's are."""
    name = f"objects-{next(_NUMBERS)}"
    client = s3_client()
    client.create_bucket(
        Bucket=name, ObjectLockEnabledForBucket=locked, CreateBucketConfiguration={"LocationConstraint": REGION}
    )
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    key = boto3.client("kms").create_key()["KeyMetadata"]["Arn"]
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}}
    client.put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration={"Rules": [rule]})
    if locked:
        client.put_object_lock_configuration(
            Bucket=name,
            ObjectLockConfiguration={
                "ObjectLockEnabled": "Enabled",
                "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}},
            },
        )
    return name


@pytest.fixture(params=["fake", pytest.param("s3", marks=pytest.mark.real_parts)])
def objects(request: pytest.FixtureRequest) -> ObjectStore:
    if request.param == "fake":
        return MemoryObjects()
    request.getfixturevalue("aws")
    return S3Objects(make_bucket())


@pytest.fixture(params=["fake", pytest.param("s3", marks=pytest.mark.real_parts)])
def locked(request: pytest.FixtureRequest) -> ObjectStore:
    """Every version is kept for a day."""
    if request.param == "fake":
        return MemoryObjects(lock_ms=24 * 3600 * 1000)
    request.getfixturevalue("aws")
    return S3Objects(make_bucket(locked=True))
