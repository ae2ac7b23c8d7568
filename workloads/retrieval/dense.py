"""Vectors: the towers that make one of a user or a query, and the index that finds items near one.

Everything runs on the caller's thread: a request is a few hundred microseconds of arithmetic, and pools
of threads would only fight over the cores with the site's other processes. Knows no request.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, Final, Protocol

import faiss
import numpy as np
import numpy.typing as npt
import onnxruntime

from workloads.bundle.session import open_session
from workloads.contract.tensors import Signature
from workloads.data.fusion import Proposals

Vector = npt.NDArray[np.float32]

ONNXRUNTIME: Final[str] = onnxruntime.__version__
"""What towers run in here."""


class ModelFault(Exception):  # noqa: N818 - as BundleFault
    """A file of the bundle is not the model or index that the contract describes."""


class Tower(Protocol):
    """Makes a vector."""

    def vector(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Vector | None:
        """The vector [VECTOR_DIM] of one row of inputs; None when the model gives no finite one."""
        ...


class Nearest(Protocol):
    """Finds items by vector."""

    def search(self, vector: Vector, count: int) -> Proposals:
        """The items with the largest dot products, best first, at most `count`."""
        ...


class OnnxTower:
    """A tower of the bundle under ONNX Runtime. Raises ModelFault when it is not what `signature` says."""

    def __init__(self, path: pathlib.Path, signature: Signature) -> None:
        try:
            self._session = open_session(path)
        except Exception as error:  # its exceptions have no base class of their own
            raise ModelFault(f"{path.name} cannot be loaded: {error}") from error
        found = {spec.name for spec in self._session.get_inputs()}
        wanted = {spec.name for spec in signature.inputs}
        if found != wanted:
            raise ModelFault(f"{path.name} takes {sorted(found)}, the contract says {sorted(wanted)}")
        self._outputs = [signature.outputs[0].name]

    def vector(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Vector | None:
        """See Tower."""
        vector: Vector = self._session.run(self._outputs, inputs)[0][0]
        return vector if np.isfinite(vector).all() else None


class AnnIndex:
    """The bundle's faiss index and, behind its items, the vectors of those that came with deltas.

    `added` [k, dimension] goes in in memory, the file stays as it is. Raises ModelFault when the index cannot
    be read or holds another number of items.
    """

    def __init__(self, path: pathlib.Path, items: int, dimension: int, added: Vector | None = None) -> None:
        faiss.omp_set_num_threads(1)
        try:
            self._index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ModelFault(f"{path.name} cannot be read: {error}") from error
        if (self._index.ntotal, self._index.d) != (items, dimension):
            raise ModelFault(
                f"{path.name} holds {self._index.ntotal} vectors of {self._index.d}, expected {items} of {dimension}"
            )
        if added is not None and len(added):
            self._index.add(np.ascontiguousarray(added, np.float32))

    def search(self, vector: Vector, count: int) -> Proposals:
        """See Nearest."""
        scores, places = self._index.search(vector[None, :], min(count, self._index.ntotal))
        found = places[0] >= 0  # approximate indices fill up with -1
        return places[0][found].astype(np.int32) + 1, scores[0][found]


class FixedTower:
    """The fake tower: always the same vector, and what it was asked last."""

    def __init__(self, vector: Vector | None) -> None:
        self.given = vector
        self.asked: Mapping[str, npt.NDArray[Any]] = {}

    def vector(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Vector | None:
        """See Tower."""
        self.asked = inputs
        return self.given


class ExactNearest:
    """The fake index: every dot product with the table [N+1, D], sorted; ties go to the lower item."""

    def __init__(self, vectors: Vector) -> None:
        self._vectors = vectors

    def search(self, vector: Vector, count: int) -> Proposals:
        """See Nearest."""
        scores = self._vectors[1:] @ vector
        order = np.argsort(-scores, kind="stable")[:count]
        return (order + 1).astype(np.int32), scores[order].astype(np.float32)
