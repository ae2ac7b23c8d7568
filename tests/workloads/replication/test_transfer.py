"""Files into a bucket that fails, forgets, and is killed at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from workloads.objects.memory import Crash, Kind, MemoryObjects
from workloads.objects.store import Damaged, NotFound, ObjectsError, Unavailable
from workloads.replication.journal import Journal
from workloads.replication.transfer import Outgoing, Sums, Transfer
from workloads.telemetry.progress import Progress

CHUNK = 1000
Files = Callable[[list[int]], list[Outgoing]]


def send(
    store: MemoryObjects,
    files: list[Outgoing],
    journal: Path,
    progress: Progress,
    *,
    parallel: int = 3,
    chunk: int = CHUNK,
) -> Sums:
    notes = Journal(journal)
    try:
        return Transfer(store, notes, None, progress, chunk=chunk, parallel=parallel).send(files)
    finally:
        notes.close()


def assert_whole(store: MemoryObjects, files: list[Outgoing]) -> None:
    for file in files:
        assert store.get(file.key, sha256=file.sha256).data == file.path.read_bytes()
        assert list(store.uploads(file.key)) == []


def sent_parts(store: MemoryObjects) -> int:
    return sum(name in {"put_part", "put_new"} for name, _ in store.calls)


def test_small_files_go_whole_and_large_ones_in_parts(random_files: Files, tmp_path: Path, quiet: Progress):
    store = MemoryObjects()
    files = random_files([10, CHUNK, CHUNK + 1, 5 * CHUNK])
    sums = send(store, files, tmp_path / "journal", quiet)
    assert [name for name, _ in store.calls].count("put_new") == 2
    assert [name for name, _ in store.calls].count("put_part") == 2 + 5
    assert sums.sent == sums.verified == sum(file.size for file in files)
    assert_whole(store, files)


def test_a_second_run_sends_nothing(random_files: Files, tmp_path: Path, quiet: Progress):
    store = MemoryObjects()
    files = random_files([10, 3 * CHUNK])
    send(store, files, tmp_path / "journal", quiet)
    store.revive()
    sums = send(store, files, tmp_path / "journal", quiet)
    assert sums.sent == 0
    assert sums.found == sums.verified == sum(file.size for file in files)
    assert sent_parts(store) == 0


@pytest.mark.parametrize("journal_is", ["kept", "lost"])
@pytest.mark.parametrize("kind", [Kind.CRASH_BEFORE, Kind.CRASH_AFTER])
@pytest.mark.parametrize("parallel", [1, 3])
def test_a_kill_at_any_call_costs_at_most_the_parts_in_flight(
    random_files: Files, tmp_path: Path, quiet: Progress, kind: Kind, parallel: int, journal_is: str
):
    """Every call of a run is the last one, once. The rerun completes, and sends again what had not arrived."""
    files = random_files([300, 4 * CHUNK, 2 * CHUNK + 7])
    total = 1 + 4 + 3
    journal = tmp_path / "journal"
    crashes = 0
    for at in range(1, 200):
        journal.unlink(missing_ok=True)
        store = MemoryObjects({at: kind})
        try:
            send(store, files, journal, quiet, parallel=parallel)
        except Crash:
            crashes += 1
        else:
            if at > len(store.calls):
                break
            continue  # the call was answered with "not there", which the store says before it dies
        first = sent_parts(store)
        if journal_is == "lost":
            journal.unlink()
        store.revive()
        send(store, files, journal, quiet, parallel=parallel)
        assert_whole(store, files)
        assert first + sent_parts(store) <= total + parallel, f"killed at call {at}"
    assert crashes > 20


@pytest.mark.parametrize("kind", [Kind.ERROR, Kind.SLOW_DOWN, Kind.RESET])
def test_a_store_that_fails_at_any_call_is_gone_on_with(
    random_files: Files, tmp_path: Path, quiet: Progress, kind: Kind
):
    files = random_files([300, 3 * CHUNK])
    failures = 0
    for at in range(1, 200):
        journal = tmp_path / f"journal-{at}"
        store = MemoryObjects({at: kind})
        try:
            send(store, files, journal, quiet)
        except Unavailable:
            failures += 1
        else:
            if at > len(store.calls):
                break
            continue
        store.revive()
        send(store, files, journal, quiet)
        assert_whole(store, files)
    assert failures > 10


def test_a_slow_store_is_waited_for(random_files: Files, tmp_path: Path, quiet: Progress):
    store = MemoryObjects(dict.fromkeys(range(1, 30), Kind.DELAY), delay_s=0.005)
    files = random_files([3 * CHUNK])
    send(store, files, tmp_path / "journal", quiet)
    assert_whole(store, files)


def test_what_arrived_altered_is_found_out_by_reading_it_back(random_files: Files, tmp_path: Path, quiet: Progress):
    store = MemoryObjects()
    (file,) = random_files([300])
    sent = file.path.read_bytes()
    store.plant(file.key, bytes([sent[0] ^ 1]) + sent[1:])
    with pytest.raises(Damaged) as caught:
        send(store, [file], tmp_path / "journal", quiet)
    assert file.key in caught.value.fault
    assert caught.value.remedy == "it was removed: push again"
    send(store, [file], tmp_path / "journal", quiet)
    assert_whole(store, [file])


@pytest.mark.parametrize("size", [300, 3 * CHUNK])
def test_an_object_that_cannot_be_what_its_key_says_is_replaced(
    random_files: Files, tmp_path: Path, quiet: Progress, size: int
):
    store = MemoryObjects()
    (file,) = random_files([size])
    store.plant(file.key, b"something else")
    send(store, [file], tmp_path / "journal", quiet)
    assert_whole(store, [file])


def test_parts_that_somebody_else_put_in_are_sent_again(random_files: Files, tmp_path: Path, quiet: Progress):
    """The store's list of parts is held against the notes: a part that is not the one that was sent goes again."""
    (file,) = random_files([3 * CHUNK])
    store = MemoryObjects({6: Kind.CRASH_AFTER})
    with pytest.raises(Crash):
        send(store, [file], tmp_path / "journal", quiet, parallel=1)
    store.revive()
    (upload,) = store.uploads(file.key)
    arrived = store.parts(file.key, upload)
    assert arrived
    store.put_part(file.key, upload, arrived[0].number, b"x" * CHUNK)
    send(store, [file], tmp_path / "journal", quiet)
    assert_whole(store, [file])


def test_an_upload_that_the_store_gave_up_meanwhile_is_begun_anew(random_files: Files, tmp_path: Path, quiet: Progress):
    """A lifecycle rule aborts uploads after days."""
    (file,) = random_files([4 * CHUNK])
    store = MemoryObjects({6: Kind.CRASH_AFTER})
    with pytest.raises(Crash):
        send(store, [file], tmp_path / "journal", quiet, parallel=1)
    store.revive()
    for upload in store.uploads(file.key):
        store.abort(file.key, upload)
    send(store, [file], tmp_path / "journal", quiet)
    assert_whole(store, [file])


def test_uploads_of_other_files_and_other_sizes_are_given_up(random_files: Files, tmp_path: Path, quiet: Progress):
    old, new = random_files([4 * CHUNK, 4 * CHUNK])
    store = MemoryObjects({6: Kind.CRASH_AFTER})
    with pytest.raises(Crash):
        send(store, [old], tmp_path / "journal", quiet, parallel=1)
    store.revive()
    assert store.uploads(old.key)
    send(store, [new], tmp_path / "journal", quiet)
    assert not store.uploads(old.key)
    with pytest.raises(NotFound):
        store.head(old.key)
    store.revive({6: Kind.CRASH_AFTER})
    with pytest.raises(Crash):
        send(store, [old], tmp_path / "journal", quiet, parallel=1)
    store.revive()
    send(store, [old], tmp_path / "journal", quiet, chunk=700)
    assert_whole(store, [old, new])


def test_a_failure_is_told_as_what_it_was(random_files: Files, tmp_path: Path, quiet: Progress):
    """Of many senders that stop, the one that failed is named, not those that were stopped by it."""
    store = MemoryObjects({5: Kind.ERROR})
    with pytest.raises(ObjectsError, match="500"):
        send(store, random_files([9 * CHUNK]), tmp_path / "journal", quiet)
