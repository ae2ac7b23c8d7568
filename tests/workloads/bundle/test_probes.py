"""Recorded requests: what is taken for them, and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from workloads.bundle.probes import open_probes, write_probes
from workloads.contract.tensors import RANKER, RANKER_DENSE, RANKER_SPARSE


def _tensors(rows: int = 5) -> dict[str, np.ndarray]:
    return {
        "sparse": np.zeros((rows, len(RANKER_SPARSE)), np.int64),
        "dense": np.arange(rows * len(RANKER_DENSE), dtype=np.float32).reshape(rows, -1),
        "probability": np.linspace(0, 1, rows, dtype=np.float32)[:, None],
    }


def test_what_was_recorded_is_read_and_batches_go_round(tmp_path: Path):
    tensors = _tensors()
    probability = tensors.pop("probability")
    write_probes(tmp_path / "p.safetensors", tensors, probability)
    probes = open_probes(tmp_path / "p.safetensors")
    inputs, expected = probes.batch(7, start=3)
    np.testing.assert_array_equal(expected, probability[[3, 4, 0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(inputs["dense"], tensors["dense"][[3, 4, 0, 1, 2, 3, 4]])
    assert len(probes) == 5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"probability": np.full((5, 1), np.nan, np.float32)}, "NaN"),
        ({"dense": np.full((5, len(RANKER_DENSE)), np.inf, np.float32)}, "NaN or infinity"),
        ({"probability": np.full((5, 1), 1.5, np.float32)}, "probability is none"),
        ({"probability": np.full((4, 1), 0.5, np.float32)}, "rows"),
        ({"sparse": np.zeros((5, len(RANKER_SPARSE)), np.int32)}, "the ranker takes int64"),
        ({"dense": np.zeros((5, 3), np.float32)}, "the ranker takes float32"),
        ({"more": np.zeros((5, 1), np.float32)}, "it holds"),
        (_tensors(RANKER.max_batch + 1), "rows"),
        ({name: value[:0] for name, value in _tensors().items()}, "rows"),
    ],
)
def test_anything_else_is_refused_with_the_reason(tmp_path: Path, change: dict[str, np.ndarray], why: str):
    save_file(_tensors() | change, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=why):
        open_probes(tmp_path / "p.safetensors")
