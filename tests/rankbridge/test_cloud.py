"""The AWS of a rehearsal goes with it; one that somebody else started stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from infra.emulator import Emulator
from rankbridge import cloud
from rankbridge.cloud import Cloud, CloudForm
from rankbridge.layout import Layout
from workloads.contract.sites import AWS
from workloads.objects.s3 import S3Objects

DECLARED = cloud._Declared(
    data_key="alias/desk-data", models_key="alias/desk-models", parameter="/rankbridge/desk/buckets", lock_days=1
)


class FakeLocalStack:
    """One LocalStack, as `infra.emulator.Emulator` tells of it."""

    def __init__(self) -> None:
        self.running: int | None = None
        self._next = 100

    def pid(self) -> int | None:
        return self.running

    def healthy(self) -> bool:
        return self.running is not None

    def start(self) -> None:
        if self.running is None:
            self._next += 1
            self.running = self._next

    def stop(self) -> None:
        self.running = None


@pytest.fixture
def localstack(monkeypatch: pytest.MonkeyPatch) -> FakeLocalStack:
    fake = FakeLocalStack()
    made = Cloud("data", "models", {"AWS_DEFAULT_REGION": "eu-central-1"})
    monkeypatch.setattr(cloud, "_local_cloud", lambda *_: (made, fake, DECLARED))
    monkeypatch.setattr(cloud, "_declare", lambda *_: None)
    return fake


def _rehearse(layout: Layout, *, keep: bool = False, killed: bool = False) -> None:
    opened: Any = cloud.opened(CloudForm.LOCALSTACK, layout, keep=keep)
    opened.__enter__()
    if killed:
        _KILLED.append(opened)
    else:
        opened.__exit__(None, None, None)


_KILLED: list[Any] = []
"""Rehearsals that never came to their end; kept, or they would be ended by the collector."""


@pytest.fixture(autouse=True)
def buried() -> Iterator[None]:
    """After the test nobody looks any more, and the interpreter's end would be too late: it has no signal handlers."""
    yield
    while _KILLED:
        _KILLED.pop().__exit__(None, None, None)


def test_what_a_rehearsal_started_ends_with_it(localstack: FakeLocalStack, layout: Layout):
    _rehearse(layout)
    assert localstack.running is None


def test_what_ran_before_stays(localstack: FakeLocalStack, layout: Layout):
    localstack.start()
    _rehearse(layout)
    assert localstack.running == 101


def test_what_a_killed_rehearsal_left_ends_with_the_next(localstack: FakeLocalStack, layout: Layout):
    _rehearse(layout, killed=True)
    assert localstack.running == 101
    _rehearse(layout)
    assert localstack.running is None


def test_what_was_started_by_hand_after_a_killed_rehearsal_stays(localstack: FakeLocalStack, layout: Layout):
    _rehearse(layout, killed=True)
    localstack.stop()
    localstack.start()
    _rehearse(layout)
    assert localstack.running == 102


def test_what_is_to_stay_stays_also_with_the_next_rehearsal(localstack: FakeLocalStack, layout: Layout):
    _rehearse(layout, killed=True)
    _rehearse(layout, keep=True)
    assert localstack.running == 101
    _rehearse(layout)
    assert localstack.running == 101


def test_in_a_network_of_its_own_localstack_has_that_address_and_a_home_apart(layout: Layout):
    where = cloud.place({AWS.name: "10.220.1.10"}, {AWS.name: ("nsenter", "--net=/run/netns/x", "--")})
    settings = cloud.environment(cloud.CloudForm.LOCALSTACK, layout, {}, where)
    assert settings["AWS_ENDPOINT_URL"] == "http://10.220.1.10:4566"
    assert cloud.place({}, {}) == cloud.HERE
    assert not (layout.home / "localstack").exists()


@pytest.mark.real_parts
def test_its_buckets_are_those_that_the_foundation_declares(
    emulator: Emulator, layout: Layout, monkeypatch: pytest.MonkeyPatch
):
    fake = FakeLocalStack()
    settings = {
        "AWS_ENDPOINT_URL": emulator.endpoint,
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    made = Cloud("desk-data", "desk-models", settings)
    monkeypatch.setattr(cloud, "_local_cloud", lambda *_: (made, fake, DECLARED))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):  # a LocalStack that stayed has them already
        with cloud.opened(CloudForm.LOCALSTACK, layout) as opened:
            client = cloud.s3(opened)
            held = {}
            for entry in ("data", "models"):
                bucket = S3Objects(f"ssm:{DECLARED.parameter}#{entry}")
                bucket.put_new("k", b"anything")
                held[bucket.bucket] = client.head_object(Bucket=bucket.bucket, Key="k")
    assert held.keys() == {"desk-data", "desk-models"}
    assert {one["ServerSideEncryption"] for one in held.values()} == {"aws:kms"}
    keys = {one["SSEKMSKeyId"] for one in held.values()}
    assert len(keys) == 2  # each class of data has its own
    assert held["desk-models"]["ObjectLockMode"] == "GOVERNANCE"
    assert "ObjectLockMode" not in held["desk-data"]
