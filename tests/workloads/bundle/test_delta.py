"""Deltas appear whole or not at all, are refused with file and reason, and open on top of their bundle in order."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from workloads.bundle import incoming
from workloads.bundle import manifest as m
from workloads.bundle.delta import (
    DELTA_MANIFEST,
    FILES,
    DeltaFacts,
    DeltaFault,
    check_delta,
    mutual_neighbours,
    open_delta,
    verify_delta,
    write_delta,
)
from workloads.bundle.fake import CREATED_MS, build_fake_bundle
from workloads.bundle.store import Bundle, open_bundle
from workloads.bundle.tables import Array
from workloads.contract.tensors import ITEM_TABLES, NEIGHBOURS, VECTOR_DIM

N = 30
Rows = tuple[dict[str, list[object]], dict[str, Array]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=N)


@pytest.fixture(scope="module")
def bundle(made: Path) -> Bundle:
    return open_bundle(made)


def rows(*names: str, seed: int = 0) -> Rows:
    """Catalogue and tables of new items; neighbours are among the bundle's own."""
    random = np.random.default_rng(seed)
    axes = {"N+1": len(names), "VECTOR_DIM": VECTOR_DIM, "NEIGHBOURS": NEIGHBOURS}
    tables = {name: np.zeros([axes[a] for a in shape], dtype) for name, (dtype, shape) in ITEM_TABLES.items()}
    tables["vectors"][:] = random.normal(size=tables["vectors"].shape)
    tables["price"][:] = random.uniform(1, 9, len(names))
    tables["category"][:] = 2
    tables["price_band"][:] = 1
    tables["first_seen_ms"][:] = CREATED_MS
    tables["in_stock"][:] = 1
    tables["neighbours"][:, :2] = random.integers(1, N + 1, (len(names), 2))
    tables["neighbour_scores"][:, :2] = 0.1
    catalogue: dict[str, list[object]] = {
        "item": list(names),
        "title": [f"Title of {name}" for name in names],
        "description": ["" for _ in names],
        "category": ["Kitchen" for _ in names],
        "price": [float(price) for price in tables["price"]],
        "image": [[] for _ in names],
        "first_seen_ms": [CREATED_MS for _ in names],
        "in_stock": [True for _ in names],
    }
    return catalogue, tables


def put(deltas: Path, bundle: Bundle, *names: str, seed: int = 0, **changes: Any) -> Path:  # noqa: ANN401 - facts
    facts = msgspec.structs.replace(bundle.next_delta(CREATED_MS), **changes)
    return write_delta(deltas, facts, *rows(*names, seed=seed))


@pytest.fixture
def delta(bundle: Bundle, tmp_path: Path) -> Path:
    return put(tmp_path / "deltas", bundle, "new-1", "new-2")


def _seal(delta: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """Make the manifest true again after a change: what remains at fault is the form, not a digest."""
    manifest = json.loads((delta / DELTA_MANIFEST).read_text())
    manifest["files"] = {
        path.name: {"sha256": m.identity(path.read_bytes()), "size": path.stat().st_size}
        for path in sorted(delta.iterdir())
        if path.is_file() and path.name != DELTA_MANIFEST
    }
    change(manifest)
    data = (json.dumps(manifest, indent=2) + "\n").encode()
    (delta / DELTA_MANIFEST).write_bytes(data)
    return delta.rename(delta.with_name(f"{manifest['number']}-{m.identity(data)}"))


def _refused(delta: Path, file: str, reason: str) -> None:
    with pytest.raises(DeltaFault, match=reason) as caught:
        verify_delta(delta)
    assert caught.value.file == file
    assert str(delta / file) in str(caught.value)
    assert "delta" in caught.value.remedy


def test_a_delta_lies_under_its_bundle_number_and_id_and_passes(bundle: Bundle, delta: Path) -> None:
    manifest = verify_delta(delta)
    assert delta.parent.name == bundle.id == manifest.bundle
    assert delta.name == f"1-{m.identity((delta / DELTA_MANIFEST).read_bytes())}"
    assert (manifest.number, manifest.previous, manifest.first_index, manifest.items) == (1, None, N + 1, 2)
    assert verify_delta(_seal(delta)) == manifest, "a sealed copy passes, so that the refusals below mean something"


def test_writing_the_same_again_gives_the_same_delta(bundle: Bundle, delta: Path, tmp_path: Path) -> None:
    before = (delta / m.CATALOGUE).stat().st_ino
    assert put(tmp_path / "deltas", bundle, "new-1", "new-2") == delta
    assert (delta / m.CATALOGUE).stat().st_ino == before


def test_a_crash_while_writing_leaves_no_delta(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(incoming, "_sync", crash)
    with pytest.raises(OSError, match="disk full"):
        put(tmp_path, bundle, "new-1")
    assert list((tmp_path / bundle.id).iterdir()) == []


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_missing_truncated_altered_or_linked_file_is_refused(delta: Path, file: str, tmp_path: Path) -> None:
    data = (delta / file).read_bytes()
    (delta / file).write_bytes(data[:-1])
    _refused(delta, file, "was cut short")
    (delta / file).write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    _refused(delta, file, "was altered")
    (tmp_path / "elsewhere").write_bytes(data)
    (delta / file).unlink()
    _refused(delta, file, "is missing")
    (delta / file).symlink_to(tmp_path / "elsewhere")
    _refused(delta, file, "symbolic link")


def test_an_extra_file_a_folder_and_a_pipe_are_refused(delta: Path) -> None:
    (delta / "notes.md").write_text("hello")
    _refused(delta, "notes.md", "is not in the manifest")
    (delta / "notes.md").unlink()
    (delta / "more").mkdir()
    _refused(delta, "more", "nothing in it")
    (delta / "more").rmdir()
    os.mkfifo(delta / "pipe")
    _refused(delta, "pipe", "not a plain file")


def test_a_file_that_no_delta_has_and_one_that_every_delta_has_are_missed_in_the_manifest(delta: Path) -> None:
    (delta / "ranker.onnx").write_bytes(b"x")
    sealed = _seal(delta)
    _refused(sealed, "ranker.onnx", "no delta has it")
    (sealed / "ranker.onnx").unlink()
    (sealed / m.CATALOGUE).unlink()
    _refused(_seal(sealed), m.CATALOGUE, "every delta has this file")


@pytest.mark.parametrize(
    ("name", "reason"), [("/etc/passwd", "absolute"), ("../items.parquet", "climbs out"), ("a\\b", "plain relative")]
)
def test_a_path_that_leaves_the_delta_is_refused(delta: Path, name: str, reason: str) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["files"] = dict(sorted({**manifest["files"], name: {"sha256": "0" * 64, "size": 1}}.items()))

    _refused(_seal(delta, plant), DELTA_MANIFEST, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: manifest.update(schema_version=2, news=1), "schema version 2; this release reads version 1"),
        (lambda manifest: manifest.update(surprise=1), "surprise"),
        (lambda manifest: manifest.update(number="1"), r"\$\.number"),
        (lambda manifest: manifest.update(number=0), r"\$\.number"),
        (lambda manifest: manifest.update(number=2), r"\$\.previous"),
        (lambda manifest: manifest.update(previous="a" * 64), r"\$\.previous"),
        (lambda manifest: manifest.update(bundle="b" * 63), r"\$\.bundle"),
        (lambda manifest: manifest.update(items=0), r"\$\.items"),
        (lambda manifest: manifest.update(bundle=manifest.pop("bundle")), "not in the one form"),
    ],
)
def test_a_manifest_that_breaks_its_form_is_refused(
    delta: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    _refused(_seal(delta, change), DELTA_MANIFEST, reason)


def test_a_manifest_that_is_no_json_or_too_large_or_missing_or_linked_is_refused(delta: Path, tmp_path: Path) -> None:
    data = (delta / DELTA_MANIFEST).read_bytes()
    (delta / DELTA_MANIFEST).write_bytes(b"{")
    _refused(delta, DELTA_MANIFEST, "truncated")
    (delta / DELTA_MANIFEST).write_bytes(data + b" " * (1 << 16))
    _refused(delta, DELTA_MANIFEST, "larger than")
    (delta / DELTA_MANIFEST).unlink()
    _refused(delta, DELTA_MANIFEST, "is missing")
    (tmp_path / "elsewhere").write_bytes(data)
    (delta / DELTA_MANIFEST).symlink_to(tmp_path / "elsewhere")
    _refused(delta, DELTA_MANIFEST, "not a plain file")
    _refused(tmp_path / "nowhere", "", "no such directory")


def test_another_name_than_number_and_id_is_refused_but_content_can_be_checked_on_its_way(delta: Path) -> None:
    moved = delta.rename(delta.with_name(f"2-{delta.name[2:]}"))
    _refused(moved, DELTA_MANIFEST, "not the directory's name")
    manifest, identity = check_delta(moved)
    assert (manifest.number, identity) == (1, delta.name[2:])


def test_a_pickle_in_a_files_place_is_refused(delta: Path) -> None:
    (delta / m.CATALOGUE).write_bytes(pickle.dumps([1]))
    _refused(_seal(delta), m.CATALOGUE, "is a pickle")


def test_safetensors_with_overlapping_ranges_are_refused(delta: Path) -> None:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": tensor, "b": {**tensor, "data_offsets": [4, 12]}}).encode()
    (delta / m.ITEM_TABLES_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    _refused(_seal(delta), m.ITEM_TABLES_FILE, "overlaps")


def _set(name: str, value: float) -> Callable[[dict[str, Array]], None]:
    def change(tables: dict[str, Array]) -> None:
        tables[name].flat[0] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tables: tables.pop("price"), "'price' is missing"),
        (lambda tables: tables.update(price=tables["price"][:1]), r"'price' is float32\[1\], not float32\[2\]"),
        (lambda tables: tables.update(users=np.zeros(2, np.float32)), "no table 'users'"),
        (_set("vectors", np.nan), "'vectors' has numbers that are not finite"),
        (_set("neighbour_scores", np.inf), "not finite"),
        (_set("price", -1.0), "'price' has numbers below 0"),
        (_set("category", -1), "'category' has numbers below 0"),
        (_set("neighbours", N + 3), f"index {N + 3}; the last is {N + 2}"),
        (_set("neighbours", -1), "below 0"),
        (_set("neighbours", N + 1), "its own neighbour"),
        (_set("neighbours", 0), "without a neighbour has a score"),
        (_set("in_stock", 2), "of 0 and 1"),
    ],
)
def test_tables_that_could_not_be_served_from_are_refused(
    delta: Path, change: Callable[[dict[str, Array]], None], reason: str
) -> None:
    tables = load_file(delta / m.ITEM_TABLES_FILE)
    change(tables)
    save_file(tables, delta / m.ITEM_TABLES_FILE)
    _refused(_seal(delta), m.ITEM_TABLES_FILE, reason)


def test_a_catalogue_of_another_form_is_refused(delta: Path) -> None:
    catalogue = pq.read_table(delta / m.CATALOGUE)
    pq.write_table(catalogue.slice(0, 1), delta / m.CATALOGUE)
    sealed = _seal(delta)
    _refused(sealed, m.CATALOGUE, "has 1 rows; the manifest says 2 items")
    pq.write_table(catalogue.drop_columns(["title"]), sealed / m.CATALOGUE)
    sealed = _seal(sealed)
    _refused(sealed, m.CATALOGUE, "columns are not a delta's")
    (sealed / m.CATALOGUE).write_bytes(b"PAR0")
    _refused(_seal(sealed), m.CATALOGUE, "is not a Parquet file")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"item": ["a", "a"]}, "stands twice"),
        ({"item": ["a", "b\n"]}, "is no item id"),
        ({"item": ["a", ""]}, "is no item id"),
        ({"image": [[], [1.0]]}, "an image has 1 numbers"),
    ],
)
def test_rows_that_are_no_items_make_no_delta(
    bundle: Bundle, tmp_path: Path, changes: dict[str, list[object]], reason: str
) -> None:
    catalogue, tables = rows("a", "b")
    with pytest.raises(DeltaFault, match=reason):
        write_delta(tmp_path, bundle.next_delta(CREATED_MS), catalogue | changes, tables)
    assert list((tmp_path / bundle.id).iterdir()) == []


# a chain on top of a bundle


@pytest.fixture
def chain(made: Path, tmp_path: Path) -> list[Path]:
    """Three deltas of 2, 1 and 1 items."""
    paths: list[Path] = []
    for number, names in enumerate([("new-1", "new-2"), ("new-3",), ("new-4",)]):
        paths.append(put(tmp_path / "deltas", open_bundle(made, paths), *names, seed=number))
    return paths


def test_items_of_deltas_follow_the_bundles(made: Path, chain: list[Path]) -> None:
    opened = open_bundle(made, chain)
    assert (opened.delta, opened.base_items, len(opened.item_ids)) == (3, N, N + 5)
    assert opened.item_ids[N + 1 :] == ["new-1", "new-2", "new-3", "new-4"]
    assert opened.index["new-3"] == N + 3
    assert opened.titles[N + 4] == "Title of new-4"
    assert opened.categories[N + 1 :] == ["Kitchen"] * 4
    assert {len(table) for table in opened.tables.values()} == {N + 5}
    np.testing.assert_array_equal(opened.tables["vectors"][N + 3], open_delta(chain[1]).tables["vectors"][0])
    assert opened.features == open_bundle(made).features, "the models' own tables end where they ended"


def test_without_deltas_tables_are_maps_and_with_them_nobody_can_write_them(made: Path, chain: list[Path]) -> None:
    assert all(isinstance(table, np.memmap) for table in open_bundle(made).tables.values())
    assert open_bundle(made).delta == 0
    with pytest.raises(ValueError, match="read-only"):
        open_bundle(made, chain).tables["price"][1] = 5


def test_what_a_row_of_the_tables_costs_is_what_the_docstring_says() -> None:
    sizes = {"N+1": 1, "VECTOR_DIM": VECTOR_DIM, "NEIGHBOURS": NEIGHBOURS}
    axes = [[sizes[axis] for axis in shape] for _, shape in ITEM_TABLES.values()]
    row = sum(
        int(np.prod(shape)) * np.dtype(dtype).itemsize
        for shape, (dtype, _) in zip(axes, ITEM_TABLES.values(), strict=True)
    )
    assert row == 689


def test_gaps_other_orders_and_repeats_are_refused(made: Path, chain: list[Path]) -> None:
    first, second, third = chain
    for broken, number, wanted in (
        ([second], 2, 1),
        ([first, third], 3, 2),
        ([second, first], 2, 1),
        ([first, first], 1, 2),
    ):
        with pytest.raises(DeltaFault, match=f"is delta {number}, and delta {wanted} comes next"):
            open_bundle(made, broken)


def test_a_fork_is_refused(made: Path, bundle: Bundle, chain: list[Path], tmp_path: Path) -> None:
    other = put(tmp_path / "deltas", bundle, "other-1", "other-2", seed=9)
    with pytest.raises(DeltaFault, match="the chain forks"):
        open_bundle(made, [other, chain[1]])


def test_a_delta_for_another_bundle_is_refused(bundle: Bundle, delta: Path, tmp_path: Path) -> None:
    another = build_fake_bundle(tmp_path / "bundles", items=N, seed=5)
    with pytest.raises(DeltaFault, match=f"is for bundle {bundle.short}"):
        open_bundle(another, [delta])


@pytest.mark.parametrize("taken", ["item-00007", "new-1"])
def test_an_item_that_is_there_already_is_refused(made: Path, bundle: Bundle, tmp_path: Path, taken: str) -> None:
    first = put(tmp_path, bundle, "new-1")
    second = put(tmp_path, open_bundle(made, [first]), taken)
    with pytest.raises(DeltaFault, match=f"the item '{taken}' is there already"):
        open_bundle(made, [first, second])


def test_a_delta_whose_items_would_stand_elsewhere_is_refused(made: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DeltaFault, match=f"first item has index {N + 9}, and {N + 1} comes next"):
        open_bundle(made, [put(tmp_path, bundle, "new-1", first_index=N + 9)])


@pytest.mark.parametrize("name", ["category", "price_band"])
def test_a_category_or_price_band_that_the_bundle_does_not_have_is_refused(
    made: Path, bundle: Bundle, tmp_path: Path, name: str
) -> None:
    catalogue, tables = rows("new-1")
    tables[name][:] = 77
    delta = write_delta(tmp_path, bundle.next_delta(CREATED_MS), catalogue, tables)
    with pytest.raises(DeltaFault, match=f"a {name} is beyond"):
        open_bundle(made, [delta])


def test_a_delta_that_was_tampered_with_is_not_opened(made: Path, chain: list[Path]) -> None:
    path = chain[1] / m.ITEM_TABLES_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DeltaFault, match="was altered"):
        open_bundle(made, chain)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_k_deltas_open_to_what_one_merged_delta_opens_to(
    made: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    deltas = tmp_path_factory.mktemp("deltas")
    names = [f"new-{number}" for number in range(sum(sizes))]
    catalogue, tables = rows(*names, seed=seed)
    merged = write_delta(deltas / "merged", bundle.next_delta(CREATED_MS), catalogue, tables)
    paths: list[Path] = []
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        facts: DeltaFacts = open_bundle(made, paths).next_delta(CREATED_MS)
        cut = {name: values[part] for name, values in catalogue.items()}
        paths.append(write_delta(deltas / "parts", facts, cut, {name: table[part] for name, table in tables.items()}))
        start += size
    one, many = open_bundle(made, [merged]), open_bundle(made, paths)
    assert (one.delta, many.delta) == (1, len(sizes))
    assert one.item_ids == many.item_ids
    assert one.index == many.index
    for column in ("title", "description", "category"):
        assert one.text(column) == many.text(column)
    assert one.tables.keys() == many.tables.keys()
    for name, table in one.tables.items():
        np.testing.assert_array_equal(table, many.tables[name])


# neighbours both ways


def _rows(*rows: dict[int, float], width: int = NEIGHBOURS) -> tuple[Array, Array]:
    neighbours, scores = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
    for place, row in enumerate(rows):
        neighbours[place, : len(row)], scores[place, : len(row)] = list(row), list(row.values())
    return neighbours, scores


def _read(neighbours: Array, scores: Array, row: int) -> dict[int, float]:
    return {int(n): round(float(s), 3) for n, s in zip(neighbours[row], scores[row], strict=True) if n}


def test_a_neighbour_of_a_new_item_has_it_for_a_neighbour_where_its_score_belongs():
    tables = _rows({}, {2: 0.9, 3: 0.1}, {1: 0.5}, {}, {1: 0.5, 2: 0.5, 5: 0.2}, {4: 0.3})
    mutual_neighbours(*tables, 3)
    assert list(_read(*tables, 1).items()) == [(2, 0.9), (4, 0.5), (3, 0.1)]
    assert list(_read(*tables, 2)) == [1, 4], "what was learned wins a tie"
    assert _read(*tables, 3) == {}
    assert _read(*tables, 4) == {1: 0.5, 2: 0.5, 5: 0.2}, "a pair that names each other already is left alone"
    assert not tables[0][0].any()


def test_a_flood_of_new_items_takes_the_last_places_and_no_more():
    learned = {2 + at: 1.0 - at / 100 for at in range(NEIGHBOURS)}
    flood = [{1: 2.0 + at / 1000} for at in range(100)]
    tables = _rows({}, learned, *({} for _ in range(NEIGHBOURS)), *flood)
    mutual_neighbours(*tables, NEIGHBOURS + 1)
    row = list(_read(*tables, 1))
    best = list(range(NEIGHBOURS + 101, NEIGHBOURS + 91, -1))
    assert row == best + list(learned)[: NEIGHBOURS - 10]
