"""Is this directory a bundle, whole, unaltered and safe to open? Refuses with the file and the reason.

Digests say that bytes are the ones that were written; the checks of form say that opening them can
run nothing and read nothing from elsewhere: no pickle under any name, no link, no path that leaves
the directory, no ONNX with weights outside its file. Who wrote the bundle is not known here.
"""

from __future__ import annotations

import hashlib
import os
import pickletools
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from workloads.bundle import manifest as m
from workloads.bundle.probes import open_probes
from workloads.bundle.tables import item_tables_fault, item_values_fault, open_tables, read_header
from workloads.contract.tensors import VECTOR_DIM, FeatureSchema, Signature, TensorSpec

if TYPE_CHECKING:
    import onnx

MANIFEST_MAX: Final = 4 << 20
"""Bytes."""
SUFFIXES: Final = frozenset({".json", ".md", ".onnx", ".parquet", ".safetensors", ".faiss"})
PICKLE_SUFFIXES: Final = frozenset(
    {".pkl", ".pickle", ".pt", ".pt2", ".pth", ".ckpt", ".bin", ".joblib", ".npy", ".npz", ".dill"}
)
FAISS_KINDS: Final[Mapping[bytes, str]] = {b"IxFI": "flat", b"IHNf": "hnsw"}
"""First four bytes of the index kinds that export builds (faiss/impl/index_write.cpp)."""


class BundleFault(ValueError):  # noqa: N818 - a fault is what the domain calls it
    """A directory that is not a bundle that may be opened: which file, and why."""

    def __init__(self, bundle: Path, file: str, reason: str) -> None:
        super().__init__(f"{bundle / file if file else bundle}: {reason}")
        self.file = file
        self.reason = reason
        self.remedy = "export the bundle again, or copy it again from the site that made it"


def verify(bundle: Path) -> m.Manifest:
    """The manifest of a bundle all of whose files are what it says. Raises BundleFault at the first that is not."""
    bundle = bundle.resolve()
    manifest, identity = read_manifest(bundle)
    if bundle.name != identity:
        raise BundleFault(bundle, m.MANIFEST, f"its digest is {identity}, which is not the directory's name")
    check_content(bundle, manifest)
    return manifest


def read_manifest(bundle: Path) -> tuple[m.Manifest, str]:
    """The manifest and the id it stands for; files are not looked at. Raises BundleFault."""
    if not bundle.is_dir():
        raise BundleFault(bundle, "", "there is no such directory")
    path = bundle / m.MANIFEST
    if not is_plain_file(path):
        raise BundleFault(bundle, m.MANIFEST, "is missing, or is not a plain file")
    if path.stat().st_size > MANIFEST_MAX:
        raise BundleFault(bundle, m.MANIFEST, f"is larger than {MANIFEST_MAX} bytes")
    data = path.read_bytes()
    try:
        manifest = m.decode(data)
    except ValueError as error:
        raise BundleFault(bundle, m.MANIFEST, str(error)) from None
    for name in manifest.files:
        if fault := m.path_fault(name):
            raise BundleFault(bundle, m.MANIFEST, f"the path {name!r} {fault}")
    for role, parity in manifest.parity.items():
        if parity.max_abs_error > parity.limit or parity.top_k_agreement < parity.agreement_floor:
            raise BundleFault(bundle, m.MANIFEST, f"it says that the {role} failed its parity check")
    return manifest, m.identity(data)


def check_content(bundle: Path, manifest: m.Manifest) -> None:
    """Hold a directory against a manifest, file by file. Raises BundleFault."""
    for name in sorted(m.REQUIRED - set(manifest.files)):
        raise BundleFault(bundle, name, "every bundle has this file, and the manifest does not list it")
    check_files(bundle, manifest.files, m.MANIFEST)
    if manifest.files[m.FEATURES].sha256 != manifest.feature_schema_sha256:
        raise BundleFault(bundle, m.FEATURES, "is not the feature schema that the manifest names")
    features = read_features(bundle)
    for name in sorted(manifest.files):
        check = _BY_SUFFIX.get(Path(name).suffix)
        if check is not None:
            check(bundle, name, features)


def check_files(directory: Path, files: Mapping[str, m.FileEntry], manifest: str) -> None:
    """Exactly these files and the file named `manifest`, unaltered, and none that could run anything.

    `files` has passed `manifest.path_fault`. Raises BundleFault.
    """
    present = set(_walk(directory))
    for name in sorted(set(files) - present):
        raise BundleFault(directory, name, "is missing")
    for name in sorted(present - set(files) - {manifest}):
        raise BundleFault(directory, name, "is not in the manifest")
    for name, entry in sorted(files.items()):
        _check_digest(directory, name, entry)
    for name in sorted(files):
        _check_harmless(directory, name)


def read_features(bundle: Path) -> FeatureSchema:
    """`features.json`. Raises BundleFault."""
    try:
        return msgspec.json.decode((bundle / m.FEATURES).read_bytes(), type=FeatureSchema)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleFault(bundle, m.FEATURES, str(error)) from None


def is_plain_file(path: Path) -> bool:
    """Whether there is a file and it is neither a link nor anything else that only looks like one."""
    return path.exists() and stat.S_ISREG(path.lstat().st_mode)


def _walk(bundle: Path, below: str = "") -> Iterator[str]:
    """Every file under a bundle, relative; refuses what is neither a plain file nor a folder with something in it."""
    with os.scandir(bundle / below) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    if below and not found:
        raise BundleFault(bundle, below, "is a directory with nothing in it")
    for entry in found:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_symlink():
            raise BundleFault(bundle, name, "is a symbolic link; a bundle holds plain files only")
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(bundle, name)
        elif entry.is_file(follow_symlinks=False):
            yield name
        else:
            raise BundleFault(bundle, name, "is not a plain file")


def _check_digest(bundle: Path, name: str, entry: m.FileEntry) -> None:
    path = bundle / name
    size = path.stat().st_size
    if size != entry.size:
        what = "was cut short" if size < entry.size else "has grown"
        raise BundleFault(bundle, name, f"{what}: {size} bytes, the manifest says {entry.size}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        raise BundleFault(bundle, name, f"was altered: its sha256 is {digest}, the manifest says {entry.sha256}")


def _check_harmless(bundle: Path, name: str) -> None:
    """No pickle under any name, and nothing of a kind that we do not know how to open safely."""
    path = bundle / name
    suffix = Path(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise BundleFault(bundle, name, f"{suffix} files may hold pickles, which run code when they are opened")
    with path.open("rb") as file:
        start = file.read(2)
    if len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5:
        raise BundleFault(bundle, name, "is a pickle, which runs code when it is opened")
    if zipfile.is_zipfile(path):
        raise BundleFault(bundle, name, "is a zip archive, the form of torch's pickles; a bundle holds none")
    if suffix not in SUFFIXES:
        raise BundleFault(bundle, name, f"a bundle holds {', '.join(sorted(SUFFIXES))} files only")


def _check_json(bundle: Path, name: str, _features: FeatureSchema) -> None:
    try:
        msgspec.json.decode((bundle / name).read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleFault(bundle, name, f"is not JSON: {error}") from None


def _check_text(bundle: Path, name: str, _features: FeatureSchema) -> None:
    data = (bundle / name).read_bytes()
    if _is_pickle(data):
        raise BundleFault(bundle, name, "is a pickle, which runs code when it is opened")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleFault(bundle, name, f"is not UTF-8 text: {error}") from None


def _is_pickle(data: bytes) -> bool:
    """Whether an unpickler would read this to its end, also in the first protocols, which begin with no mark."""
    try:
        for _ in pickletools.genops(data):  # reads, and runs nothing
            pass
    except Exception:  # whatever its parts raise: text that means nothing to it
        return False
    return True


def _check_safetensors(bundle: Path, name: str, features: FeatureSchema) -> None:
    try:
        header = read_header(bundle / name)
    except ValueError as error:
        raise BundleFault(bundle, name, str(error)) from None
    if name == m.PROBES:
        try:
            open_probes(bundle / name)
        except ValueError as error:
            raise BundleFault(bundle, name, str(error)) from None
    if name == m.ITEM_TABLES_FILE:
        last = {
            "neighbours": features.items,
            "category": len(features.categories),
            "price_band": len(features.price_edges) + 1,
        }
        fault = item_tables_fault(header, features.items + 1) or item_values_fault(open_tables(bundle / name), last)
        if fault:
            raise BundleFault(bundle, name, fault)


def _check_parquet(bundle: Path, name: str, features: FeatureSchema) -> None:
    # Late: only who verifies needs it, and it takes 40 MB.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        metadata = pq.read_metadata(bundle / name)
    except (pa.ArrowException, OSError) as error:
        raise BundleFault(bundle, name, f"is not a Parquet file: {error}") from None
    if name != m.CATALOGUE:
        return
    if metadata.num_rows != features.items:
        raise BundleFault(bundle, name, f"has {metadata.num_rows} rows; the feature schema has {features.items} items")
    schema = metadata.schema.to_arrow_schema()
    for column in ("item", "title", "description", "category"):
        if column not in schema.names:
            raise BundleFault(bundle, name, f"the column {column!r} is missing")
        kind = schema.field(column).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
            raise BundleFault(bundle, name, f"the column {column!r} is {kind}, not text")
    try:
        nameless = pq.read_table(bundle / name, columns=["item"], use_threads=False).column("item").null_count
    except (pa.ArrowException, OSError) as error:
        raise BundleFault(bundle, name, f"cannot be read: {error}") from None
    if nameless:
        raise BundleFault(bundle, name, f"the column 'item' has {nameless} rows without a value")


def _check_faiss(bundle: Path, name: str, features: FeatureSchema) -> None:
    with (bundle / name).open("rb") as file:
        start = file.read(16)
    if start[:4] not in FAISS_KINDS:
        raise BundleFault(bundle, name, f"is no faiss index of a kind we build: it begins with {start[:4]!r}")
    width, count = int.from_bytes(start[4:8], "little"), int.from_bytes(start[8:16], "little")
    if (width, count) != (VECTOR_DIM, features.items):
        wanted = f"{features.items} vectors of {VECTOR_DIM}"
        raise BundleFault(bundle, name, f"holds {count} vectors of {width}, not {wanted}")


def _check_onnx(bundle: Path, name: str, _features: FeatureSchema) -> None:
    # Late: only who verifies needs them.
    import onnx  # noqa: PLC0415
    from google.protobuf.message import DecodeError  # noqa: PLC0415 - as above

    try:
        model = onnx.load(bundle / name, load_external_data=False)
    except DecodeError as error:
        raise BundleFault(bundle, name, f"is not an ONNX model: {error}") from None
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise BundleFault(bundle, name, f"keeps the weights {tensor.name!r} outside its file")
    if name in m.MODELS and (fault := _signature_fault(model.graph, m.MODELS[name])):
        raise BundleFault(bundle, name, fault)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initialisers and constants, in subgraphs and functions, too."""
    graphs = [model.graph]
    graphs += [info.initialization for info in model.training_info] + [info.algorithm for info in model.training_info]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs += attribute.graphs


def _signature_fault(graph: onnx.GraphProto, signature: Signature) -> str | None:
    """Where a graph's inputs or outputs differ from the contract: names, order, types, shapes, a free batch axis."""
    for what, found, wanted in (
        ("input", graph.input, signature.inputs),
        ("output", graph.output, signature.outputs),
    ):
        names = [value.name for value in found]
        if names != [spec.name for spec in wanted]:
            return f"its {what}s are {names}; the contract has {[spec.name for spec in wanted]}"
        for value, spec in zip(found, wanted, strict=True):
            if fault := _tensor_fault(value, spec):
                return f"its {what} {spec.name!r} {fault}"
    return None


def _tensor_fault(value: onnx.ValueInfoProto, spec: TensorSpec) -> str | None:
    import onnx  # noqa: PLC0415 - as in _check_onnx

    tensor = value.type.tensor_type
    code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    if tensor.elem_type != code:
        return f"is {onnx.TensorProto.DataType.Name(tensor.elem_type)}; the contract has {spec.dtype}"
    axes = list(tensor.shape.dim)
    if not axes or axes[0].HasField("dim_value"):
        return "has no free batch axis"
    rest = axes[1:]
    if tuple(axis.dim_value for axis in rest) != spec.shape:
        return f"has the shape {[axis.dim_value for axis in rest]} after the batch; the contract has {list(spec.shape)}"
    return None


_BY_SUFFIX: Final[Mapping[str, Callable[[Path, str, FeatureSchema], None]]] = {
    ".json": _check_json,
    ".md": _check_text,
    ".safetensors": _check_safetensors,
    ".parquet": _check_parquet,
    ".faiss": _check_faiss,
    ".onnx": _check_onnx,
}
