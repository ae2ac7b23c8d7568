"""Cleaning up never takes what a channel needs, whatever happened before and whatever happens meanwhile."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mortality import ACTOR, Made, Mortal, MortalObjects

from infra.emulator import Emulator
from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.registry import GRACE_MS, NoChannel, NotPublished, Registry, RegistryFault
from workloads.bundle.releases import BUNDLE, DELTA, read_files
from workloads.bundle.signature import sign, signature_path
from workloads.contract.storage import Release, delta_signature_key, manifest_key, object_key, signature_key
from workloads.objects.memory import Crash, MemoryObjects
from workloads.objects.s3 import S3Objects, s3_client

LONG = os.environ.get("RANKBRIDGE_LONG") == "1"
DAY_MS = 24 * 3600 * 1000
START_MS = 1_790_000_000_000


class Clock:
    """One time for the registry and its store."""

    def __init__(self) -> None:
        self.now_ms = START_MS

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(signed: Made, clock: Clock) -> Registry:
    return Registry(MemoryObjects(clock_ms=clock), signed.trust, clock_ms=clock)


@pytest.fixture(scope="session")
def shelf(signed: Made, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Signed bundles that share some files."""
    root = tmp_path_factory.mktemp("shelf")
    made = [build_fake_bundle(root, items=2, seed=seed) for seed in range(4)]
    for bundle in made:
        sign(bundle, signed.key.private)
    return [*made, signed.new]


def _publish(registry: Registry, directory: Path) -> None:
    registry.publish(directory, signature_path(directory), actor=ACTOR)


def _keys(registry: Registry) -> set[str]:
    return {listed.key for listed in registry.objects.list("")}


def test_what_nothing_points_to_goes_and_the_rest_can_still_be_fetched(
    shelf: list[Path], registry: Registry, clock: Clock, tmp_path: Path
) -> None:
    for bundle in shelf[:4]:
        _publish(registry, bundle)
        clock.now_ms += 1000
    registry.promote("stable", Release(bundle=shelf[0].name), ACTOR)
    registry.promote("stable", Release(bundle=shelf[1].name), ACTOR)
    clock.now_ms += 2 * DAY_MS
    planned = registry.gc(1, actor=ACTOR, dry_run=True)
    before = _keys(registry)
    done = registry.gc(1, actor=ACTOR)
    assert planned.bundles == done.bundles == [shelf[2].name]
    assert (planned.objects, planned.bytes) == (done.objects, done.bytes)
    assert done.objects > 0
    assert before - _keys(registry) >= {signature_key(shelf[2].name), manifest_key(shelf[2].name)}
    for bundle in (shelf[0], shelf[1], shelf[3]):
        registry.fetch(bundle.name, tmp_path)
    with pytest.raises(NotPublished):
        registry.promote("stable", Release(bundle=shelf[2].name), ACTOR)
    assert registry.gc(1, actor=ACTOR).objects == 0
    _publish(registry, shelf[2])
    registry.fetch(shelf[2].name, tmp_path)


def test_what_is_younger_than_the_grace_period_stays(signed: Made, registry: Registry, clock: Clock) -> None:
    registry.objects.put_new(object_key("0" * 64), b"of a publish in progress")
    _publish(registry, signed.new)
    clock.now_ms += GRACE_MS
    assert registry.gc(0, actor=ACTOR).objects == 0
    clock.now_ms += 1
    done = registry.gc(0, actor=ACTOR)
    assert done.bundles == [signed.new.name]
    assert _keys(registry) == set()


def test_deltas_live_as_long_as_their_bundle_and_chain(signed: Made, registry: Registry, clock: Clock) -> None:
    _publish(registry, signed.new)
    _publish(registry, signed.old)
    registry.publish_delta(signed.delta, signature_path(signed.delta), actor=ACTOR)
    delta = signed.delta.name.split("-")[1]
    registry.promote("stable", Release(bundle=signed.new.name, deltas=[delta]), ACTOR)
    registry.promote("stable", signed.old_release, ACTOR)
    clock.now_ms += 2 * DAY_MS
    assert registry.gc(0, actor=ACTOR).deltas == []
    assert registry.rollback("stable", ACTOR).current.deltas == [delta]
    registry.promote("stable", signed.old_release, ACTOR)
    registry.promote("stable", Release(bundle=signed.new.name), ACTOR)  # the bundle is used, its delta by nobody
    clock.now_ms += 2 * DAY_MS
    assert registry.gc(0, actor=ACTOR).deltas == []
    registry.channels.promote("stable", signed.old_release, ACTOR)
    registry.channels.promote("stable", Release(bundle="f" * 64), ACTOR)
    clock.now_ms += 2 * DAY_MS
    done = registry.gc(0, actor=ACTOR)
    assert (done.bundles, done.deltas) == ([signed.new.name], [delta])


def test_a_pointer_that_cannot_be_read_stops_the_cleaning(signed: Made, registry: Registry, clock: Clock) -> None:
    _publish(registry, signed.new)
    registry.objects.put_new("channels/stable.json", b"{")
    clock.now_ms += 2 * DAY_MS
    before = _keys(registry)
    with pytest.raises(RegistryFault, match="no pointer"):
        registry.gc(0, actor=ACTOR)
    assert _keys(registry) == before


class _Meanwhile(MemoryObjects):
    """A store in which something happens right before a chosen call."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock_ms=clock)
        self.count = 0
        self.when = 0
        self.what: Callable[[], None] = lambda: None

    def _call(self, name: str, key: str, run: Callable[[bool], Any]) -> Any:  # noqa: ANN401 - as the call's own
        self.count += 1
        if self.count == self.when:
            self.when = 0
            self.what()
        return super()._call(name, key, run)


def _all_old(signed: Made, clock: Clock) -> tuple[_Meanwhile, Registry]:
    objects = _Meanwhile(clock)
    registry = Registry(objects, signed.trust, clock_ms=clock, parallel=1)
    _publish(registry, signed.old)
    _publish(registry, signed.new)
    registry.promote("stable", signed.old_release, ACTOR)
    clock.now_ms += 2 * DAY_MS
    objects.count = 0
    return objects, registry


def test_a_promotion_in_the_middle_of_a_cleaning_finds_all_or_is_refused(signed: Made, clock: Clock) -> None:
    objects, registry = _all_old(signed, clock)
    registry.gc(0, actor=ACTOR)
    calls = objects.count
    ended = set()
    for when in range(1, calls + 1):
        objects, registry = _all_old(signed, clock)

        def promote(registry: Registry = registry) -> None:
            try:
                registry.promote("stable", signed.new_release, "meanwhile")
                ended.add("promoted")
            except NotPublished:
                ended.add("refused")

        objects.what, objects.when = promote, when
        registry.gc(0, actor=ACTOR)
        pointer, _ = registry.pointer("stable")
        assert registry.promote("stable", pointer.current, "checks that all is there") == pointer, when
    assert ended == {"promoted", "refused"}


def test_a_publish_in_the_middle_of_a_cleaning_is_whole_afterwards(signed: Made, clock: Clock) -> None:
    objects, registry = _all_old(signed, clock)
    registry.gc(0, actor=ACTOR)
    for when in range(1, objects.count + 1):
        objects, registry = _all_old(signed, clock)
        objects.what, objects.when = lambda registry=registry: _publish(registry, signed.new), when
        registry.gc(0, actor=ACTOR)
        # Whatever the cleaning had taken by then, the publisher brought again; what it had in mind, it left.
        assert registry.promote("stable", signed.new_release, ACTOR).sequence == 2, when


def test_a_cleaning_that_is_killed_at_any_step_leaves_each_bundle_whole_or_unpublished(
    signed: Made, mortal: Mortal
) -> None:
    clock = Clock()

    def begin() -> Registry:
        mortal.live()
        objects = MortalObjects(mortal)
        objects._clock_ms = clock
        registry = Registry(objects, signed.trust, clock_ms=clock, parallel=1)
        for bundle in (signed.old, signed.new):
            _publish(registry, bundle)
        registry.promote("stable", signed.old_release, ACTOR)
        clock.now_ms += 2 * DAY_MS
        return registry

    registry = begin()
    mortal.live()
    registry.gc(0, actor=ACTOR)
    total, clean = len(mortal.steps), _keys(registry)
    for step in range(1, total + 1):
        registry = begin()
        mortal.live(step, after=True)
        with pytest.raises(Crash):
            registry.gc(0, actor=ACTOR)
        mortal.live()
        keys = _keys(registry)
        pointer, _ = registry.pointer("stable")
        assert registry.promote("stable", pointer.current, "checks") == pointer
        if signature_key(signed.new.name) in keys:
            registry.promote("canary", signed.new_release, "checks")
            registry.objects.delete("channels/canary.json")
            clock.now_ms += 2 * DAY_MS
        registry.gc(0, actor=ACTOR)
        assert _keys(registry) == clean


Step = tuple[str, int, int]
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("promote"), st.integers(0, 4), st.integers(0, 1)),
        st.tuples(st.just("delta"), st.just(4), st.integers(0, 1)),
        st.tuples(st.just("rollback"), st.just(0), st.integers(0, 1)),
        st.tuples(st.just("wait"), st.integers(1, 60), st.just(0)),
        st.tuples(st.just("gc"), st.integers(0, 3), st.just(0)),
    ),
    min_size=4,
    max_size=20,
)


def _reachable(registry: Registry) -> Iterator[Release]:
    for pointer in registry.channels.all():
        yield pointer.current
        if pointer.previous:
            yield pointer.previous


def _needed(registry: Registry, release: Release) -> set[str]:
    """Every key of a release; looking changes nothing."""
    keys = {signature_key(release.bundle), *(delta_signature_key(delta) for delta in release.deltas)}
    for form, identity in ((BUNDLE, release.bundle), *((DELTA, delta) for delta in release.deltas)):
        files = read_files(registry.objects, form, identity)
        assert files is not None, identity
        keys |= {form.manifest_key(identity), *(object_key(entry.sha256) for entry in files.files.values())}
    return keys


@settings(max_examples=500 if LONG else 25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_STEPS)
def test_whatever_was_done_all_that_a_channel_reaches_is_there(
    signed: Made, shelf: list[Path], steps: list[Step]
) -> None:
    clock = Clock()
    registry = Registry(MemoryObjects(clock_ms=clock), signed.trust, clock_ms=clock, parallel=1)
    delta = signed.delta.name.split("-")[1]
    for bundle in shelf:
        _publish(registry, bundle)
    for what, first, second in [*steps, ("wait", 48, 0), ("gc", 0, 0)]:
        channel = ("stable", "canary")[second]
        try:
            match what:
                case "publish":
                    _publish(registry, shelf[first])
                case "promote":
                    registry.promote(channel, Release(bundle=shelf[first].name), ACTOR)
                case "delta":
                    registry.publish_delta(signed.delta, signature_path(signed.delta), actor=ACTOR)
                    registry.promote(channel, Release(bundle=signed.new.name, deltas=[delta]), ACTOR)
                case "rollback":
                    registry.rollback(channel, ACTOR)
                case "wait":
                    clock.now_ms += first * 3600 * 1000
                case "gc":
                    registry.gc(first, actor=ACTOR)
        except (NotPublished, NoChannel):
            continue
        except RegistryFault as fault:
            if "one release only" not in fault.fault:
                raise
        there = _keys(registry)
        for release in _reachable(registry):
            assert _needed(registry, release) <= there, what


@pytest.mark.real_parts
def test_object_lock_is_reported_with_its_end_and_the_bundle_stays_whole(
    signed: Made, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (
        ("AWS_ENDPOINT_URL", emulator.endpoint),
        ("AWS_DEFAULT_REGION", "eu-central-1"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
    ):
        monkeypatch.setenv(name, value)
    client = s3_client()
    location: Any = {"LocationConstraint": "eu-central-1"}
    client.create_bucket(Bucket="registry-locked", ObjectLockEnabledForBucket=True, CreateBucketConfiguration=location)
    client.put_object_lock_configuration(
        Bucket="registry-locked",
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 3}},
        },
    )
    registry = Registry(S3Objects("registry-locked", client), signed.trust)
    _publish(registry, signed.new)
    two_days_on = Registry(
        registry.objects,
        signed.trust,
        clock_ms=lambda: int(datetime.datetime.now(datetime.UTC).timestamp() * 1000) + 2 * DAY_MS,
    )
    done = two_days_on.gc(0, actor=ACTOR)
    assert (done.bundles, done.objects) == ([], 0)
    assert [one.key for one in done.kept] == [signature_key(signed.new.name)]
    assert "Object Lock" in done.kept[0].reason
    ahead = (done.kept[0].until_ms or 0) / 1000 - datetime.datetime.now(datetime.UTC).timestamp()
    assert 2.9 * 86400 < ahead < 3.1 * 86400
    registry.fetch(signed.new.name, tmp_path)
