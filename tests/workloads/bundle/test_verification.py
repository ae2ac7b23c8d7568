"""Everything that may be wrong with a bundle is refused with its file and the reason."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from workloads.bundle import manifest as m
from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.store import BundleFault, verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=30)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


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


def _refused(bundle: Path, file: str, reason: str) -> None:
    with pytest.raises(BundleFault, match=reason) as caught:
        verify(bundle)
    assert caught.value.file == file
    assert str(bundle / file) in str(caught.value)
    assert caught.value.remedy


def test_a_sealed_copy_passes_so_that_the_refusals_below_mean_something(bundle: Path) -> None:
    assert verify(_seal(bundle))


@pytest.mark.parametrize("file", sorted(m.REQUIRED))
def test_a_missing_file_is_refused(bundle: Path, file: str) -> None:
    (bundle / file).unlink()
    _refused(bundle, file, "is missing")


@pytest.mark.parametrize("file", sorted(m.REQUIRED))
def test_a_truncated_file_is_refused(bundle: Path, file: str) -> None:
    os.truncate(bundle / file, (bundle / file).stat().st_size - 1)
    _refused(bundle, file, "was cut short")


@pytest.mark.parametrize("file", sorted(m.REQUIRED))
def test_one_flipped_bit_is_refused(bundle: Path, file: str) -> None:
    data = bytearray((bundle / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / file).write_bytes(data)
    _refused(bundle, file, "was altered")


def test_a_flipped_bit_in_the_manifest_is_refused(bundle: Path) -> None:
    text = (bundle / m.MANIFEST).read_text()
    (bundle / m.MANIFEST).write_text(text.replace('"auc": 0.7', '"auc": 0.8'))
    _refused(bundle, m.MANIFEST, "not the directory's name")


def test_an_extra_file_is_refused(bundle: Path) -> None:
    (bundle / "notes.md").write_text("hello")
    _refused(bundle, "notes.md", "is not in the manifest")


@pytest.mark.parametrize("file", ["ranker.onnx", "student.onnx"])
def test_a_required_file_that_the_manifest_leaves_out_is_refused(bundle: Path, file: str) -> None:
    (bundle / file).unlink()
    _refused(_seal(bundle), file, "every bundle has this file")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "absolute"),
        ("../elsewhere.md", r"climbs out of the bundle with '\.\.'"),
        ("a/../../b.md", "climbs out"),
        ("./a.md", "shortest form"),
        ("a//b.md", "shortest form"),
        ("a\\b.md", "plain relative path"),
        ("C:/b.md", "plain relative path"),
        ("a\nb.md", "plain relative path"),
        ("", "plain relative path"),
        ("manifest.json", "its own digest"),
    ],
)
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, name: str, reason: str) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"sha256": "0" * 64, "size": 1}

    _refused(_seal(bundle, plant), m.MANIFEST, reason)


@pytest.mark.parametrize("inside", [True, False])
def test_a_symbolic_link_is_refused_even_when_its_target_has_the_right_bytes(
    bundle: Path, tmp_path: Path, *, inside: bool
) -> None:
    target = bundle / "items.parquet" if inside else tmp_path / "outside"
    shutil.copy(bundle / "ann.faiss", tmp_path / "outside")
    (bundle / "ann.faiss").unlink()
    (bundle / "ann.faiss").symlink_to(target)
    _refused(bundle, "ann.faiss", "symbolic link")


def test_a_manifest_that_is_a_link_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / m.MANIFEST).rename(tmp_path / "elsewhere.json")
    (bundle / m.MANIFEST).symlink_to(tmp_path / "elsewhere.json")
    _refused(bundle, m.MANIFEST, "not a plain file")


def test_a_linked_directory_and_an_empty_one_are_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "empty").mkdir()
    _refused(bundle, "empty", "nothing in it")
    (bundle / "empty").rmdir()
    (bundle / "link").symlink_to(tmp_path)
    _refused(bundle, "link", "symbolic link")


def test_a_pipe_is_refused_without_being_read(bundle: Path) -> None:
    os.mkfifo(bundle / "pipe.md")
    _refused(bundle, "pipe.md", "not a plain file")


@pytest.mark.parametrize("version", [0, 2, 99])
def test_an_unknown_schema_version_is_refused_by_its_number(bundle: Path, version: int) -> None:
    sealed = _seal(bundle, lambda manifest: manifest.update(schema_version=version, news="a later field"))
    _refused(sealed, m.MANIFEST, f"schema version {version}; this release reads version 1")


def test_an_unknown_field_and_a_wrong_type_are_refused_by_name(bundle: Path) -> None:
    sealed = _seal(bundle, lambda manifest: manifest.update(surprise=1))
    _refused(sealed, m.MANIFEST, "surprise")
    sealed = _seal(sealed, lambda manifest: (manifest.pop("surprise"), manifest.update(key_epoch="one")))
    _refused(sealed, m.MANIFEST, r"\$\.key_epoch")


def test_a_manifest_that_is_not_json_and_one_that_is_not_there_are_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / m.MANIFEST).write_bytes(b"{")
    _refused(bundle, m.MANIFEST, "truncated")
    (bundle / m.MANIFEST).unlink()
    _refused(bundle, m.MANIFEST, "is missing")
    _refused(tmp_path / "nowhere", "", "no such directory")


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".pth", ".PKL", ".npy", ".bin", ".joblib", ".ckpt"])
def test_a_pickle_by_name_is_refused_whatever_it_holds(bundle: Path, suffix: str) -> None:
    (bundle / f"weights{suffix}").write_bytes(b"harmless")
    _refused(_seal(bundle), f"weights{suffix}", "pickle")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_under_another_name_is_refused(bundle: Path, protocol: int) -> None:
    (bundle / "ranker.onnx").write_bytes(pickle.dumps({"weights": [1.0]}, protocol))
    _refused(_seal(bundle), "ranker.onnx", "is a pickle")


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_of_the_first_protocols_does_not_pass_for_text(bundle: Path, protocol: int) -> None:
    (bundle / m.MODEL_CARD).write_bytes(pickle.dumps({"weights": [1.0]}, protocol))
    _refused(_seal(bundle), m.MODEL_CARD, "is a pickle")


def test_a_torch_archive_under_another_name_is_refused(bundle: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
    (bundle / "item_tables.safetensors").write_bytes(data.getvalue())
    _refused(_seal(bundle), "item_tables.safetensors", "zip archive")


def test_a_file_of_a_kind_we_do_not_know_is_refused(bundle: Path) -> None:
    (bundle / "setup.sh").write_text("echo")
    _refused(_seal(bundle), "setup.sh", "files only")


def _safetensors(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def _tensor(begin: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_safetensors({"a": _tensor(0, 8), "b": _tensor(4, 12)}, bytes(12)), "overlaps"),
        (_safetensors({"a": _tensor(0, 8), "b": _tensor(0, 8)}, bytes(8)), "overlaps"),
        (_safetensors({"a": _tensor(0, 4), "b": _tensor(8, 12)}, bytes(12)), "belong to no tensor"),
        (_safetensors({"a": _tensor(0, 4)}, bytes(8)), "tensors end at byte"),
        (_safetensors({"a": _tensor(0, 400)}, bytes(8)), "tensors end at byte"),
        (_safetensors({"a": _tensor(0, 8, shape=[3])}, bytes(8)), "do not fit"),
        (_safetensors({"a": _tensor(-4, 4, shape=[2])}, bytes(8)), "do not fit"),
        (_safetensors({"a": _tensor(0, 8, dtype="PICKLE")}, bytes(8)), "unknown type"),
        (_safetensors({"a": {"dtype": "F32"}}, bytes(8)), "wants dtype, shape and data_offsets"),
        (_safetensors({"a": _tensor(0, 8, shape=[-1, -2])}, bytes(8)), "whole numbers"),
        (_safetensors(b'{"a": {}, "a": {}}', bytes(8)), "stands twice"),
        (_safetensors(b"[]", bytes(8)), "not an object"),
        (_safetensors(b"{", bytes(8)), "not JSON"),
        (_safetensors(b"[" * 300_000, b""), "not JSON"),
        ((1 << 40).to_bytes(8, "little") + bytes(8), "cut short or too long"),
        (b"abc", "cut short or too long"),
    ],
)
def test_malformed_safetensors_are_refused(bundle: Path, data: bytes, reason: str) -> None:
    (bundle / "more.safetensors").write_bytes(data)
    _refused(_seal(bundle), "more.safetensors", reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tables: tables.pop("price"), "'price' is missing"),
        (lambda tables: tables.update(price=tables["price"][:-1]), "'price' is float32"),
        (lambda tables: tables.update(price=tables["price"].astype(np.float64)), "'price' is float64"),
        (lambda tables: tables.update(user_vectors=np.zeros(3, np.float32)), "no table 'user_vectors'"),
        (lambda tables: tables["vectors"].fill(np.nan), "'vectors' has numbers that are not finite"),
        (lambda tables: tables["neighbours"].fill(31), "'neighbours' goes up to 31; the last is 30"),
        (lambda tables: tables["neighbours"].fill(-1), "'neighbours' has numbers below 0"),
        (lambda tables: tables["category"].fill(10**6), "'category' goes up to 1000000"),
    ],
)
def test_tables_that_are_not_the_contracts_are_refused(
    bundle: Path, change: Callable[[dict[str, np.ndarray]], None], reason: str
) -> None:
    tables = load_file(bundle / m.ITEM_TABLES_FILE)
    change(tables)
    save_file(tables, bundle / m.ITEM_TABLES_FILE)
    _refused(_seal(bundle), m.ITEM_TABLES_FILE, reason)


def _external(tensor: TensorProto) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="../../etc/passwd")


def test_onnx_weights_outside_the_file_are_refused(bundle: Path) -> None:
    model = onnx.load(bundle / "ranker.onnx")
    _external(model.graph.initializer[0])
    (bundle / "ranker.onnx").write_bytes(model.SerializeToString())
    _refused(_seal(bundle), "ranker.onnx", "outside its file")


def test_onnx_weights_outside_the_file_are_found_in_a_constant_of_a_subgraph(bundle: Path) -> None:
    model = onnx.load(bundle / "ranker.onnx")
    hidden = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1])
    _external(hidden)
    constant = helper.make_node("Constant", [], ["c"], value=hidden)
    branch = helper.make_graph([constant], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["first"], ["x"], then_branch=branch, else_branch=branch))
    (bundle / "ranker.onnx").write_bytes(model.SerializeToString())
    _refused(_seal(bundle), "ranker.onnx", "'hidden' outside its file")


def test_an_onnx_file_that_is_none_is_refused(bundle: Path) -> None:
    (bundle / "ranker.onnx").write_bytes(b"\xff" * 64)
    _refused(_seal(bundle), "ranker.onnx", "is not an ONNX model")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda graph: setattr(graph.input[1], "name", "numbers"), "inputs are"),
        (lambda graph: setattr(graph.input[0].type.tensor_type, "elem_type", TensorProto.INT32), "is INT32"),
        (lambda graph: setattr(graph.input[1].type.tensor_type.shape.dim[1], "dim_value", 3), "has the shape"),
        (lambda graph: setattr(graph.output[0].type.tensor_type.shape.dim[0], "dim_value", 8), "no free batch axis"),
    ],
)
def test_a_model_with_another_signature_than_the_contracts_is_refused(
    bundle: Path, change: Callable[[onnx.GraphProto], None], reason: str
) -> None:
    model = onnx.load(bundle / "ranker.onnx")
    change(model.graph)
    (bundle / "ranker.onnx").write_bytes(model.SerializeToString())
    _refused(_seal(bundle), "ranker.onnx", reason)


def test_a_catalogue_of_another_length_or_without_titles_is_refused(bundle: Path) -> None:
    catalogue = pq.read_table(bundle / m.CATALOGUE)
    pq.write_table(catalogue.slice(0, 29), bundle / m.CATALOGUE)
    sealed = _seal(bundle)
    _refused(sealed, m.CATALOGUE, "has 29 rows; the feature schema has 30 items")
    pq.write_table(catalogue.drop_columns(["title"]), sealed / m.CATALOGUE)
    sealed = _seal(sealed)
    _refused(sealed, m.CATALOGUE, "'title' is missing")
    (sealed / m.CATALOGUE).write_bytes(b"PAR0")
    _refused(_seal(sealed), m.CATALOGUE, "is not a Parquet file")


@pytest.mark.parametrize("column", ["item", "title"])
@pytest.mark.parametrize(
    "values",
    [list(range(30)), [[str(n)] for n in range(30)], [None, *map(str, range(29))]],
    ids=["ints", "lists", "null"],
)
def test_a_catalogue_whose_ids_or_texts_are_none_is_refused(bundle: Path, column: str, values: list[Any]) -> None:
    catalogue = pq.read_table(bundle / m.CATALOGUE)
    place = catalogue.column_names.index(column)
    pq.write_table(catalogue.set_column(place, column, pa.array(values)), bundle / m.CATALOGUE)
    sealed = _seal(bundle)
    if None in values and column == "title":
        assert verify(sealed)  # nobody gave one
    else:
        _refused(sealed, m.CATALOGUE, f"the column '{column}'")


def test_json_that_is_nested_too_deep_to_be_read_is_refused(bundle: Path) -> None:
    (bundle / "more.json").write_bytes(b"[" * 200_000 + b"]" * 200_000)
    _refused(_seal(bundle), "more.json", "is not JSON")


def test_an_index_of_another_kind_or_size_is_refused(bundle: Path) -> None:
    data = (bundle / m.ANN).read_bytes()
    (bundle / m.ANN).write_bytes(b"IxPy" + data[4:])
    sealed = _seal(bundle)
    _refused(sealed, m.ANN, "no faiss index of a kind we build")
    (sealed / m.ANN).write_bytes(data[:8] + (31).to_bytes(8, "little") + data[16:])
    _refused(_seal(sealed), m.ANN, "holds 31 vectors of 64")


def test_a_feature_schema_that_is_none_is_refused(bundle: Path) -> None:
    (bundle / m.FEATURES).write_text("{}")
    _refused(_seal(bundle), m.FEATURES, "missing required field")


def test_text_in_a_catalogue_is_never_run(bundle: Path) -> None:
    """A title that looks like an exploit is only a title: nothing in the catalogue is a reason to refuse."""
    catalogue = pq.read_table(bundle / m.CATALOGUE)
    titles = pa.array(["__import__('os').system('true')"] * 30)
    place = catalogue.column_names.index("title")
    pq.write_table(catalogue.set_column(place, "title", titles), bundle / m.CATALOGUE)
    assert verify(_seal(bundle))
