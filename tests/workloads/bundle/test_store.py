"""Bundles appear whole or not at all, and open to what the catalogue says."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from workloads.bundle import incoming, store
from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.store import BundleFault, copy_bundle, find, newest, open_bundle, verify, write_bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=30)


def _facts(bundle: Path, **changes: object) -> store.m.Facts:
    manifest = verify(bundle)
    fields = {name: getattr(manifest, name) for name in store.m.Facts.__struct_fields__}
    return store.m.Facts(**(fields | changes))


def _loose_files(bundle: Path, target: Path) -> Path:
    shutil.copytree(bundle, target)
    (target / "manifest.json").unlink()
    return target


def test_lists_and_tables_share_the_item_index(made: Path) -> None:
    bundle = open_bundle(made)
    assert bundle.item_ids[0] == ""
    assert bundle.titles[0] == ""
    assert bundle.item_ids[7] == "item-00007"
    assert bundle.index["item-00007"] == 7
    assert bundle.titles[7].endswith("no. 7")
    assert bundle.features.categories[bundle.tables["category"][7] - 1] == bundle.categories[7]
    assert len(bundle.text("description")) == 31
    assert bundle.short == bundle.id[:12] == made.name[:12]


def test_tables_are_read_only_maps(made: Path) -> None:
    vectors = open_bundle(made).tables["vectors"]
    assert isinstance(vectors, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        vectors[1, 0] = 3.0


def test_the_id_is_the_digest_of_the_manifest(made: Path) -> None:
    assert made.name == store.m.identity((made / "manifest.json").read_bytes())


def test_other_facts_make_another_bundle_of_the_same_files(made: Path, tmp_path: Path) -> None:
    loose = _loose_files(made, tmp_path / "loose")
    again = write_bundle(tmp_path, loose, _facts(made))
    other = write_bundle(tmp_path, loose, _facts(made, created_ms=5))
    assert again.name == made.name
    assert other.name != made.name


def test_a_bundle_with_a_bad_file_is_not_written_and_leaves_nothing(made: Path, tmp_path: Path) -> None:
    loose = _loose_files(made, tmp_path / "loose")
    (loose / "ranker.onnx").write_bytes(b"\x80\x04not a model")
    with pytest.raises(BundleFault, match=r"ranker\.onnx: is a pickle"):
        write_bundle(tmp_path / "bundles", loose, _facts(made))
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_bundle_whose_parity_failed_is_not_written(made: Path, tmp_path: Path) -> None:
    facts = _facts(made)
    bad = msgspec.structs.replace(facts.parity["ranker"], max_abs_error=1.0)
    facts = msgspec.structs.replace(facts, parity=facts.parity | {"ranker": bad})
    with pytest.raises(BundleFault, match="the ranker failed its parity check"):
        write_bundle(tmp_path / "bundles", _loose_files(made, tmp_path / "loose"), facts)


def test_a_crash_while_writing_leaves_no_bundle(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(incoming, "_sync", crash)
    with pytest.raises(OSError, match="disk full"):
        copy_bundle(made, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(made: Path, tmp_path: Path) -> None:
    dead = tmp_path / ".incoming-4194999-aa"  # above the kernel's largest pid
    live = tmp_path / ".incoming-1-bb"
    dead.mkdir()
    live.mkdir()
    copy_bundle(made, tmp_path)
    assert not dead.exists()
    assert live.exists()


def test_a_copy_equals_its_source_and_copying_again_changes_nothing(made: Path, tmp_path: Path) -> None:
    copy = copy_bundle(made, tmp_path)
    before = (copy / "ranker.onnx").stat().st_ino
    assert verify(copy) == verify(made)
    assert copy_bundle(made, tmp_path) == copy
    assert (copy / "ranker.onnx").stat().st_ino == before


def test_copying_again_mends_a_damaged_copy(made: Path, tmp_path: Path) -> None:
    copy = copy_bundle(made, tmp_path)
    (copy / "ann.faiss").write_bytes(b"")
    assert verify(copy_bundle(made, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


def test_a_damaged_source_is_not_copied(made: Path, tmp_path: Path) -> None:
    bad = tmp_path / made.name
    shutil.copytree(made, bad)
    (bad / "ann.faiss").unlink()
    with pytest.raises(BundleFault, match=r"ann\.faiss: is missing"):
        copy_bundle(bad, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_the_newest_bundle_is_the_one_made_last_and_not_the_one_touched_last(made: Path, tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    loose = _loose_files(made, tmp_path / "loose")
    young = write_bundle(tmp_path / "b", loose, _facts(made, created_ms=2_000_000_000_000))
    write_bundle(tmp_path / "b", loose, _facts(made, created_ms=1_000_000_000_000))
    (tmp_path / "b" / "notes").mkdir()
    assert newest(tmp_path / "b") == young


def test_a_bundle_is_found_by_the_beginning_of_its_id(made: Path) -> None:
    assert find(made.parent, made.name[:6]) == made
    with pytest.raises(LookupError, match="no bundle"):
        find(made.parent, "x")


def test_a_directory_with_another_name_than_its_manifest_does_not_open(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "bundle")
    with pytest.raises(BundleFault, match="not the directory's name"):
        open_bundle(tmp_path / "bundle")
