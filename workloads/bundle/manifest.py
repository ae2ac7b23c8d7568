"""The manifest of a bundle: what is in it, how good it is, and what it was made from.

Its bytes are the bundle's identity: sha256 of `manifest.json`, in hex, is the id and the directory's
name. Encoding is canonical (sorted keys), so equal facts give equal ids. It opens no file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Final

import msgspec

from workloads.contract.quality import QualityReport
from workloads.contract.sites import SiteClass
from workloads.contract.tensors import SIGNATURES, Signature

SCHEMA_VERSION: Final = 1
ID_PATTERN: Final = r"^[0-9a-f]{64}$(?!\n)"
SHORT: Final = 12
"""Hex digits of an id that travel in answers and Triton model names."""

MANIFEST: Final = "manifest.json"
MODEL_CARD: Final = "MODEL_CARD.md"
FEATURES: Final = "features.json"
CATALOGUE: Final = "items.parquet"
ITEM_TABLES_FILE: Final = "item_tables.safetensors"
ANN: Final = "ann.faiss"
PROBES: Final = "probes.safetensors"
MODELS: Final[Mapping[str, Signature]] = {f"{signature.role}.onnx": signature for signature in SIGNATURES}
"""File name of every model, and the signature that it keeps."""
REQUIRED: Final = frozenset({MODEL_CARD, FEATURES, CATALOGUE, ITEM_TABLES_FILE, ANN, PROBES, *MODELS})

Sha256 = Annotated[str, msgspec.Meta(pattern=ID_PATTERN)]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file; its path, relative with forward slashes, is the key that it stands under."""

    sha256: Sha256
    size: Annotated[int, msgspec.Meta(ge=0)]
    """Bytes."""


class Parity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a model in ONNX Runtime is from the one that was trained, on real inputs."""

    max_abs_error: Annotated[float, msgspec.Meta(ge=0)]
    limit: Annotated[float, msgspec.Meta(ge=0)]
    """What `max_abs_error` was held to."""
    top_k_agreement: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Share of the top k by the trained model that is in the top k by the exported one."""
    agreement_floor: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """What `top_k_agreement` was held to."""
    k: int
    samples: int
    """Rows that were compared."""


class AnnFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The vector index, inner product over the item vectors; position r is item index r + 1."""

    kind: str
    """`flat` (exact) or `hnsw`."""
    items: int
    recall_at_10: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Against exact search, on real user vectors."""
    queries: int
    ef_search: int | None = None


class Requires(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a site must be to serve a bundle; one that is not refuses it before anything is loaded."""

    site_classes: list[SiteClass] = msgspec.field(default_factory=lambda: list(SiteClass))
    onnxruntime: Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+){0,2}$")] | None = None
    """Lowest version that the models run in; None where any of ours will do."""

    def unmet(self, site_class: SiteClass | None = None, onnxruntime: str | None = None) -> str | None:
        """Why a site of this class, with this version of ONNX Runtime, may not serve the bundle; None when it may.

        None of a fact that is not known here: who knows it holds the bundle to it.
        """
        if site_class is not None and site_class not in self.site_classes:
            wanted = " or ".join(one.value for one in self.site_classes) or "no"
            return f"is made for {wanted} sites, and this is a {site_class.value} site"
        if (
            onnxruntime is not None
            and self.onnxruntime is not None
            and _version(onnxruntime) < _version(self.onnxruntime)
        ):
            return f"needs ONNX Runtime {self.onnxruntime} or later, and this site has {onnxruntime}"
        return None


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle's maker knows about it; the files' digests are added when it is written."""

    dataset: str
    """Name of the data set that the models were trained on."""
    dataset_digest: str
    training_digest: str
    """Names the training run (its directory is `train-<digest>`)."""
    key_epoch: Annotated[int, msgspec.Meta(ge=1, le=999)]
    """Epoch of the pseudonym key whose pseudonyms the training data held."""
    created_ms: Annotated[int, msgspec.Meta(ge=0)]
    quality: QualityReport
    parity: dict[str, Parity]
    """By the model's role."""
    ann: AnnFigures
    requires: Requires = msgspec.field(default_factory=Requires)


class Manifest(Facts, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    feature_schema_sha256: Sha256
    files: dict[str, FileEntry]
    """Every file but the manifest itself."""


def _version(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 1.22.1+cpu is (1, 22, 1)."""
    found = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


class _Version(msgspec.Struct, frozen=True):
    """The one field that can be read from a manifest of any schema."""

    schema_version: int


def make(facts: Facts, files: Mapping[str, FileEntry]) -> Manifest:
    """The manifest of `files` with what their maker says about them. KeyError without `features.json`."""
    fields = {name: getattr(facts, name) for name in Facts.__struct_fields__}
    return Manifest(**fields, feature_schema_sha256=files[FEATURES].sha256, files=dict(files))


def encode(manifest: Manifest) -> bytes:
    """Canonical bytes: sorted keys, two-space indent, one newline at the end."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2) + b"\n"


def decode(data: bytes) -> Manifest:
    """The manifest in `data`.

    Raises ValueError: not JSON, a schema version that this release does not know, or a field at
    fault (named by its path).
    """
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
    except RecursionError:
        raise ValueError("is nested too deep to be read") from None
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema version {version}; this release reads version {SCHEMA_VERSION}")
    return msgspec.json.decode(data, type=Manifest)


def identity(data: bytes) -> str:
    """The bundle id that manifest bytes stand for."""
    return hashlib.sha256(data).hexdigest()


def path_fault(name: str) -> str | None:
    """Why `name` may not stand in a manifest, or None: paths stay inside the bundle."""
    if not name or any(ord(character) < 32 for character in name) or "\\" in name or ":" in name:
        return "is not a plain relative path with forward slashes"
    if name.startswith("/"):
        return "is an absolute path"
    parts = name.split("/")
    if ".." in parts:
        return "climbs out of the bundle with '..'"
    if "." in parts or "" in parts or str(PurePosixPath(name)) != name:
        return "is not in its shortest form"
    if name == MANIFEST:
        return "cannot hold its own digest"
    return None
