"""Recorded requests of a bundle's ranker: real inputs, and what the exported model answered when the bundle was made.

`probes.safetensors` holds the ranker's inputs and its output by their names in `contract.tensors.RANKER`, one row a
candidate. A site asks its own Triton the same and compares: that is how a bundle shows, on the very hardware that is to
serve it, that it is what it was. Knows no server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from workloads.bundle.tables import Array, Entry, open_tables, read_header
from workloads.contract.tensors import RANKER

ROWS: Final = 512
"""Recorded by export, where the data set has as many: more than any batch that is warmed up with."""


@dataclasses.dataclass(frozen=True)
class Probes:
    """Rows of the ranker's inputs, and its answers."""

    inputs: Mapping[str, Array]
    """By name, [P, ...]."""
    probability: Array
    """[P, 1]."""

    def __len__(self) -> int:
        return len(self.probability)

    def batch(self, rows: int, start: int = 0) -> tuple[dict[str, Array], Array]:
        """`rows` rows from `start` on, from the beginning again after the last: inputs and probabilities."""
        places = np.arange(start, start + rows) % len(self)
        return {name: values[places] for name, values in self.inputs.items()}, self.probability[places]


def write_probes(path: Path, inputs: Mapping[str, Array], probability: Array) -> None:
    """Write recorded requests. Raises ValueError when they are not what `open_probes` takes."""
    from safetensors.numpy import save_file  # noqa: PLC0415 - only makers of bundles have it

    output = RANKER.outputs[0].name
    save_file({name: np.ascontiguousarray(value) for name, value in {**inputs, output: probability}.items()}, path)
    open_probes(path)


def open_probes(path: Path) -> Probes:
    """The recorded requests of a bundle. Raises ValueError with the reason; OSError."""
    if fault := probes_fault(read_header(path)):
        raise ValueError(fault)
    arrays = open_tables(path)
    for name, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity")
    probability = arrays.pop(RANKER.outputs[0].name)
    if probability.min() < 0 or probability.max() > 1:
        raise ValueError("a recorded probability is none")
    return Probes(arrays, probability)


def probes_fault(header: Mapping[str, Entry]) -> str | None:
    """Why these tensors are not recorded requests of the ranker, or None."""
    wanted = {spec.name: spec for spec in (*RANKER.inputs, *RANKER.outputs)}
    if set(header) != set(wanted):
        return f"it holds {sorted(header)}, and the ranker has {sorted(wanted)}"
    rows = {shape[:1] for _, shape, _ in header.values()}
    if len(rows) != 1 or not min(rows) or not 1 <= min(rows)[0] <= RANKER.max_batch:
        return f"its tensors have {sorted(rows)} rows; one number, 1 to {RANKER.max_batch}, is wanted"
    for name, (dtype, shape, _) in header.items():
        spec = wanted[name]
        if np.dtype(dtype) != np.dtype(spec.dtype) or shape[1:] != spec.shape:
            found = f"{np.dtype(dtype).name}{list(shape[1:])}"
            return f"{name!r} is {found} a row; the ranker takes {spec.dtype}{list(spec.shape)}"
    return None
