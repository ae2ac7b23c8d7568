"""Bundles with one fault each, made of a good one: what a careless or hostile publisher could bring into the registry.

They are put there past the desk's own checks, which would refuse most of them: here the sites are tried. It knows
bundles and the models bucket, and no process.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rankbridge.drills.scene import BadBundle
from workloads.bundle import manifest as manifests
from workloads.bundle.signature import make_key, sign
from workloads.contract.storage import manifest_key, object_key, signature_key
from workloads.contract.tensors import RANKER

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_RANKER: Final = f"{RANKER.role}.onnx"
_CARD: Final = manifests.MODEL_CARD
_WIDTH: Final = 2048
"""Of the matrices that make a ranker slow."""
_PRODUCTS: Final = 12


def twin(good: Path, folder: Path, mark: str) -> Path:
    """A bundle as good as `good`, with another model card and so another id, in `folder`."""
    fresh = _copied(good, folder / f".{mark}")
    card = fresh / _CARD
    text = card.read_text()
    card.unlink()  # a hard link to the good one's file: it must not change
    card.write_text(f"{text}\n<!-- {mark} -->\n")
    return _named(fresh, (_CARD,))


def make(good: Path, folder: Path, what: BadBundle) -> Path:
    """A bundle with this fault in `folder`, complete but for it; what is to be cut short is so in the store alone."""
    fresh = _copied(twin(good, folder, f"drill {what.value}"), folder / f".{what.value}")
    if what in {BadBundle.SHAPE, BadBundle.NAN, BadBundle.SLOW}:
        model = fresh / _RANKER
        data = _spoilt(model, what)
        model.unlink()
        model.write_bytes(data)
    return _named(fresh, (_RANKER,))


def put(client: S3Client, bucket: str, bundle: Path, what: BadBundle | None, *, key: Path, scratch: Path) -> None:
    """Sign a bundle (a stranger's key where that is its fault) and put all of it into the bucket, unchecked."""
    if what is BadBundle.SIGNATURE:
        key = make_key(scratch / "stranger.key").private
    signature = sign(bundle, key, signature=scratch / f"{bundle.name}.sig")
    manifest = manifests.decode((bundle / manifests.MANIFEST).read_bytes())
    for name, entry in manifest.files.items():
        data = (bundle / name).read_bytes()
        if what is BadBundle.TRUNCATED and name == _CARD:  # the one object that no good bundle has
            data = data[: len(data) // 2]
        client.put_object(Bucket=bucket, Key=object_key(entry.sha256), Body=data)
    client.put_object(Bucket=bucket, Key=manifest_key(bundle.name), Body=(bundle / manifests.MANIFEST).read_bytes())
    client.put_object(Bucket=bucket, Key=signature_key(bundle.name), Body=signature.read_bytes())


def _copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def _named(folder: Path, changed: tuple[str, ...]) -> Path:
    """With a manifest that tells the truth about the changed files, under its id."""
    path = folder / manifests.MANIFEST
    manifest = manifests.decode(path.read_bytes())
    files = dict(manifest.files)
    for name in changed:
        data = (folder / name).read_bytes()
        files[name] = manifests.FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    encoded = manifests.encode(manifests.make(manifest, files))
    path.unlink()
    path.write_bytes(encoded)
    final = folder.with_name(manifests.identity(encoded))
    shutil.rmtree(final, ignore_errors=True)
    return folder.rename(final)


def _spoilt(model: Path, what: BadBundle) -> bytes:
    """The ranker's graph with a fault in it."""
    import numpy as np  # noqa: PLC0415 - a drill needs it, the command line does not
    import onnx  # noqa: PLC0415 - as above
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    loaded = onnx.load(model)
    graph = loaded.graph
    output = graph.output[0].name
    if what is BadBundle.SHAPE:
        dense = next(one for one in graph.input if one.type.tensor_type.elem_type == TensorProto.FLOAT)
        dense.type.tensor_type.shape.dim[-1].dim_value += 1
        return bytes(loaded.SerializeToString())
    for node in graph.node:
        node.output[:] = ["drill_score" if name == output else name for name in node.output]
    if what is BadBundle.NAN:
        graph.initializer.append(numpy_helper.from_array(np.array(np.nan, dtype=np.float32), "drill_nan"))
        graph.node.append(helper.make_node("Mul", ["drill_score", "drill_nan"], [output]))
        return bytes(loaded.SerializeToString())
    # Much arithmetic whose result is nothing: [B, 1] -> [B, W] -> ... -> [B, 1], times 0, added to the score.
    for name, array in (
        ("drill_widen", np.full((1, _WIDTH), 0.5, dtype=np.float32)),
        ("drill_square", np.full((_WIDTH, _WIDTH), 1.0 / _WIDTH, dtype=np.float32)),
        ("drill_narrow", np.full((_WIDTH, 1), 1.0 / _WIDTH, dtype=np.float32)),
        ("drill_zero", np.array(0.0, dtype=np.float32)),
        ("drill_column", np.array([-1, 1], dtype=np.int64)),
    ):
        graph.initializer.append(numpy_helper.from_array(array, name))
    graph.node.append(helper.make_node("Reshape", ["drill_score", "drill_column"], ["drill_0"]))
    graph.node.append(helper.make_node("MatMul", ["drill_0", "drill_widen"], ["drill_1"]))
    for number in range(1, _PRODUCTS + 1):
        graph.node.append(helper.make_node("MatMul", [f"drill_{number}", "drill_square"], [f"drill_{number + 1}"]))
    last = f"drill_{_PRODUCTS + 1}"
    graph.node.append(helper.make_node("MatMul", [last, "drill_narrow"], ["drill_flat"]))
    graph.node.append(helper.make_node("Mul", ["drill_flat", "drill_zero"], ["drill_nothing"]))
    graph.node.append(helper.make_node("Shape", ["drill_score"], ["drill_form"]))
    graph.node.append(helper.make_node("Reshape", ["drill_nothing", "drill_form"], ["drill_addend"]))
    graph.node.append(helper.make_node("Add", ["drill_score", "drill_addend"], [output]))
    return bytes(loaded.SerializeToString())
