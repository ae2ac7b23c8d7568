"""From a torch module to an ONNX file that keeps its signature: names, order, types, a free batch axis.

Portable on purpose: standard operators of one opset, weights inside the file, nothing folded for one
machine. It knows nothing of what the models mean.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from workloads.bundle.tables import Array
from workloads.contract.tensors import Signature

OPSET: Final = 20
"""The first with Gelu as an operator; read by the ONNX Runtime of any Triton image that we may use."""
IR_VERSION: Final = 10
ONNXRUNTIME: Final = "1.18"
"""The first that reads both (https://onnxruntime.ai/docs/reference/compatibility.html)."""
EXAMPLE_BATCH: Final = 3
"""Not 1, which the exporter would take for a constant."""


def write_onnx(module: nn.Module, signature: Signature, path: Path) -> None:
    """Write `module` (in eval mode, its forward's parameters in the signature's order) to `path`.

    Raises ValueError when the module's parameters are not the signature's inputs, and what torch
    raises when it cannot export.
    """
    wanted = [spec.name for spec in signature.inputs]
    found = list(inspect.signature(module.forward).parameters)
    if found != wanted:
        raise ValueError(f"the {signature.role} takes {found}; the contract says {wanted}")
    examples = tuple(
        torch.ones((EXAMPLE_BATCH, *spec.shape), dtype=getattr(torch, spec.dtype)) for spec in signature.inputs
    )
    batch = torch.export.Dim("batch", min=1, max=signature.max_batch)
    # It says once for each model that torchvision is not installed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        torch.export.export(module, examples, dynamic_shapes={name: {0: batch} for name in found}),
        input_names=wanted,
        output_names=[spec.name for spec in signature.outputs],
        opset_version=OPSET,
        dynamo=True,
        optimize=True,
        verbose=False,
    )
    if program is None:
        raise ValueError(f"torch made nothing of the {signature.role}")
    model = plain(program.model_proto, signature.role)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def plain(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Without what a tool says about its sources (file names, stack traces), the batch axis named."""
    model.producer_name, model.producer_version, model.ir_version = "rankbridge", "", IR_VERSION
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = name, ""
    del graph.metadata_props[:]
    del graph.value_info[:]  # shapes of what is in between; readers infer them
    parts: tuple[onnx.NodeProto | onnx.TensorProto | onnx.ValueInfoProto, ...] = (
        *graph.node,
        *graph.initializer,
        *graph.input,
        *graph.output,
    )
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


class Runner:
    """An ONNX file in ONNX Runtime, opened as it is online: one thread."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: dict[str, Array]) -> Array:
        """The first output for one batch."""
        result: Any = self._session.run(None, inputs)
        return result[0]  # type: ignore[no-any-return]  # onnxruntime publishes no types

    def run_in_batches(self, inputs: dict[str, Array], most: int) -> Array:
        """The same for any number of rows, in batches of 1, 7 and then at most `most`: a fixed axis would show."""
        rows = len(next(iter(inputs.values())))
        ends = [0, min(1, rows), min(8, rows)]
        while ends[-1] < rows:
            ends.append(min(ends[-1] + most, rows))
        return np.concatenate(
            [
                self.run({name: values[start:end] for name, values in inputs.items()})
                for start, end in itertools.pairwise(ends)
                if end > start
            ]
        )
