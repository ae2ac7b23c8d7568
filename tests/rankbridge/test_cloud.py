"""The AWS of a rehearsal goes with it; one that somebody else started stays."""

from __future__ import annotations

from typing import Any

import pytest

from rankbridge import cloud
from rankbridge.cloud import Cloud, CloudForm
from rankbridge.layout import Layout
from workloads.contract.sites import AWS


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
    monkeypatch.setattr(cloud, "_local_cloud", lambda *_: (made, fake, 1))
    monkeypatch.setattr(cloud, "s3", lambda _: None)
    monkeypatch.setattr(cloud, "_make_bucket", lambda *_, **__: None)
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
