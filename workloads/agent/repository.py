"""A Triton model repository rendered from a bundle, for one class of site. Knows no server.

Everything in it follows from `contract.tensors` and the bundle: the same ONNX file for each class, run
by the onnxruntime backend of Triton's image on a GPU node, and by the Python backend (onnxruntime in
Triton's own Python) where the server is the CPU build without an onnxruntime backend.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from workloads.agent.injection import NOTHING_INJECTED, Injection
from workloads.contract.sites import SiteClass
from workloads.contract.tensors import RANKER, Signature, TensorSpec

SERVED: Final[tuple[Signature, ...]] = (RANKER,)
"""Models that Triton serves; the towers run inside retrieval, the student inside the gateway."""
VERSION: Final = "1"
MODEL_FILE: Final = "model.onnx"
INCOMING: Final = ".incoming-"
"""How what is being written here is called until it is whole."""
BACKEND_SOURCE: Final = Path(__file__).with_name("ranker_backend.py")

_DATA_TYPES: Final[Mapping[str, str]] = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}


def render_repository(
    bundle: Path, repository: Path, site_class: SiteClass, injection: Injection = NOTHING_INJECTED
) -> tuple[str, ...]:
    """Write the models of the bundle in this directory into `repository` and return their Triton names.

    Each model's directory appears by one rename; one that is there and right stays as it is. Other
    bundles' models are not touched. Raises ValueError when the class cannot do what is injected.
    """
    if injection.ranker_delay_ms and site_class is not SiteClass.CPU:
        raise ValueError("ranker-delay can be injected at a site of class cpu only: the delay is in its Python backend")
    repository.mkdir(parents=True, exist_ok=True)
    names = []
    for signature in SERVED:
        name = signature.triton_name(bundle.name)
        files = {"config.pbtxt": config(signature, name, site_class, injection).encode()}
        if site_class is SiteClass.CPU:
            files[f"{VERSION}/model.py"] = BACKEND_SOURCE.read_bytes()
        _place(repository / name, files, bundle / f"{signature.role}.onnx")
        names.append(name)
    return tuple(names)


def config(signature: Signature, name: str, site_class: SiteClass, injection: Injection = NOTHING_INJECTED) -> str:
    """`config.pbtxt` of a model (protobuf text format of Triton's ModelConfig), complete without auto-completion.

    On a GPU batches form from what waits, and nothing waits for a batch to form. On a CPU arithmetic
    grows with the batch, and the batcher's own thread costs each request 0.2 ms: there is none. No
    queue policy (size, timeout) is ever set: with one, Triton 2.51 to 2.71 now and then loses a wake-up
    and lets a request lie for 500 ms (triton-inference-server/server issues 5783, 6796 and 8870).
    """
    cpu = site_class is SiteClass.CPU
    entries = [
        f"name: {json.dumps(name)}",
        f"backend: {json.dumps('python' if cpu else 'onnxruntime')}",
        *([] if cpu else [f"default_model_filename: {json.dumps(MODEL_FILE)}"]),
        f"max_batch_size: {signature.max_batch}",
        *(f"input {_tensor(spec)}" for spec in signature.inputs),
        *(f"output {_tensor(spec)}" for spec in signature.outputs),
        f"instance_group [ {{ count: 1 kind: {'KIND_CPU' if cpu else 'KIND_GPU'} }} ]",
        f"version_policy {{ specific {{ versions: [ {VERSION} ] }} }}",
        *([] if cpu else ["dynamic_batching { }"]),
    ]
    if signature is RANKER and injection.ranker_delay_ms:
        value = json.dumps(f"{injection.ranker_delay_ms:g}")
        entries.append(f'parameters {{ key: "inject_delay_ms" value {{ string_value: {value} }} }}')
    return "\n".join(entries) + "\n"


def _tensor(spec: TensorSpec) -> str:
    # Triton has no model input without an axis beside the batch; a scalar is an axis of one.
    dims = ", ".join(map(str, spec.shape or (1,)))
    reshape = "" if spec.shape else " reshape { shape: [ ] }"
    return f"[ {{ name: {json.dumps(spec.name)} data_type: {_DATA_TYPES[spec.dtype]} dims: [ {dims} ]{reshape} }} ]"


def _place(target: Path, files: Mapping[str, bytes], model: Path) -> None:
    """Let `target` hold these files and the model, by one rename."""
    if _is_placed(target, files, model):
        return
    fresh = target.with_name(f"{INCOMING}{uuid.uuid4().hex[:8]}")
    try:
        (fresh / VERSION).mkdir(parents=True)
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        try:
            os.link(model, fresh / VERSION / MODEL_FILE)  # the bundle's file never changes: no second copy
        except OSError:
            shutil.copyfile(model, fresh / VERSION / MODEL_FILE)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _is_placed(target: Path, files: Mapping[str, bytes], model: Path) -> bool:
    # The Python backend leaves bytecode beside model.py.
    there = {
        path.relative_to(target).as_posix()
        for path in target.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    placed = target / VERSION / MODEL_FILE
    return (
        there == {*files, f"{VERSION}/{MODEL_FILE}"}
        and all((target / name).read_bytes() == data for name, data in files.items())
        and (placed.samefile(model) or placed.read_bytes() == model.read_bytes())
    )
