"""The registry: what is published comes back, what should not be served is refused, and one of many movers wins."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mortality import ACTOR, Made
from onnx import TensorProto, helper

from infra.emulator import Emulator
from workloads.bundle import delta as d
from workloads.bundle import fetching
from workloads.bundle import manifest as m
from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.registry import (
    BundleFault,
    ChannelConflict,
    NoChannel,
    NotPublished,
    Registry,
    RegistryFault,
    SignatureFault,
)
from workloads.bundle.signature import Trust, make_key, sign, signature_path
from workloads.contract.storage import Release, channel_key, manifest_key, object_key, signature_key
from workloads.objects.memory import Kind, MemoryObjects
from workloads.objects.s3 import S3Objects, s3_client
from workloads.objects.store import Damaged, Unavailable

PASSWORD = "correct horse"  # noqa: S105 - of a key that lives for one test


def _content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def _publish(registry: Registry, directory: Path) -> None:
    registry.publish(directory, signature_path(directory), actor=ACTOR)


def _memory(registry: Registry) -> MemoryObjects:
    assert isinstance(registry.objects, MemoryObjects)
    return registry.objects


# there and back


def test_what_is_published_comes_back_byte_for_byte_and_stays_without_the_store(
    signed: Made, registry: Registry, tmp_path: Path
) -> None:
    done = registry.publish(signed.new, signature_path(signed.new), actor=ACTOR)
    assert (done.id, done.existed, done.sent) == (signed.new.name, False, done.bytes)
    fetched = registry.fetch(signed.new.name, tmp_path)
    assert _content(fetched) == _content(signed.new)
    assert signature_path(fetched).read_bytes() == signature_path(signed.new).read_bytes()
    _memory(registry).calls.clear()
    assert registry.fetch(signed.new.name, tmp_path) == fetched
    assert _memory(registry).calls == []


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.integers(2, 40), seed=st.integers(0, 1000), parallel=st.integers(1, 4), part=st.integers(1000, 200_000))
def test_whatever_bundle_goes_out_in_whatever_parts_comes_back_identical(
    signed: Made, tmp_path_factory: pytest.TempPathFactory, items: int, seed: int, parallel: int, part: int
) -> None:
    root = tmp_path_factory.mktemp("any")
    bundle = build_fake_bundle(root / "made", items=items, seed=seed)
    sign(bundle, signed.key.private)
    registry = Registry(MemoryObjects(), signed.trust, parallel=parallel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "PART_BYTES", part)
        _publish(registry, bundle)
        assert _content(registry.fetch(bundle.name, root / "site")) == _content(bundle)


def test_publishing_again_sends_nothing_and_a_second_signature_is_as_good(
    signed: Made, registry: Registry, tmp_path: Path
) -> None:
    _publish(registry, signed.new)
    before = _memory(registry).keys()
    again = registry.publish(
        signed.new, sign(signed.new, signed.key.private, signature=tmp_path / "again.sig"), actor=ACTOR
    )
    assert (again.existed, again.sent) == (True, 0)
    assert _memory(registry).keys() == before


def test_two_bundles_share_the_files_that_are_equal(signed: Made, registry: Registry) -> None:
    _publish(registry, signed.old)
    second = registry.publish(signed.new, signature_path(signed.new), actor=ACTOR)
    same = (signed.new / m.MODEL_CARD).stat().st_size
    assert second.bytes - second.sent >= same


def test_a_delta_comes_back_under_its_bundle_and_number(signed: Made, registry: Registry, tmp_path: Path) -> None:
    registry.publish_delta(signed.delta, signature_path(signed.delta), actor=ACTOR)
    identity = signed.delta.name.split("-")[1]
    fetched = registry.fetch_delta(identity, tmp_path, signed.new.name, 1)
    assert fetched == tmp_path / signed.new.name / f"1-{identity}"
    assert _content(fetched) == _content(signed.delta)
    with pytest.raises(SignatureFault, match="is of 1-"):
        registry.fetch_delta(identity, tmp_path, signed.new.name, 2)
    assert sorted(path.name for path in (tmp_path / signed.new.name).iterdir()) == [
        f"1-{identity}",
        f"1-{identity}.sig",
    ]


def test_a_damaged_copy_is_replaced_and_two_fetchers_at_once_bring_one(
    signed: Made, registry: Registry, tmp_path: Path
) -> None:
    _publish(registry, signed.new)
    there = registry.fetch(signed.new.name, tmp_path)
    (there / "ranker.onnx").write_bytes(b"scratched")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: registry.fetch(signed.new.name, tmp_path), range(4)):
            assert _content(found) == _content(signed.new)
    assert sorted(path.name for path in tmp_path.iterdir()) == [signed.new.name, f"{signed.new.name}.sig"]


def test_a_store_that_fails_in_between_leaves_a_fetch_to_go_on(signed: Made, tmp_path: Path) -> None:
    objects = MemoryObjects()
    registry = Registry(objects, signed.trust, parallel=1)
    _publish(registry, signed.new)
    objects.revive({9: Kind.SLOW_DOWN})
    with pytest.raises(Unavailable, match="503"):
        registry.fetch(signed.new.name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".fetch-{signed.new.name}"]
    objects.revive()
    registry.fetch(signed.new.name, tmp_path)
    files = len(_content(signed.new)) - 1
    assert (
        sum(name == "get_range" for name, _ in objects.calls) == files - 4
    )  # calls 1 to 4 read manifest and signature
    assert sorted(path.name for path in tmp_path.iterdir()) == [signed.new.name, f"{signed.new.name}.sig"]


def test_what_an_interrupted_fetch_left_goes_when_nobody_came_back_for_a_week(
    signed: Made, registry: Registry, tmp_path: Path
) -> None:
    _publish(registry, signed.new)
    for name, days in (("a", 8), ("b", 6)):
        left = tmp_path / f".fetch-{name * 64}"
        (left / "partial").mkdir(parents=True)
        os.utime(left, (time.time() - days * 86400,) * 2)
    registry.fetch(signed.new.name, tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [f".fetch-{'b' * 64}"]


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    signed: Made, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(registry, signed.new)
    full = shutil.disk_usage(tmp_path)._replace(free=fetching.MARGIN_BYTES + 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(RegistryFault, match=r"needs \d+ bytes, and .* has \d+ free"):
        registry.fetch(signed.new.name, tmp_path)
    assert not any(name == "get_range" for name, _ in _memory(registry).calls)


# refused


def _seal(bundle: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """Make the manifest true again after a change: what remains at fault is the form, not a digest."""
    manifest = json.loads((bundle / m.MANIFEST).read_text())
    manifest["files"] = {
        path.relative_to(bundle).as_posix(): {"sha256": m.identity(path.read_bytes()), "size": path.stat().st_size}
        for path in bundle.rglob("*")
        if path.is_file() and path.name != m.MANIFEST
    }
    manifest["feature_schema_sha256"] = manifest["files"][m.FEATURES]["sha256"]
    change(manifest)
    data = json.dumps(manifest).encode()
    (bundle / m.MANIFEST).write_bytes(data)
    return bundle.rename(bundle.with_name(m.identity(data)))


def _plant_published(objects: MemoryObjects, bundle: Path, signature: Path) -> None:
    """Everything into the bucket with no check at all, as somebody who may write there could."""
    for path in bundle.rglob("*"):
        if path.is_file() and path.name != m.MANIFEST:
            objects.plant(object_key(m.identity(path.read_bytes())), path.read_bytes())
    objects.plant(manifest_key(bundle.name), (bundle / m.MANIFEST).read_bytes())
    objects.plant(signature_key(bundle.name), signature.read_bytes())


def _pickle_under_an_onnx_name(bundle: Path) -> None:
    (bundle / "extra.onnx").write_bytes(pickle.dumps({"a": 1}))


def _pickle_by_suffix(bundle: Path) -> None:
    (bundle / "weights.pt").write_bytes(b"anything")


def _overlapping_ranges(bundle: Path) -> None:
    header = {
        name: {"dtype": "U8", "shape": [8], "data_offsets": [begin, begin + 8]} for name, begin in (("a", 0), ("b", 4))
    }
    raw = json.dumps(header).encode()
    (bundle / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(12))


def _weights_outside(bundle: Path) -> None:
    model = onnx.load(bundle / "ranker.onnx")
    tensor = helper.make_tensor("outside", TensorProto.FLOAT, [1], [0.0])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    model.graph.initializer.append(tensor)
    onnx.save(model, bundle / "ranker.onnx")


def _other_hardware(bundle: Path) -> None:
    """A TensorRT plan is made for one GPU; nothing of the kind is in a bundle."""
    (bundle / "ranker.plan").write_bytes(b"ptrt")


@pytest.mark.parametrize(
    ("spoil", "file", "reason"),
    [
        (_pickle_under_an_onnx_name, "extra.onnx", "is a pickle"),
        (_pickle_by_suffix, "weights.pt", "may hold pickles"),
        (_overlapping_ranges, "x.safetensors", "overlaps"),
        (_weights_outside, "ranker.onnx", "outside its file"),
        (_other_hardware, "ranker.plan", "files only"),
    ],
)
def test_a_spoilt_bundle_is_refused_though_it_is_whole_and_rightly_signed(
    signed: Made, tmp_path: Path, spoil: Callable[[Path], None], file: str, reason: str
) -> None:
    copy = Path(shutil.copytree(signed.new, tmp_path / "work" / signed.new.name))
    spoil(copy)
    bundle = _seal(copy)
    sign(bundle, signed.key.private)
    objects = MemoryObjects()
    registry = Registry(objects, signed.trust)
    with pytest.raises(BundleFault, match=reason):
        _publish(registry, bundle)
    assert objects.keys() == []
    _plant_published(objects, bundle, signature_path(bundle))
    with pytest.raises(BundleFault, match=reason) as caught:
        registry.fetch(bundle.name, tmp_path / "site")
    assert caught.value.file == file
    assert list((tmp_path / "site").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"), [("/etc/cron.d/x.md", "absolute"), ("../../x.md", "climbs out"), ("a/../../x.md", "climbs out")]
)
def test_a_path_that_leaves_the_bundle_is_refused_before_a_byte_is_fetched(
    signed: Made, tmp_path: Path, name: str, reason: str
) -> None:
    copy = Path(shutil.copytree(signed.new, tmp_path / "work" / signed.new.name))
    bundle = _seal(copy, lambda manifest: manifest["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    objects = MemoryObjects()
    _plant_published(objects, bundle, sign(bundle, signed.key.private))
    with pytest.raises(BundleFault, match=reason):
        Registry(objects, signed.trust).fetch(bundle.name, tmp_path / "site")
    assert list((tmp_path / "site").iterdir()) == []
    assert not any(name == "get_range" for name, _ in objects.calls)


def test_an_unknown_schema_is_refused(signed: Made, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(signed.new, tmp_path / "work" / signed.new.name))
    bundle = _seal(copy, lambda manifest: manifest.update(schema_version=99))
    objects = MemoryObjects()
    _plant_published(objects, bundle, sign(bundle, signed.key.private))
    with pytest.raises(BundleFault, match="schema version 99"):
        Registry(objects, signed.trust).fetch(bundle.name, tmp_path / "site")
    assert list((tmp_path / "site").iterdir()) == []


@pytest.mark.parametrize("file", sorted(m.REQUIRED))
def test_a_file_that_was_altered_or_cut_in_the_bucket_is_refused_by_name(
    signed: Made, registry: Registry, tmp_path: Path, file: str
) -> None:
    _publish(registry, signed.new)
    data = (signed.new / file).read_bytes()
    key = object_key(m.identity(data))
    for planted, reason in ((data[:-1] + bytes([data[-1] ^ 1]), "was altered"), (data[:-1], "was cut short")):
        _memory(registry).plant(key, planted)
        with pytest.raises(BundleFault, match=reason) as caught:
            registry.fetch(signed.new.name, tmp_path)
        assert caught.value.file == file
        assert list(tmp_path.iterdir()) == []


def test_altered_manifests_and_missing_objects_are_refused(signed: Made, registry: Registry, tmp_path: Path) -> None:
    _publish(registry, signed.new)
    data = (signed.new / m.MANIFEST).read_bytes()
    _memory(registry).plant(manifest_key(signed.new.name), data.replace(b'"auc": 0.7', b'"auc": 0.9'))
    with pytest.raises(Damaged, match="manifests/"):
        registry.fetch(signed.new.name, tmp_path)
    _memory(registry).plant(manifest_key(signed.new.name), data)
    _memory(registry).remove(object_key(m.identity((signed.new / m.ANN).read_bytes())))
    with pytest.raises(NotPublished, match=r"ann\.faiss"):
        registry.fetch(signed.new.name, tmp_path)
    with pytest.raises(NotPublished, match=r"ann\.faiss is missing"):
        registry.promote("stable", signed.new_release, ACTOR)
    with pytest.raises(NoChannel):
        registry.pointer("stable")
    assert list(tmp_path.iterdir()) == []


def test_an_added_file_and_a_link_are_not_published(signed: Made, registry: Registry, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(signed.new, tmp_path / signed.new.name))
    shutil.copy(signature_path(signed.new), signature_path(copy))
    (copy / "notes.md").write_text("hello")
    with pytest.raises(BundleFault, match=r"notes\.md: is not in the manifest"):
        _publish(registry, copy)
    (copy / "notes.md").unlink()
    (copy / "ranker.onnx").unlink()
    (copy / "ranker.onnx").symlink_to(signed.new / "ranker.onnx")
    with pytest.raises(BundleFault, match="symbolic link"):
        _publish(registry, copy)
    assert _memory(registry).keys() == []


def test_a_strangers_signature_is_refused_with_their_fingerprint(
    signed: Made, registry: Registry, tmp_path: Path
) -> None:
    stranger = make_key(tmp_path / "stranger.key")
    signature = sign(signed.new, stranger.private, signature=tmp_path / "x.sig")
    with pytest.raises(SignatureFault, match=stranger.fingerprint):
        registry.publish(signed.new, signature, actor="stranger")
    assert _memory(registry).keys() == []
    _plant_published(_memory(registry), signed.new, signature)
    with pytest.raises(SignatureFault, match=stranger.fingerprint) as caught:
        registry.fetch(signed.new.name, tmp_path / "site")
    assert caught.value.remedy
    with pytest.raises(SignatureFault, match=stranger.fingerprint):
        registry.promote("stable", signed.new_release, ACTOR)
    assert list((tmp_path / "site").iterdir()) == []
    assert not any(name == "get_range" for name, _ in _memory(registry).calls)


def test_a_signature_that_only_claims_a_trusted_key_is_refused(
    signed: Made, registry: Registry, tmp_path: Path
) -> None:
    stranger = make_key(tmp_path / "stranger.key")
    forged = sign(signed.new, stranger.private, signature=tmp_path / "x.sig").read_text()
    _plant_published(_memory(registry), signed.new, signature_path(signed.new))
    claims = forged.replace(stranger.fingerprint, signed.key.fingerprint).encode()
    _memory(registry).plant(signature_key(signed.new.name), claims)
    for ask in (
        lambda: registry.fetch(signed.new.name, tmp_path / "site"),
        lambda: registry.promote("stable", signed.new_release, ACTOR),
        lambda: _publish(registry, signed.new),
    ):
        with pytest.raises(SignatureFault, match="was not made with the key"):
            ask()
    assert list((tmp_path / "site").iterdir()) == []


def test_a_missing_signature_and_anothers_are_refused(signed: Made, registry: Registry, tmp_path: Path) -> None:
    _publish(registry, signed.new)
    _memory(registry).plant(signature_key(signed.new.name), signature_path(signed.old).read_bytes())
    with pytest.raises(SignatureFault, match="is not of"):
        registry.fetch(signed.new.name, tmp_path)
    with pytest.raises(SignatureFault, match="is not of"):
        registry.promote("stable", signed.new_release, ACTOR)
    _memory(registry).remove(signature_key(signed.new.name))
    with pytest.raises(SignatureFault, match="is missing"):
        registry.fetch(signed.new.name, tmp_path)
    with pytest.raises(NotPublished, match="no signature"):
        registry.promote("stable", signed.new_release, ACTOR)
    assert list(tmp_path.iterdir()) == []


def test_what_was_never_published_is_told(signed: Made, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotPublished, match="not in the registry"):
        registry.fetch(signed.new.name, tmp_path)
    with pytest.raises(NotPublished):
        registry.promote("stable", signed.new_release, ACTOR)
    with pytest.raises(RegistryFault, match="begins with 'abc'"):
        registry.resolve("abc")


# channels


def test_a_channel_moves_forward_and_back_by_one_sequence_each(signed: Made, registry: Registry) -> None:
    for bundle in (signed.old, signed.new):
        _publish(registry, bundle)
    with pytest.raises(NoChannel):
        registry.rollback("stable", ACTOR)
    first = registry.promote("stable", signed.old_release, ACTOR)
    assert (first.sequence, first.previous) == (1, None)
    with pytest.raises(RegistryFault, match="one release only"):
        registry.rollback("stable", ACTOR)
    second = registry.promote("stable", signed.new_release, ACTOR)
    assert (second.sequence, second.previous) == (2, signed.old_release)
    assert registry.promote("stable", signed.new_release, "again") == second
    back = registry.rollback("stable", "operator")
    assert (back.sequence, back.current, back.previous, back.left) == (3, signed.old_release, None, signed.new_release)
    assert registry.rollback("stable", "operator again") == back
    assert registry.promote("stable", signed.new_release, ACTOR).sequence == 4
    assert registry.promote("canary", signed.new_release, ACTOR).sequence == 1


def test_a_delta_of_another_bundle_is_not_promoted(signed: Made, registry: Registry) -> None:
    _publish(registry, signed.old)
    _publish(registry, signed.new)
    delta = signed.delta.name.split("-")[1]
    with pytest.raises(NotPublished, match="delta"):
        registry.promote("stable", Release(bundle=signed.new.name, deltas=[delta]), ACTOR)
    registry.publish_delta(signed.delta, signature_path(signed.delta), actor=ACTOR)
    with pytest.raises(RegistryFault, match="is for bundle"):
        registry.promote("stable", Release(bundle=signed.old.name, deltas=[delta]), ACTOR)
    assert registry.promote("stable", Release(bundle=signed.new.name, deltas=[delta]), ACTOR).sequence == 1


@pytest.mark.parametrize("kind", [Kind.RESET, Kind.ERROR])
def test_a_move_whose_answer_is_lost_is_known_by_looking(signed: Made, kind: Kind) -> None:
    objects = MemoryObjects()
    registry = Registry(objects, signed.trust, parallel=1)
    for bundle in (signed.old, signed.new):
        _publish(registry, bundle)
    registry.promote("stable", signed.old_release, ACTOR)
    objects.revive()
    registry.channels.promote("canary", signed.old_release, ACTOR)
    objects.revive({2: kind})  # 1 reads the pointer, 2 replaces it
    move = registry.channels
    if kind is Kind.RESET:
        assert move.promote("stable", signed.new_release, ACTOR).sequence == 2
    else:
        with pytest.raises(Unavailable):
            move.promote("stable", signed.new_release, ACTOR)
        assert registry.pointer("stable")[0].sequence == 1


def test_what_is_nested_too_deep_to_be_read_is_refused_wherever_it_was_put(
    signed: Made, registry: Registry, tmp_path: Path
) -> None:
    deep = b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    for decode in (m.decode, d.decode):
        with pytest.raises(ValueError, match="too deep"):
            decode(deep)
    _publish(registry, signed.new)
    _memory(registry).plant(signature_key(signed.new.name), deep)
    with pytest.raises(SignatureFault, match="is no signature"):
        registry.fetch(signed.new.name, tmp_path)
    assert [one.signer for one in registry.list()] == [None]
    _memory(registry).plant(manifest_key("a" * 64), deep)
    assert registry.gc(1, actor=ACTOR).bundles == []


def test_an_id_ends_with_its_last_digit() -> None:
    with pytest.raises(msgspec.ValidationError, match="matching regex"):
        msgspec.json.decode(msgspec.json.encode({"bundle": "a" * 64 + "\n"}), type=Release)
    with pytest.raises(msgspec.ValidationError, match="matching regex"):
        msgspec.json.decode(msgspec.json.encode({"sha256": "a" * 64 + "\n", "size": 1}), type=m.FileEntry)


def test_a_pointer_that_is_none_is_told(registry: Registry) -> None:
    for planted, reason in (
        (b"{}", "no pointer"),
        (b"\xff", "no pointer"),
    ):
        _memory(registry).plant(channel_key("stable"), planted)
        with pytest.raises(RegistryFault, match=reason):
            registry.pointer("stable")


def _race(registries: list[Registry], releases: list[Release]) -> None:
    start = threading.Barrier(len(registries))

    def move(number: int) -> object:
        start.wait()
        try:
            return registries[number].promote("stable", releases[number % 2], f"publisher-{number}", expect=0)
        except ChannelConflict as conflict:
            return conflict

    with concurrent.futures.ThreadPoolExecutor(len(registries)) as pool:
        ended = list(pool.map(move, range(len(registries))))
    conflicts = [one for one in ended if isinstance(one, ChannelConflict)]
    winners = [one for one in ended if not isinstance(one, ChannelConflict)]
    assert len({one.actor for one in winners}) == 1, "one wins"
    pointer, _ = registries[0].pointer("stable")
    assert (pointer.sequence, pointer.actor) == (1, winners[0].actor)
    assert all(one.winner == pointer and pointer.actor in one.fault for one in conflicts)
    assert (len(winners), len(conflicts)) == (1, 15)
    # The winner who asks again, because the answer was lost, is told that it is done.
    again = registries[0].promote("stable", pointer.current, pointer.actor, expect=0)
    assert again == pointer


def test_of_sixteen_racing_publishers_one_wins_and_the_others_are_told_who(signed: Made) -> None:
    objects = MemoryObjects()
    first = Registry(objects, signed.trust)
    _publish(first, signed.old)
    _publish(first, signed.new)
    _race([Registry(objects, signed.trust) for _ in range(16)], [signed.old_release, signed.new_release])


@pytest.mark.real_parts
def test_of_sixteen_racing_publishers_on_s3_one_wins_and_the_others_are_told_who(
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
    client.create_bucket(Bucket="registry-race", ObjectLockEnabledForBucket=True, CreateBucketConfiguration=location)
    registry = Registry(S3Objects("registry-race", client), signed.trust)
    _publish(registry, signed.old)
    _publish(registry, signed.new)
    _race(
        [Registry(S3Objects("registry-race", client), signed.trust, parallel=1) for _ in range(16)],
        [signed.old_release, signed.new_release],
    )
    assert _content(registry.fetch(signed.new.name, tmp_path)) == _content(signed.new)


# looking


def test_the_list_says_who_signed_and_which_channels_point_there(signed: Made, registry: Registry) -> None:
    for bundle in (signed.old, signed.new):
        _publish(registry, bundle)
    registry.publish_delta(signed.delta, signature_path(signed.delta), actor=ACTOR)
    registry.promote("stable", signed.old_release, ACTOR)
    registry.promote("stable", signed.new_release, ACTOR)
    registry.promote("canary", signed.new_release, ACTOR)
    found = {one.id: one for one in registry.list()}
    assert found[signed.new.name].channels == ["canary", "stable"]
    assert found[signed.old.name].channels == ["stable (previous)"]
    assert found[signed.new.name].signer == "publisher"
    assert (found[signed.new.name].deltas, found[signed.old.name].deltas) == (1, 0)
    assert registry.resolve(signed.new.name[:10]) == signed.new.name


def test_the_difference_names_files_metrics_and_features_that_changed(
    signed: Made, registry: Registry, tmp_path: Path
) -> None:
    other = build_fake_bundle(tmp_path, items=7, seed=3)
    sign(other, signed.key.private)
    _publish(registry, signed.new)
    _publish(registry, other)
    found = registry.diff(signed.new.name, other.name)
    assert {change.name: (change.before, change.after) for change in found.features}["items"] == (4, 7)
    assert m.MODEL_CARD not in {file.name for file in found.files}
    assert m.ANN in {file.name for file in found.files}
    assert found.same_bytes >= (other / m.MODEL_CARD).stat().st_size
    assert registry.diff(other.name, other.name).files == []


def test_a_site_that_a_bundle_was_not_made_for_is_told_why() -> None:
    needs = m.Requires(site_classes=[m.SiteClass.GPU], onnxruntime="1.22")
    assert "made for gpu sites" in str(needs.unmet(m.SiteClass.CPU, "1.23.0"))
    assert "needs ONNX Runtime 1.22" in str(needs.unmet(m.SiteClass.GPU, "1.9.1"))
    assert needs.unmet(m.SiteClass.GPU, "1.22.0+cpu") is None
    assert m.Requires().unmet(m.SiteClass.CPU, "1.0") is None
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"site_classes": ["cpu"], "tensorrt": "10"}', type=m.Requires)


def test_a_publish_that_the_store_cuts_off_is_completed_by_the_next(signed: Made) -> None:
    objects = MemoryObjects()
    registry = Registry(objects, signed.trust, parallel=1)
    with contextlib.suppress(Unavailable):
        objects.revive({5: Kind.RESET})
        _publish(registry, signed.new)
    assert signature_key(signed.new.name) not in objects.keys()  # noqa: SIM118 - a method of the fake
    objects.revive()
    _publish(registry, signed.new)
    assert registry.promote("stable", signed.new_release, ACTOR).sequence == 1


def test_trust_is_a_folder_of_keys(signed: Made, tmp_path: Path) -> None:
    with pytest.raises(SignatureFault, match="holds no public key"):
        Trust.read(tmp_path / "trust")
    folder = tmp_path / "trust"
    folder.mkdir()
    shutil.copy(signed.key.public, folder / "press.pub")
    assert Trust.read(folder).fingerprints == {signed.key.fingerprint}
    (folder / "junk.pub").write_text("junk")
    with pytest.raises(SignatureFault, match=r"junk\.pub"):
        Trust.read(folder)


def test_a_private_key_that_others_may_read_is_not_used(signed: Made, tmp_path: Path) -> None:
    key = make_key(tmp_path / "k.key", password=PASSWORD)
    assert key.private.stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in key.private.read_bytes()
    assert make_key(tmp_path / "k.key", password=PASSWORD) == key
    with pytest.raises(SignatureFault, match="password") as caught:
        sign(signed.new, key.private, password=PASSWORD[::-1], signature=tmp_path / "x.sig")
    assert PASSWORD[::-1] not in str(caught.value)
    key.private.chmod(0o644)
    with pytest.raises(SignatureFault, match="may be read by others"):
        sign(signed.new, key.private, password=PASSWORD, signature=tmp_path / "x.sig")
    assert not os.path.lexists(tmp_path / "x.sig")
