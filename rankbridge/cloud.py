"""The AWS that a rehearsal goes through: LocalStack, started for it, or whatever the standard AWS settings name.

Workloads are given bucket names and find endpoint, region and credentials in their environment, as they do in
production; this module makes that environment, and on LocalStack the buckets, which elsewhere are the foundation's. It
knows no bundle and no data set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rankbridge.faults import DeskError
from rankbridge.interrupts import shield
from rankbridge.layout import Layout
from workloads.contract.sites import AWS, SiteName

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from infra.emulator import Emulator

DATA_BUCKET: Final = "RANKBRIDGE_DATA_BUCKET"
MODELS_BUCKET: Final = "RANKBRIDGE_MODELS_BUCKET"


class CloudForm(enum.StrEnum):
    """Where the cloud's object store is."""

    LOCALSTACK = "localstack"
    """An AWS on this machine, empty at the start and forgotten at the end."""
    ENVIRONMENT = "environment"
    """What AWS_ENDPOINT_URL, AWS_PROFILE and the like say, with buckets that exist."""


@dataclasses.dataclass(frozen=True)
class Cloud:
    """Two buckets, and the environment in which a process reaches them."""

    data_bucket: str
    models_bucket: str
    settings: Mapping[str, str]
    """Environment variables to set; those of AWS that are not among them are removed."""

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with this cloud in the place of any other that it names."""
        others = {name: value for name, value in base.items() if not (self.settings and name.startswith("AWS_"))}
        return {**others, **self.settings, DATA_BUCKET: self.data_bucket, MODELS_BUCKET: self.models_bucket}


def check(form: CloudForm, environ: Mapping[str, str]) -> list[DeskError]:
    """What speaks against using this cloud, before anything is started."""
    if form is CloudForm.LOCALSTACK:
        from infra.emulator import ENVIRONMENT  # noqa: PLC0415 - commands without a cloud need not wait for infra

        if not (ENVIRONMENT / "bin" / "python").exists():
            remedy = "`make localstack-install`; or name buckets of your own: --aws environment"
            return [DeskError("LocalStack, the AWS on this machine, is not installed", remedy)]
        return []
    missing = [name for name in (DATA_BUCKET, MODELS_BUCKET) if not environ.get(name)]
    if missing:
        return [DeskError(f"--aws environment: {' and '.join(missing)} not set", "name the foundation's two buckets")]
    return []


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a LocalStack of ours runs: at which address, and what its command line begins with."""

    host: str = "127.0.0.1"
    entry: tuple[str, ...] = ()


HERE: Final = Place()


def place(hosts: Mapping[SiteName, str], entries: Mapping[SiteName, tuple[str, ...]]) -> Place:
    """Of the sites' places, the cloud's."""
    return Place(hosts[AWS.name], entries[AWS.name]) if AWS.name in hosts else HERE


def environment(form: CloudForm, layout: Layout, base: Mapping[str, str], where: Place = HERE) -> dict[str, str]:
    """`base` with what a process needs to reach a cloud that is up."""
    if form is CloudForm.ENVIRONMENT:
        return dict(base)
    return _local_cloud(layout, where)[0].environment(base)


@contextlib.contextmanager
def opened(form: CloudForm, layout: Layout, *, keep: bool = False, where: Place = HERE) -> Iterator[Cloud]:
    """The cloud for as long as it is needed. With `keep`, a LocalStack that was started stays.

    Raises DeskError. A LocalStack that ran already (`make localstack`) is used and left running.
    """
    if form is CloudForm.ENVIRONMENT:
        yield Cloud(os.environ[DATA_BUCKET], os.environ[MODELS_BUCKET], {})
        return
    with _localstack(layout, keep=keep, where=where) as cloud:
        yield cloud


@contextlib.contextmanager
def _localstack(layout: Layout, *, keep: bool, where: Place) -> Iterator[Cloud]:
    from infra.emulator import EmulatorError  # noqa: PLC0415 - as in `check`

    cloud, emulator, declared = _local_cloud(layout, where)
    ours = _home(layout, where) / "rehearsal"
    ran = emulator.pid() is not None and emulator.healthy() and not _is_noted(ours, emulator.pid())
    try:
        emulator.start()
    except EmulatorError as error:
        raise DeskError(str(error), "see the lines above; `--aws environment` goes without it") from error
    if keep:
        ours.unlink(missing_ok=True)
    elif not ran:
        # For the next rehearsal, if this one is killed: nobody else would end it.
        ours.parent.mkdir(parents=True, exist_ok=True)
        ours.write_text(f"{emulator.pid()}\n")
    try:
        _declare(cloud, declared)
        yield cloud
    finally:
        if not ran and not keep:
            with shield():
                emulator.stop()
                ours.unlink(missing_ok=True)


def _is_noted(note: Path, pid: int | None) -> bool:
    """Whether a rehearsal noted that it started this very process."""
    with contextlib.suppress(OSError):
        return note.read_text().strip() == str(pid)
    return False


@dataclasses.dataclass(frozen=True)
class _Declared:
    """What `infra.storage` declares around the two buckets."""

    data_key: str
    """Alias of the KMS key that encrypts the bucket of data."""
    models_key: str
    parameter: str
    """SSM parameter that names the buckets."""
    lock_days: int
    """For so long published models are locked."""


def _local_cloud(layout: Layout, where: Place = HERE) -> tuple[Cloud, Emulator, _Declared]:
    """The LocalStack of this home of state, up or not, and what is declared for it."""
    from infra import config, stackfile  # noqa: PLC0415 - as in `check`
    from infra.emulator import PORT, STACK, Emulator, throw_away_secrets  # noqa: PLC0415
    from infra.iam import DataClass, Scope  # noqa: PLC0415

    secrets = throw_away_secrets()
    plan = config.read(STACK, stackfile.values(STACK) | secrets, frozenset(secrets))
    scope = Scope(plan.names, plan.account)
    home = _home(layout, where)
    # In a network of its own the usual port is free.
    emulator = Emulator(home, PORT if where.entry else _port(home), host=where.host, entry=where.entry)
    settings = {
        "AWS_ENDPOINT_URL": emulator.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": plan.storage.region,
        # Nothing of the operator's own AWS is read, and no metadata service is asked for.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    cloud = Cloud(scope.bucket(DataClass.DATA), scope.bucket(DataClass.MODELS), settings)
    declared = _Declared(
        data_key=scope.key_alias(DataClass.DATA.value),
        models_key=scope.key_alias(DataClass.MODELS.value),
        parameter=plan.names.path("buckets"),
        lock_days=plan.storage.lock_days,
    )
    return cloud, emulator, declared


def _home(layout: Layout, where: Place) -> Path:
    """One in a network of its own is another than the one on loopback."""
    return layout.home / ("localstack-netns" if where.entry else "localstack")


def stop_localstack(layout: Layout) -> bool:
    """End the LocalStack of this home of state, if it runs; whether it did."""
    home = layout.home / "localstack"
    if not (home / "pid").exists():
        return False
    from infra.emulator import Emulator  # noqa: PLC0415 - as in `check`

    emulator = Emulator(home, _port(home))
    ran = emulator.pid() is not None
    emulator.stop()
    return ran


def s3(cloud: Cloud) -> S3Client:
    """A client of this cloud's object store, for the desk itself."""
    client: S3Client = _client(cloud, "s3")
    return client


def _client(cloud: Cloud, service: str) -> Any:  # noqa: ANN401 - boto3 makes its clients' types at run time
    import boto3  # noqa: PLC0415 - half a second, for commands that need it
    from botocore.config import Config  # noqa: PLC0415

    settings = cloud.settings
    return boto3.client(  # type: ignore[call-overload]  # stubs of S3 only
        service,
        endpoint_url=settings.get("AWS_ENDPOINT_URL"),
        region_name=settings.get("AWS_DEFAULT_REGION"),
        aws_access_key_id=settings.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=settings.get("AWS_SECRET_ACCESS_KEY"),
        config=Config(retries={"max_attempts": 3, "mode": "standard"}),
    )


def _declare(cloud: Cloud, declared: _Declared) -> None:
    """Both buckets, their keys and the parameter that names them, as `infra.storage` declares them."""
    region = cloud.settings["AWS_DEFAULT_REGION"]
    objects, keys = s3(cloud), _client(cloud, "kms")
    data_key, models_key = _make_key(keys, declared.data_key), _make_key(keys, declared.models_key)
    _make_bucket(objects, cloud.data_bucket, region, key=data_key, lock_days=None)
    _make_bucket(objects, cloud.models_bucket, region, key=models_key, lock_days=declared.lock_days)
    names = json.dumps({"data": cloud.data_bucket, "models": cloud.models_bucket}, sort_keys=True)
    _client(cloud, "ssm").put_parameter(Name=declared.parameter, Value=names, Type="String", Overwrite=True)


def _make_key(keys: Any, alias: str) -> str:  # noqa: ANN401 - as in `_client`
    """ARN of the key behind an alias, made where there is none."""
    try:
        return str(keys.describe_key(KeyId=alias)["KeyMetadata"]["Arn"])
    except keys.exceptions.NotFoundException:
        made = keys.create_key(Description=alias)["KeyMetadata"]
    keys.create_alias(AliasName=alias, TargetKeyId=made["KeyId"])
    return str(made["Arn"])


def _make_bucket(client: S3Client, bucket: str, region: str, *, key: str, lock_days: int | None) -> None:
    """A bucket, unless it is there: versioned, encrypted with a key, and locked where models are kept."""
    held = {one.get("Name") for one in client.list_buckets()["Buckets"]}
    if bucket in held:
        return
    client.create_bucket(
        Bucket=bucket,
        ObjectLockEnabledForBucket=lock_days is not None,
        CreateBucketConfiguration={"LocationConstraint": region},  # type: ignore[typeddict-item]  # any region's name
    )
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    client.put_bucket_encryption(
        Bucket=bucket,
        ServerSideEncryptionConfiguration={
            "Rules": [
                {
                    "ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key},
                    "BucketKeyEnabled": True,
                }
            ]
        },
    )
    if lock_days is not None:
        client.put_object_lock_configuration(
            Bucket=bucket,
            ObjectLockConfiguration={
                "ObjectLockEnabled": "Enabled",
                "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": lock_days}},
            },
        )


def _port(home: Path) -> int:
    """The port of the LocalStack that runs from `home`, else the usual one where it is free, else any that is."""
    from infra.emulator import PORT, Emulator  # noqa: PLC0415 - as in `check`

    noted = home / "port"
    with contextlib.suppress(OSError, ValueError):
        port = int(noted.read_text())
        if Emulator(home, port).pid() is not None:
            return port
    if Emulator(home, PORT).pid() is not None:
        return PORT
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", PORT))
        except OSError:
            trial.bind(("127.0.0.1", 0))
        port = int(trial.getsockname()[1])
    home.mkdir(parents=True, exist_ok=True)
    noted.write_text(f"{port}\n")
    return port
