"""A model that Triton's Python backend runs on a CPU node: ONNX Runtime behind Triton's interface.

Copied as `model.py` into a rendered repository and run by Triton's own Python, so it imports nothing
of this project. Everything that it must know stands in the model's configuration, which was rendered
from the contract: names and types of inputs and outputs, and parameters. `inject_delay_ms` sleeps that
long before each batch: the planted fault of a rehearsal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Read when ONNX Runtime is loaded: without it, it reports to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
import triton_python_backend_utils as pb

MODEL_FILE = "model.onnx"
NUMPY_1 = int(np.__version__.partition(".")[0]) < 2
"""This Triton's stub was built for numpy 1 and misreads numpy 2's arrays: under Python 3.13, for which there is no
numpy 1, tensors cross by DLPack (https://dmlc.github.io/dlpack) instead."""


class TritonPythonModel:
    """The class that the Python backend looks for. One instance is one process, with one thread for arithmetic."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the ONNX model beside this file. Raises when it is missing or its inputs are not the configured ones."""
        if not NUMPY_1:
            sys.unraisablehook = _quiet
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]
        if self._inputs != [entry.name for entry in self._session.get_inputs()]:
            raise ValueError(f"{folder / MODEL_FILE} has other inputs than the configuration: {self._inputs}")
        parameters = config.get("parameters", {})
        self._delay_s = float(parameters.get("inject_delay_ms", {}).get("string_value", "0")) / 1000

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; those of one batch run as one. [B, F] in, [B, 1] out.

        A request with NaN or infinity in it, or that the model refuses (an index outside a table),
        is answered with an error; the others of its batch are not.
        """
        if self._delay_s:
            time.sleep(self._delay_s)
        feeds = [
            {name: _array(pb.get_input_tensor_by_name(request, name)) for name in self._inputs} for request in requests
        ]
        results: list[list[np.ndarray[Any, Any]] | str] = [_fault(feed) or [] for feed in feeds]
        sound = [place for place, result in enumerate(results) if not result]
        try:
            self._run_together(feeds, sound, results)
        except Exception as error:  # ONNX Runtime raises many kinds, and none may end the process
            for place in sound:
                results[place] = self._run_alone(feeds[place]) if len(sound) > 1 else str(error)
        return [self._response(result) for result in results]

    def finalize(self) -> None:
        """Nothing is held but memory."""

    def _run_together(
        self,
        feeds: list[dict[str, np.ndarray[Any, Any]]],
        places: list[int],
        results: list[list[np.ndarray[Any, Any]] | str],
    ) -> None:
        if len(places) == 1:  # the usual case: nothing to copy together
            results[places[0]] = self._session.run(self._outputs, feeds[places[0]])
        elif places:
            joined = {name: np.concatenate([feeds[place][name] for place in places]) for name in self._inputs}
            outputs = self._session.run(self._outputs, joined)
            ends = np.cumsum([len(feeds[place][self._inputs[0]]) for place in places])[:-1]
            parts = [np.split(output, ends) for output in outputs]
            for number, place in enumerate(places):
                results[place] = [part[number] for part in parts]

    def _run_alone(self, feed: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]] | str:
        try:
            return list(self._session.run(self._outputs, feed))
        except Exception as error:
            return str(error)

    def _response(self, result: list[np.ndarray[Any, Any]] | str) -> Any:  # noqa: ANN401 - Triton's type
        if isinstance(result, str):
            return pb.InferenceResponse(output_tensors=[], error=pb.TritonError(result, pb.TritonError.INVALID_ARG))
        tensors = [_tensor(name, array) for name, array in zip(self._outputs, result, strict=True)]
        return pb.InferenceResponse(output_tensors=tensors)


def _array(tensor: Any) -> np.ndarray[Any, Any]:  # noqa: ANN401 - Triton's type
    return tensor.as_numpy() if NUMPY_1 else np.from_dlpack(tensor)


def _tensor(name: str, array: np.ndarray[Any, Any]) -> Any:  # noqa: ANN401 - Triton's type
    return pb.Tensor(name, array) if NUMPY_1 else pb.Tensor.from_dlpack(name, np.ascontiguousarray(array))


def _quiet(unraisable: Any, usual: Any = sys.unraisablehook) -> None:  # noqa: ANN401 - the hook's own type is private
    """The stub renames a capsule that it consumed to a name that numpy does not know: one report per output."""
    if "PyCapsule_GetPointer called with incorrect name" not in str(unraisable.exc_value):
        usual(unraisable)


def _fault(feed: dict[str, np.ndarray[Any, Any]]) -> str | None:
    for name, array in feed.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"{name} holds NaN or infinity"
    return None
