"""The Python backend's model: batches run as one, and a bad request spoils no other."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from workloads.agent.injection import Injection
from workloads.agent.repository import BACKEND_SOURCE, render_repository
from workloads.contract.sites import SiteClass
from workloads.contract.tensors import RANKER, RANKER_DENSE, RANKER_SPARSE


class Tensor:
    """Triton's tensor, with both ways in and out."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name = name
        self.array = array

    def as_numpy(self) -> np.ndarray:
        return self.array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)  # type: ignore[arg-type]  # handed on

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    @classmethod
    def from_dlpack(cls, name: str, source: np.ndarray) -> "Tensor":
        return cls(name, np.from_dlpack(source))


class Response:
    """Triton's response."""

    def __init__(self, output_tensors: list[Tensor], error: "Error | None" = None) -> None:
        self.output_tensors = output_tensors
        self.error = error


class Error:
    """Triton's error."""

    INVALID_ARG = 3

    def __init__(self, message: str, code: int) -> None:
        self.message = message
        self.code = code


@pytest.fixture(params=[True, False], ids=["numpy 1", "numpy 2"])
def backend(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> types.ModuleType:
    """The backend's source as Triton would import it, with Triton's module faked."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back what the backend replaces
    fake = types.ModuleType("triton_python_backend_utils")
    fake.Tensor = Tensor  # type: ignore[attr-defined] - a module made of parts
    fake.InferenceResponse = Response  # type: ignore[attr-defined] - as above
    fake.TritonError = Error  # type: ignore[attr-defined] - as above
    fake.get_input_tensor_by_name = lambda request, name: request[name]  # type: ignore[attr-defined] - as above
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    spec = importlib.util.spec_from_file_location("model", BACKEND_SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "NUMPY_1", request.param)
    return module


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    (name,) = render_repository(made, tmp_path, SiteClass.CPU, Injection())
    return tmp_path / name


def _model(backend: types.ModuleType, folder: Path, **parameters: str) -> Any:  # noqa: ANN401 - its class is made at run time
    model = backend.TritonPythonModel()
    config = {
        "input": [{"name": spec.name} for spec in RANKER.inputs],
        "output": [{"name": spec.name} for spec in RANKER.outputs],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }
    model.initialize({"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"})
    return model


def _request(rows: int, seed: int = 0) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    sparse = random.integers(0, 60, (rows, len(RANKER_SPARSE)))
    dense = random.normal(size=(rows, len(RANKER_DENSE))).astype(np.float32)
    return {"sparse": Tensor("sparse", sparse), "dense": Tensor("dense", dense)}


def _expected(folder: Path, request: dict[str, Tensor]) -> np.ndarray:
    session = ort.InferenceSession(folder / "1/model.onnx")
    return np.asarray(session.run(None, {name: tensor.array for name, tensor in request.items()})[0])


def test_each_request_of_a_batch_gets_its_own_rows(backend: types.ModuleType, folder: Path) -> None:
    requests = [_request(rows, seed) for seed, rows in enumerate((3, 1, 200))]
    for response, request in zip(_model(backend, folder).execute(requests), requests, strict=True):
        assert response.error is None
        np.testing.assert_allclose(response.output_tensors[0].array, _expected(folder, request), rtol=1e-6)
        assert response.output_tensors[0].name == "probability"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_request_that_is_not_finite_is_refused_and_its_neighbours_are_answered(
    backend: types.ModuleType, folder: Path, bad: float
) -> None:
    requests = [_request(4, 1), _request(4, 2), _request(4, 3)]
    requests[1]["dense"].array[2, 5] = bad
    good, refused, also_good = _model(backend, folder).execute(requests)
    assert refused.error.message == "dense holds NaN or infinity"
    assert refused.error.code == Error.INVALID_ARG
    np.testing.assert_allclose(good.output_tensors[0].array, _expected(folder, requests[0]), rtol=1e-6)
    np.testing.assert_allclose(also_good.output_tensors[0].array, _expected(folder, requests[2]), rtol=1e-6)


def test_numbers_whose_sum_overflows_are_still_finite(backend: types.ModuleType, folder: Path) -> None:
    request = _request(4)
    request["dense"].array[:] = 3e38
    (response,) = _model(backend, folder).execute([request])
    assert response.error is None


def test_an_index_outside_a_table_is_refused_and_its_neighbours_are_answered(
    backend: types.ModuleType, folder: Path
) -> None:
    requests = [_request(4, 1), _request(4, 2)]
    requests[0]["sparse"].array[0, 0] = 10**6
    refused, good = _model(backend, folder).execute(requests)
    assert refused.error is not None
    np.testing.assert_allclose(good.output_tensors[0].array, _expected(folder, requests[1]), rtol=1e-6)
    (alone,) = _model(backend, folder).execute(requests[:1])
    assert alone.error is not None


def test_an_injected_delay_is_slept_once_for_each_batch(
    backend: types.ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(backend.time, "sleep", slept.append)
    _model(backend, folder, inject_delay_ms="80").execute([_request(1), _request(2)])
    _model(backend, folder).execute([_request(1)])
    assert slept == [0.08]


def test_a_model_file_with_other_inputs_does_not_load(backend: types.ModuleType, folder: Path, made: Path) -> None:
    (folder / "1/model.onnx").unlink()
    (folder / "1/model.onnx").write_bytes((made / "query_tower.onnx").read_bytes())
    with pytest.raises(ValueError, match="other inputs"):
        _model(backend, folder)


def test_the_backend_needs_nothing_of_this_project() -> None:
    assert "workloads" not in BACKEND_SOURCE.read_text()
    assert "rankbridge" not in BACKEND_SOURCE.read_text()
