"""From an ONNX file in float32 to the same graph with 8 bit weights and 8 bit products, in standard operators.

Static, with QuantizeLinear and DequantizeLinear around each matrix product (QDQ): a row's answer then depends on that
row alone, where ranges found at run time would make it depend on its neighbours in the batch. Weights are int8, one
scale per output, held to 7 bits: on x86 without VNNI, ONNX Runtime adds pairs of products in 16 bits, and a sum that
overflows there would not overflow elsewhere. Products leave as float32: the last one is the answer, and 256 levels of
it would be ties. Embeddings stay float32; looking them up costs no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from workloads.bundle.tables import Array
from workloads.export.graphs import plain

PRODUCTS: Final = ("MatMul", "Gemm")


class _Samples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime publishes no types
    """Batches of real inputs, each once."""

    def __init__(self, batches: list[dict[str, Array]]) -> None:
        self._left: Iterator[dict[str, Array]] = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._left, None)


def quantise(source: Path, target: Path, batches: list[dict[str, Array]]) -> None:
    """Write the model `source` to `target` with every matrix product in 8 bits.

    The ranges of what is multiplied come from `batches` of real inputs by name, at least one. Raises ValueError when
    a product is left in float32.
    """
    prepared = target.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _Samples(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": list(PRODUCTS)},
        )
    finally:
        prepared.unlink(missing_ok=True)
    made = onnx.load(target)
    model = plain(made, made.graph.name)
    if wide := wide_products(model):
        raise ValueError(f"the products {wide} were left in float32")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


def wide_products(model: onnx.ModelProto) -> list[str]:
    """The matrix products of a graph that are not of an 8 bit input with int8 weights, by their output's name."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    kinds = {weight.name: weight.data_type for weight in model.graph.initializer}

    def narrow(node: onnx.NodeProto) -> bool:
        inputs = [made_by.get(name) for name in node.input[:2]]
        if any(one is None or one.op_type != "DequantizeLinear" for one in inputs):
            return False
        values, weights = (one.input[0] for one in inputs if one is not None)
        quantised = made_by.get(values)
        return (
            quantised is not None
            and quantised.op_type == "QuantizeLinear"
            and kinds.get(weights) == onnx.TensorProto.INT8
        )

    return [node.output[0] for node in model.graph.node if node.op_type in PRODUCTS and not narrow(node)]
