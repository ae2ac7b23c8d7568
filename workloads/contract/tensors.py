"""Names, types and shapes of every tensor that crosses a process or file border.

Model signatures (ONNX and Triton use the same), the feature order of the ranker, and the tables
of a bundle. `B` is a batch, `N` the number of items; item index 0 is padding and "unknown", the
catalogue's row r is index r + 1. Triton's config.pbtxt is generated from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from workloads.contract.events import EventType

PAD: Final = 0
HISTORY_LENGTH: Final = 50
"""Items of history that the user tower reads, most recent last, left-padded with PAD."""
VECTOR_DIM: Final = 64
TEXT_TOKENS: Final = 32
"""Hashed token ids that a text is cut or padded to."""
TOKEN_BUCKETS: Final = 20_011
IMAGE_DIM: Final = 16
"""Width of an item's image feature vector; zeros where the catalogue has none."""
NEIGHBOURS: Final = 50
"""Item-to-item neighbours that a bundle keeps for each item."""

STRENGTH: Mapping[EventType, float] = MappingProxyType(
    {
        EventType.CLICK: 0.3,
        EventType.VIEW: 0.3,
        EventType.RATING: 0.6,
        EventType.CART: 0.7,
        EventType.PURCHASE: 1.0,
    }
)
"""How much a positive event says about taste; the towers read it beside the item."""

CONTEXT: tuple[str, ...] = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos")

RANKER_SPARSE: tuple[str, ...] = ("item", "category", "price_band", "last_item", "last_category", "source")
RANKER_DENSE: tuple[str, ...] = (
    "ann_score",
    "fused_score",
    "fused_rank",
    "item_to_item",
    "popularity",
    "popularity_recent",
    "popularity_category",
    "item_age_days",
    "price",
    "price_to_taste",
    "category_affinity",
    "times_touched",
    "times_bought",
    "days_since_touch",
    "touch_share",
    "history_length",
    *CONTEXT,
)
"""Feature order of the ranker's two inputs. A change here is a new feature schema."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output. `shape` is without the batch axis; `dtype` is a numpy name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a model takes and gives; `role` is the first part of its Triton name."""

    role: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int

    def triton_name(self, bundle_id: str) -> str:
        """`<role>-<first 12 hex digits of the bundle id>`: never shared by two bundles."""
        return f"{self.role}-{bundle_id[:12]}"


USER_TOWER = Signature(
    role="user_tower",
    inputs=(
        TensorSpec("history", "int64", (HISTORY_LENGTH,)),
        TensorSpec("history_strength", "float32", (HISTORY_LENGTH,)),
        TensorSpec("history_age_hours", "float32", (HISTORY_LENGTH,)),
        TensorSpec("context", "float32", (len(CONTEXT),)),
    ),
    outputs=(TensorSpec("vector", "float32", (VECTOR_DIM,)),),
    max_batch=256,
)
ITEM_TOWER = Signature(
    role="item_tower",
    inputs=(
        TensorSpec("item", "int64", ()),
        TensorSpec("category", "int64", ()),
        TensorSpec("tokens", "int64", (TEXT_TOKENS,)),
        TensorSpec("numeric", "float32", (3,)),  # log price, log popularity, age in years
        TensorSpec("image", "float32", (IMAGE_DIM,)),
    ),
    outputs=(TensorSpec("vector", "float32", (VECTOR_DIM,)),),
    max_batch=4096,
)
QUERY_TOWER = Signature(
    role="query_tower",
    inputs=(TensorSpec("tokens", "int64", (TEXT_TOKENS,)),),
    outputs=(TensorSpec("vector", "float32", (VECTOR_DIM,)),),
    max_batch=256,
)
RANKER = Signature(
    role="ranker",
    inputs=(
        TensorSpec("sparse", "int64", (len(RANKER_SPARSE),)),
        TensorSpec("dense", "float32", (len(RANKER_DENSE),)),
    ),
    outputs=(TensorSpec("probability", "float32", (1,)),),
    max_batch=1024,
)
STUDENT = Signature(role="student", inputs=RANKER.inputs, outputs=RANKER.outputs, max_batch=RANKER.max_batch)
"""Rung 2: a small student of the ranker in INT8, run by ONNX Runtime inside the gateway."""
SIGNATURES: tuple[Signature, ...] = (USER_TOWER, ITEM_TOWER, QUERY_TOWER, RANKER, STUDENT)


class FeatureSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What turns ids and text into tensors; `features.json` of a bundle."""

    version: int = 1
    items: int
    """Number of items; indices run from 1 to this."""
    categories: list[str]
    """Index 0 is unknown; `categories[i]` has index i + 1."""
    price_edges: list[float]
    """Upper edges of the price bands; band 0 is unknown."""
    dense_mean: list[float]
    dense_scale: list[float]
    """Standardisation of RANKER_DENSE: (x - mean) / scale, done before the tensor is sent."""
    token_buckets: int = TOKEN_BUCKETS
    fusion: dict[str, float] = {}
    """Say of each candidate source in the fused score, chosen on validation; `data.fusion.fuse(weights=...)`."""
    reference_ms: int
    """The moment that ages in the item tables are counted from (end of training data)."""


ITEM_TABLES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "vectors": ("float32", ("N+1", "VECTOR_DIM")),
        "category": ("int32", ("N+1",)),
        "price": ("float32", ("N+1",)),
        "price_band": ("int32", ("N+1",)),
        "popularity": ("float32", ("N+1",)),
        "popularity_recent": ("float32", ("N+1",)),
        "popularity_category": ("float32", ("N+1",)),
        "first_seen_ms": ("int64", ("N+1",)),
        "in_stock": ("uint8", ("N+1",)),
        "neighbours": ("int32", ("N+1", "NEIGHBOURS")),
        "neighbour_scores": ("float32", ("N+1", "NEIGHBOURS")),
    }
)
"""Tables of `item_tables.safetensors`: numpy dtype and shape; row 0 is all zero."""
