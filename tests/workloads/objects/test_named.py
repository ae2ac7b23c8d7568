"""A bucket's name from SSM and a password from Secrets Manager, on LocalStack with the code of production."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.signature import SignatureFault, Trust, make_key, sign, signature_path, verify_signature
from workloads.objects.named import bucket_name, password
from workloads.objects.s3 import S3Objects, s3_client
from workloads.objects.store import Denied, ObjectsError, Unavailable

pytestmark = [pytest.mark.real_parts, pytest.mark.usefixtures("aws")]


def _client(service: str) -> Any:  # noqa: ANN401 - boto3 makes its clients' types at run time
    return boto3.session.Session().client(service)


@pytest.fixture
def parameter() -> str:
    """As the foundation writes it."""
    name = f"/rankbridge/{uuid.uuid4().hex[:8]}/buckets"
    value = json.dumps({"data": "the-data", "models": "the-models"})
    _client("ssm").put_parameter(Name=name, Value=value, Type="String")
    return name


@pytest.fixture
def secret() -> str:
    name = f"rankbridge/{uuid.uuid4().hex[:8]}"
    _client("secretsmanager").create_secret(Name=name, SecretString="correct horse")
    return name


def test_a_bucket_is_found_by_the_parameter_that_the_foundation_writes(parameter: str):
    assert bucket_name(f"ssm:{parameter}#data") == "the-data"
    assert bucket_name(f"ssm:{parameter}#models") == "the-models"
    assert bucket_name("a-bucket") == "a-bucket"


def test_a_parameter_without_an_entry_is_the_name_itself(parameter: str):
    _client("ssm").put_parameter(Name=parameter, Value="just-one", Type="String", Overwrite=True)
    assert bucket_name(f"ssm:{parameter}") == "just-one"
    with pytest.raises(Denied, match=f"{parameter} has no entry 'data'"):
        bucket_name(f"ssm:{parameter}#data")


def test_a_parameter_or_an_entry_that_is_not_there_is_no_missing_object(parameter: str):
    """Or a channel of a bucket that nobody knows would read as one that nothing was promoted to."""
    with pytest.raises(Denied, match="has no entry 'logs'"):
        bucket_name(f"ssm:{parameter}#logs")
    with pytest.raises(Denied, match="/nobody/buckets is not in this account"):
        S3Objects("ssm:/nobody/buckets#models").get("channels/stable.json")


def test_a_store_asks_for_its_buckets_name_when_it_is_used_and_not_before(
    parameter: str, aws: str, monkeypatch: pytest.MonkeyPatch
):
    """An agent starts while the cloud is away, and reads its channel once that is back."""
    name = f"named-{uuid.uuid4().hex[:8]}"
    s3_client().create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    _client("ssm").put_parameter(Name=parameter, Value=json.dumps({"models": name}), Type="String", Overwrite=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSM", "http://127.0.0.1:9")
    objects = S3Objects(f"ssm:{parameter}#models")
    with pytest.raises(Unavailable, match=parameter):
        objects.put_new("k", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSM", aws)
    assert not objects.put_new("k", b"1").existed
    assert s3_client().get_object(Bucket=name, Key="k")["Body"].read() == b"1"


def test_a_password_is_read_from_the_secret_that_is_named_and_else_is_itself(secret: str):
    assert password(f"secretsmanager:{secret}") == "correct horse"
    assert password("plain") == "plain"
    assert password(None) is None


def test_a_secret_that_is_not_there_or_no_text_is_told_and_shows_nothing(secret: str):
    with pytest.raises(Denied, match="the secret nobody/knows is not in this account"):
        password("secretsmanager:nobody/knows")
    _client("secretsmanager").put_secret_value(SecretId=secret, SecretBinary=b"\xffhidden")
    with pytest.raises(Denied, match="holds bytes") as caught:
        password(f"secretsmanager:{secret}")
    assert "hidden" not in f"{caught.value} {caught.value.remedy}"


def test_a_key_under_a_password_of_secrets_manager_signs_and_another_password_does_not(secret: str, tmp_path: Path):
    key = make_key(tmp_path / "publisher.key", password=password(f"secretsmanager:{secret}"))
    bundle = build_fake_bundle(tmp_path / "bundles", items=4, seed=1)
    sign(bundle, key.private, password=password(f"secretsmanager:{secret}"))
    assert verify_signature(bundle, signature_path(bundle), Trust.of(key)).fingerprint == key.fingerprint
    _client("secretsmanager").put_secret_value(SecretId=secret, SecretString="another")
    with pytest.raises(SignatureFault, match="cannot be opened"):
        sign(bundle, key.private, password=password(f"secretsmanager:{secret}"))


@pytest.mark.parametrize(
    "ask", [lambda: S3Objects("models"), lambda: bucket_name("ssm:/x"), lambda: password("secretsmanager:x")]
)
def test_a_profile_that_is_not_there_is_a_fault_with_the_remedy(
    ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_PROFILE", "misspelt")
    with pytest.raises(ObjectsError, match=r"profile \(misspelt\) could not be found") as caught:
        ask()
    assert "AWS_PROFILE" in caught.value.remedy


def test_a_credential_process_that_fails_is_a_fault_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As aws_signing_helper fails once its certificate has expired: nothing is wrong with the way to the store."""
    config = tmp_path / "config"
    config.write_text("[profile anywhere]\ncredential_process = /bin/false\nregion = eu-central-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "anywhere")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Denied, match="custom-process") as caught:
        S3Objects("models").get("k")
    assert "AWS_PROFILE" in caught.value.remedy


def test_a_credential_process_that_works_is_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The form in which Roles Anywhere gives credentials, here from a program of the test's own."""
    program = tmp_path / "helper"
    answer = {"Version": 1, "AccessKeyId": "test", "SecretAccessKey": "test"}
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(answer)}\nEND\n")
    program.chmod(0o755)
    config = tmp_path / "config"
    config.write_text(f"[profile anywhere]\ncredential_process = {program}\nregion = eu-central-1\n")
    name = f"anywhere-{uuid.uuid4().hex[:8]}"
    s3_client().create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "anywhere")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert not S3Objects(name).put_new("k", b"1").existed
