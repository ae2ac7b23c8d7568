"""What both forms of a bucket promise, the fake and S3: the fake is worth what these tests say."""

from __future__ import annotations

import concurrent.futures
import datetime
import hashlib
import io
import os
import threading
import time
from pathlib import Path

import pytest

from workloads.objects import s3
from workloads.objects.store import Conflict, Damaged, Locked, NotFound, ObjectStore


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_was_put_comes_back_in_every_way(objects: ObjectStore):
    data = os.urandom(3 << 20)
    put = objects.put_new("a/b", data)
    got = objects.get("a/b", sha256=_sha256(data))
    assert (got.data, got.etag, put.existed) == (data, put.etag, False)
    assert objects.get_range("a/b", 5, 7) == data[5:12]
    assert objects.get_range("a/b", len(data) - 2, 100) == data[-2:]
    assert objects.get_range("a/b", len(data), 1) == b""
    file = io.BytesIO()
    assert objects.download("a/b", file, sha256=_sha256(data)) == objects.head("a/b")
    assert file.getvalue() == data


def test_an_empty_object_is_one(objects: ObjectStore):
    objects.put_new("empty", b"")
    assert objects.get("empty", sha256=_sha256(b"")).data == b""
    assert objects.get_range("empty", 0, 10) == b""


def test_times_are_now(objects: ObjectStore):
    objects.put_new("a", b"1")
    assert abs(objects.head("a").modified_ms / 1000 - time.time()) < 60


def test_nothing_is_named_by_its_key_and_a_remedy(objects: ObjectStore):
    for ask in (
        lambda: objects.get("none"),
        lambda: objects.get_range("none", 0, 1),
        lambda: objects.download("none", io.BytesIO()),
        lambda: objects.head("none"),
        lambda: objects.replace("none", b"", '"etag"'),
        lambda: objects.parts("none", "no-such-upload"),
    ):
        with pytest.raises(NotFound, match="none") as caught:
            ask()
        assert caught.value.remedy
    assert objects.delete("none") is False


def test_the_same_bytes_again_are_no_fault_and_others_are(objects: ObjectStore, tmp_path: Path):
    first = objects.put_new("k", b"one")
    again = objects.put_new("k", b"one")
    assert (again.existed, again.etag) == (True, first.etag)
    assert again.modified_ms == objects.head("k").modified_ms
    (tmp_path / "same").write_bytes(b"one")
    assert objects.put_new("k", tmp_path / "same").existed
    with pytest.raises(Conflict, match="k is there already"):
        objects.put_new("k", b"two")
    assert objects.get("k").data == b"one"


def test_a_replacement_wants_the_version_that_was_read(objects: ObjectStore):
    etag = objects.put_new("k", b"one").etag
    newer = objects.replace("k", b"two", etag)
    with pytest.raises(Conflict):
        objects.replace("k", b"three", etag)
    assert objects.get("k") == type(objects.get("k"))(b"two", newer)


def test_of_sixteen_writers_one_wins(objects: ObjectStore):
    etag = objects.put_new("k", b"old").etag
    start = threading.Barrier(16)

    def write(number: int) -> int | None:
        start.wait()
        try:
            objects.replace("k", b"writer %d" % number, etag)
        except Conflict:
            return None
        return number

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        won = [one for one in pool.map(write, range(16)) if one is not None]
    assert len(won) == 1
    assert objects.get("k").data == b"writer %d" % won[0]


def test_other_bytes_under_a_digest_are_damage_whatever_the_store_says(objects: ObjectStore):
    objects.put_new("objects/x", b"tampered")
    with pytest.raises(Damaged, match="objects/x has the sha256"):
        objects.get("objects/x", sha256=_sha256(b"original"))
    with pytest.raises(Damaged):
        objects.download("objects/x", io.BytesIO(), sha256=_sha256(b"original"))


def test_a_listing_is_by_key_and_under_its_prefix_only(objects: ObjectStore):
    for key in ("b/2", "a/1", "b/1", "bb"):
        objects.put_new(key, key.encode())
    assert [(one.key, one.size) for one in objects.list("b/")] == [("b/1", 3), ("b/2", 3)]


def test_a_removed_object_leaves_nothing_and_its_key_is_free(objects: ObjectStore):
    etag = objects.put_new("k", b"one").etag
    objects.replace("k", b"two", etag)
    assert objects.delete("k") is True
    with pytest.raises(NotFound):
        objects.head("k")
    assert objects.put_new("k", b"three").existed is False


def test_what_was_written_since_stays(objects: ObjectStore):
    objects.put_new("k", b"one")
    written = objects.head("k").modified_ms
    assert objects.delete("k", written_before_ms=written) is False
    assert objects.delete("k", written_before_ms=written + 1) is True


def test_object_lock_is_reported_with_its_end_and_removes_nothing(locked: ObjectStore):
    etag = locked.put_new("k", b"one").etag
    locked.replace("k", b"two", etag)
    with pytest.raises(Locked, match="k is kept until") as caught:
        locked.delete("k")
    assert caught.value.until is not None
    ahead = caught.value.until - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(hours=23) < ahead <= datetime.timedelta(hours=25)
    assert locked.get("k").data == b"two"


def test_an_upload_goes_on_after_its_writer_lost_all_notes(objects: ObjectStore):
    one, two = os.urandom(5 << 20), b"the end"
    upload = objects.begin("big")
    objects.put_part("big", upload, 1, one)
    assert list(objects.uploads("big")) == [upload]
    kept = objects.parts("big", upload)
    assert [(part.number, part.size) for part in kept] == [(1, len(one))]
    with pytest.raises(NotFound):
        objects.head("big")
    last = objects.put_part("big", upload, 2, two)
    objects.complete("big", upload, [*kept, last])
    assert objects.get("big", sha256=_sha256(one + two)).data == one + two
    assert not objects.uploads("big")


def test_an_upload_does_not_take_a_key_that_is_taken(objects: ObjectStore):
    objects.put_new("big", b"there")
    upload = objects.begin("big")
    part = objects.put_part("big", upload, 1, b"other")
    with pytest.raises(Conflict):
        objects.complete("big", upload, [part])
    objects.abort("big", upload)
    objects.abort("big", upload)
    assert objects.get("big").data == b"there"


def test_a_large_file_goes_in_parts_and_leaves_no_upload(
    objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3, "SINGLE_MAX", 1 << 20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    data = os.urandom(6 << 20)
    (tmp_path / "large").write_bytes(data)
    assert objects.put_new("large", tmp_path / "large").existed is False
    assert objects.put_new("large", tmp_path / "large").existed is True
    assert objects.get("large", sha256=_sha256(data)).data == data
    assert not objects.uploads("large")
