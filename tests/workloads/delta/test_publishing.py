"""A delta goes on top of the very release that it stands on, or the publisher is told what is there."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest

from workloads.bundle.channels import ChannelConflict, NoChannel
from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.registry import Registry
from workloads.bundle.signature import SignatureFault, Trust, make_key, sign, signature_path, verify_signature
from workloads.bundle.store import BundleFault, open_bundle
from workloads.contract.storage import ChannelPointer, Release
from workloads.delta.making import MakeFault, make
from workloads.delta.publishing import Publisher, Superseded
from workloads.objects.memory import Crash, Kind, MemoryObjects
from workloads.telemetry.progress import Progress

NOW = 1_795_000_000_000


class Shop:
    """A registry with a bundle on `stable`, and a publisher who may add to it."""

    def __init__(self, made: Path, scratch: Path) -> None:
        self.scratch = scratch
        self.key = make_key(scratch / "signing" / "publisher.key")
        self.trust = Trust.of(self.key)
        self.bundle = Path(shutil.copytree(made, scratch / "bundles" / made.name))
        self.signature = sign(self.bundle, self.key.private)
        self.notes = io.StringIO()
        self.open()

    def open(self) -> None:
        """An empty bucket, and the bundle on the channel."""
        self.objects = MemoryObjects()
        self.registry = Registry(self.objects, self.trust, parallel=1)
        self.registry.publish(self.bundle, self.signature, actor="tester")
        self.registry.promote("stable", Release(bundle=self.bundle.name), "tester")
        self.publisher = Publisher(registry=self.registry, channel="stable", actor="tester", key=self.key.private)

    def file(self, *names: str) -> Path:
        path = self.scratch / f"{'-'.join(names)}.jsonl"
        rows = [{"item": name, "title": f"A {name}", "category": "Garden"} for name in names]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def add(self, *names: str) -> tuple[Path, ChannelPointer]:
        return self.publisher.add(self.file(*names), self.scratch / "work", Progress(self.notes), now_ms=lambda: NOW)

    def make(self, *names: str, on: list[Path] | None = None) -> Path:
        return make(
            self.bundle, on or [], self.file(*names), self.scratch / "made", Progress(self.notes), now_ms=lambda: NOW
        )

    def current(self) -> Release:
        return self.registry.pointer("stable")[0].current


@pytest.fixture
def shop(made: Path, tmp_path: Path) -> Shop:
    return Shop(made, tmp_path)


def test_added_items_are_on_the_channel_signed_and_can_be_fetched_and_opened(shop: Shop, tmp_path: Path):
    _, first = shop.add("a", "b")
    delta, second = shop.add("c")
    assert (first.sequence, second.sequence) == (2, 3)
    assert second.current.deltas[:1] == first.current.deltas
    assert second.previous == first.current, "a rollback takes away the last delta alone"
    site = tmp_path / "site"
    bundle = shop.registry.fetch(second.current.bundle, site / "bundles")
    paths = [
        shop.registry.fetch_delta(identity, site / "deltas", bundle.name, number)
        for number, identity in enumerate(second.current.deltas, 1)
    ]
    assert [path.name for path in paths][1] == delta.name
    assert open_bundle(bundle, paths).item_ids[-3:] == ["a", "b", "c"]
    assert verify_signature(paths[1], signature_path(paths[1]), shop.trust).name == "publisher"


def test_publishing_again_changes_nothing(shop: Shop):
    delta = shop.make("a")
    first = shop.publisher.publish(delta)
    assert shop.publisher.publish(delta) == first


def test_adding_what_is_there_already_is_refused_by_row(shop: Shop):
    shop.add("a")
    with pytest.raises(MakeFault, match="item must be new: the bundle or one of its deltas has it"):
        shop.add("a")
    assert len(shop.current().deltas) == 1


def test_a_delta_that_came_second_is_told_and_add_makes_it_anew(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    mine = shop.make("mine")
    shop.add("theirs")
    with pytest.raises(Superseded, match=r"with 1 deltas, and the delta stands on .* with 0 deltas"):
        shop.publisher.publish(mine)

    publish, raced = Publisher.publish, []

    def late(self: Publisher, delta: Path) -> ChannelPointer:
        if not raced:
            raced.append(shop.make("first", on=_deltas(shop)))
            publish(self, raced[0])
        return publish(self, delta)

    monkeypatch.setattr(Publisher, "publish", late)
    delta, pointer = shop.add("second")
    assert delta.name.startswith("3-")
    assert len(pointer.current.deltas) == 3
    assert "made anew" in shop.notes.getvalue()


def _deltas(shop: Shop) -> list[Path]:
    release = shop.current()
    return [
        shop.registry.fetch_delta(identity, shop.scratch / "work" / "deltas", release.bundle, number)
        for number, identity in enumerate(release.deltas, 1)
    ]


def test_a_bundle_promoted_meanwhile_is_not_taken_back(shop: Shop, tmp_path: Path):
    mine = shop.make("mine")
    newer = build_fake_bundle(tmp_path / "newer", items=40, seed=3)
    shop.registry.publish(newer, sign(newer, shop.key.private), actor="tester")
    shop.registry.promote("stable", Release(bundle=newer.name), "tester")
    with pytest.raises(Superseded, match=newer.name[:12]):
        shop.publisher.publish(mine)
    assert shop.current() == Release(bundle=newer.name)


def test_a_channel_that_moved_and_came_back_is_no_obstacle(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    delta = shop.make("a")
    promote, tries = Registry.promote, []

    def raced(
        self: Registry, channel: str, release: Release, actor: str, *, expect: int | None = None
    ) -> ChannelPointer:
        tries.append(expect)
        if len(tries) == 1:
            raise ChannelConflict(self.pointer(channel)[0])
        return promote(self, channel, release, actor, expect=expect)

    monkeypatch.setattr(Registry, "promote", raced)
    assert len(shop.publisher.publish(delta).current.deltas) == 1
    assert tries == [1, 1]


def test_wherever_the_publisher_dies_the_channel_is_old_or_new_and_again_completes(shop: Shop):
    """Each call to the store in turn, before it and after it."""
    delta = shop.make("a")
    outcomes = []
    for after in (False, True):
        for call in itertools.count(1):
            shop.open()
            signature_path(delta).unlink(missing_ok=True)
            shop.objects.revive({call: Kind.CRASH_AFTER if after else Kind.CRASH_BEFORE})
            try:
                shop.publisher.publish(delta)
            except Crash:
                shop.objects.revive()
                outcomes.append(len(shop.current().deltas))
                assert shop.publisher.publish(delta).current.deltas == [delta.name[2:]]
            else:  # not reached, or asked for what was not there, which kills nobody
                if len(shop.objects.calls) < call:
                    break
    assert len(outcomes) > 20, "the store is asked more often than that"
    assert set(outcomes) == {0, 1}


def test_a_delta_that_was_tampered_with_is_not_published(shop: Shop):
    delta = shop.make("a")
    (delta / "more.md").write_text("x")
    with pytest.raises(BundleFault, match="is not in the manifest"):
        shop.publisher.publish(delta)
    assert shop.current().deltas == []


def test_a_key_that_is_not_trusted_publishes_nothing(shop: Shop, tmp_path: Path):
    stranger = make_key(tmp_path / "stranger" / "publisher.key")
    publisher = Publisher(registry=shop.registry, channel="stable", actor="x", key=stranger.private)
    with pytest.raises(SignatureFault, match="not in"):
        publisher.publish(shop.make("a"))
    assert shop.current().deltas == []


def test_a_channel_that_nothing_was_promoted_to_is_named(shop: Shop):
    publisher = Publisher(registry=shop.registry, channel="canary", actor="x", key=shop.key.private)
    with pytest.raises(NoChannel, match="canary"):
        publisher.publish(shop.make("a"))


def test_a_password_is_never_shown(shop: Shop):
    words = "correct horse"
    publisher = dataclasses.replace(shop.publisher, password=words)
    assert words not in repr(publisher)
