"""A small bundle with real models, tables and index, made without torch: the bundle's fake for tests.

It obeys the contract to the letter and is deterministic under a seed. The models do what their
names say, plainly: the user tower is the decayed mean of the history's item vectors, the item tower places
an item without an id at its category's centre, a little to where its words draw it, the ranker is a
logistic score that rises with retrieval score and popularity, and the student the same in 8 bits. Its quality
figures mean nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from workloads.bundle import manifest as m
from workloads.bundle.probes import write_probes
from workloads.bundle.store import write_bundle
from workloads.bundle.tables import Array
from workloads.contract.quality import QualityReport, QualityRow, RankerQuality, RungQuality
from workloads.contract.tensors import (
    IMAGE_DIM,
    ITEM_TOWER,
    NEIGHBOURS,
    QUERY_TOWER,
    RANKER,
    RANKER_DENSE,
    RANKER_SPARSE,
    SIGNATURES,
    STUDENT,
    USER_TOWER,
    VECTOR_DIM,
    FeatureSchema,
    Signature,
)

CREATED_MS: Final = 1_790_000_000_000
OPSET: Final = 17
IR_VERSION: Final = 9
_DAY_MS: Final = 86_400_000
_TOKEN_ROWS: Final = 499
"""Rows of the query tower's table; token ids are taken modulo this, to keep the file small."""

_REACH: Final = 4.0
"""Dense features beyond this are at the end of the student's 8 bits."""
_STEPS: Final = 64
"""Steps of the student's largest weight: 7 bits, which no processor's 16 bit sums overflow with."""

_KINDS: Final = {
    "Lighting": ("lantern", "table lamp", "tea light holder", "string lights"),
    "Kitchen": ("mug", "cake stand", "baking tray", "measuring jug", "tea towel"),
    "Garden": ("planter", "bird feeder", "watering can", "trowel"),
    "Stationery": ("notebook", "gift wrap", "greeting card", "pencil case"),
    "Decoration": ("picture frame", "wall clock", "bunting", "doormat", "cushion cover"),
}
_COLOURS: Final = ("red", "blue", "white", "green", "pink", "ivory", "black", "silver")
_STYLES: Final = ("vintage", "retro", "polka dot", "floral", "rustic", "striped", "paisley")


def build_fake_bundle(directory: Path, items: int = 200, seed: int = 0, prefix: str = "item") -> Path:
    """Write a valid bundle of `items` items under `directory` and return its path, `<directory>/<id>`.

    `items` is at least 2; their ids are `<prefix>-00001` and so on.
    """
    random = np.random.default_rng(seed)
    categories = list(_KINDS)
    category = random.integers(1, len(categories) + 1, items)
    titles, descriptions = _texts(random, categories, category)
    vectors = _vectors(random, category, len(categories))
    price = np.round(random.lognormal(1.5, 0.7, items), 2)
    edges = [float(edge) for edge in np.quantile(price, [0.25, 0.5, 0.75])]
    popularity = (1.0 / np.arange(1, items + 1))[random.permutation(items)]
    popularity /= popularity.sum()
    first_seen = CREATED_MS - random.integers(1, 365, items) * _DAY_MS
    in_stock = random.random(items) < 0.95
    within = popularity / np.bincount(category, weights=popularity)[category]
    neighbours, neighbour_scores = _neighbours(vectors)
    tables = {
        "vectors": vectors,
        "category": category.astype(np.int32),
        "price": price.astype(np.float32),
        "price_band": (np.searchsorted(edges, price) + 1).astype(np.int32),
        "popularity": popularity.astype(np.float32),
        "popularity_recent": random.permuted(popularity).astype(np.float32),
        "popularity_category": within.astype(np.float32),
        "first_seen_ms": first_seen.astype(np.int64),
        "in_stock": in_stock.astype(np.uint8),
        "neighbours": neighbours,
        "neighbour_scores": neighbour_scores,
    }
    tables = {name: np.concatenate([np.zeros_like(table[:1]), table]) for name, table in tables.items()}
    features = FeatureSchema(
        items=items,
        categories=categories,
        price_edges=edges,
        dense_mean=[0.0] * len(RANKER_DENSE),
        dense_scale=[1.0] * len(RANKER_DENSE),
        reference_ms=CREATED_MS,
    )
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        (source / m.MODEL_CARD).write_text("# A fake bundle\n\nFor tests. Nothing in it was learned.\n")
        (source / m.FEATURES).write_bytes(msgspec.json.encode(features))
        _write_catalogue(
            source,
            titles=titles,
            descriptions=descriptions,
            categories=[categories[place - 1] for place in category],
            tables=tables,
            random=random,
            prefix=prefix,
        )
        _write_tables(source, tables)
        _write_index(source, vectors)
        _write_models(source, tables["vectors"], tables["category"], random)
        _write_probes(source, items, random)
        return write_bundle(directory, source, _facts(items))


def _texts(random: np.random.Generator, categories: list[str], category: Array) -> tuple[list[str], list[str]]:
    titles, descriptions = [], []
    for number, place in enumerate(category):
        name = categories[place - 1]
        colour, style = random.choice(_COLOURS), random.choice(_STYLES)
        kind = random.choice(_KINDS[name])
        titles.append(f"{colour} {style} {kind}".capitalize() + f" no. {number + 1}")
        descriptions.append(f"A {style} {kind} in {colour}, from our {name.lower()} range.")
    return titles, descriptions


def _vectors(random: np.random.Generator, category: Array, categories: int) -> Array:
    """Unit vectors [N, VECTOR_DIM] that lie near the centre of their category."""
    centres = random.normal(size=(categories, VECTOR_DIM))
    vectors = centres[category - 1] + 0.8 * random.normal(size=(len(category), VECTOR_DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors, np.float32)


def _neighbours(vectors: Array) -> tuple[Array, Array]:
    """Indices [N, NEIGHBOURS] (0 where there are fewer) and scores of each item's nearest others."""
    kept = min(NEIGHBOURS, len(vectors) - 1)
    indices = np.zeros((len(vectors), NEIGHBOURS), np.int32)
    scores = np.zeros((len(vectors), NEIGHBOURS), np.float32)
    for start in range(0, len(vectors), 1024):  # in blocks: all pairs of a large catalogue would not fit in memory
        rows = np.arange(start, min(start + 1024, len(vectors)))
        similarity = vectors[rows] @ vectors.T
        similarity[rows - start, rows] = -np.inf
        best = np.argpartition(-similarity, kept - 1, axis=1)[:, :kept]
        values = np.take_along_axis(similarity, best, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        indices[rows, :kept] = np.take_along_axis(best, order, axis=1) + 1
        scores[rows, :kept] = np.maximum(np.take_along_axis(values, order, axis=1), 0)
    return indices, scores


def _write_catalogue(
    source: Path,
    *,
    titles: Sequence[str],
    descriptions: Sequence[str],
    categories: Sequence[str],
    tables: dict[str, Array],
    random: np.random.Generator,
    prefix: str,
) -> None:
    import pyarrow as pa  # noqa: PLC0415 - only here
    import pyarrow.parquet as pq  # noqa: PLC0415

    count = len(titles)
    image = random.normal(size=(count, IMAGE_DIM)).astype(np.float32)
    columns = {
        "item": [f"{prefix}-{number:05d}" for number in range(1, count + 1)],
        "title": list(titles),
        "description": list(descriptions),
        "category": list(categories),
        "price": tables["price"][1:].astype(np.float64),
        "image": pa.array(list(image), pa.list_(pa.float32())),
        "first_seen_ms": tables["first_seen_ms"][1:],
        "in_stock": tables["in_stock"][1:].astype(bool),
    }
    pq.write_table(pa.table(columns), source / m.CATALOGUE)


def _write_tables(source: Path, tables: dict[str, Array]) -> None:
    from safetensors.numpy import save_file  # noqa: PLC0415 - only here

    save_file(tables, source / m.ITEM_TABLES_FILE)


def _write_index(source: Path, vectors: Array) -> None:
    import faiss  # noqa: PLC0415 - only here

    index = faiss.IndexFlatIP(VECTOR_DIM)
    index.add(vectors)
    faiss.write_index(index, str(source / m.ANN))


def _write_models(source: Path, vectors: Array, category: Array, random: np.random.Generator) -> None:
    items = len(vectors) - 1
    centres = np.zeros((len(_KINDS) + 1, VECTOR_DIM), np.float32)
    np.add.at(centres, category, vectors)
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-6)
    dense_weight = np.zeros((len(RANKER_DENSE), 1), np.float32)
    for name, weight in (("ann_score", 2.0), ("popularity", 1.0), ("item_to_item", 0.5), ("times_touched", 0.2)):
        if name in RANKER_DENSE:
            dense_weight[RANKER_DENSE.index(name)] = weight
    weight_scale = np.abs(dense_weight).max() / _STEPS
    constants: dict[Signature, dict[str, Array]] = {
        USER_TOWER: {
            "vectors": vectors,
            "day": np.array([24.0], np.float32),
            "one": np.array([1.0], np.float32),
            "context_weight": (0.01 * random.normal(size=(4, VECTOR_DIM))).astype(np.float32),
            "last": np.array([-1], np.int64),
            "middle": np.array([1], np.int64),
        },
        ITEM_TOWER: {
            "vectors": vectors,
            "centres": centres,
            "table": (0.01 * random.normal(size=(_TOKEN_ROWS, VECTOR_DIM))).astype(np.float32),
            "rows": np.array(_TOKEN_ROWS, np.int64),
            "pad": np.array(0, np.int64),
            "last": np.array([-1], np.int64),
            "zero": np.array(0.0, np.float32),
            "one_axis": np.array([1], np.int64),
        },
        QUERY_TOWER: {
            "table": random.normal(size=(_TOKEN_ROWS, VECTOR_DIM)).astype(np.float32),
            "rows": np.array(_TOKEN_ROWS, np.int64),
            "pad": np.array(0, np.int64),
            "middle": np.array([1], np.int64),
            "last": np.array([-1], np.int64),
        },
        RANKER: {
            "item_bias": (0.1 * random.normal(size=(items + 1, 1))).astype(np.float32),
            "first": np.array(0, np.int64),
            "dense_weight": dense_weight,
            "offset": np.array([-2.0], np.float32),
        },
    }
    constants[STUDENT] = {
        **{name: constants[RANKER][name] for name in ("item_bias", "first", "offset")},
        "dense_scale": np.array(_REACH / 128, np.float32),
        "dense_zero": np.array(128, np.uint8),
        "weight_narrow": np.round(dense_weight / weight_scale).astype(np.int8),
        "weight_scale": np.array(weight_scale, np.float32),
        "weight_zero": np.array(0, np.int8),
    }
    for signature, values in constants.items():
        _save_model(source / f"{signature.role}.onnx", signature, _NODES[signature.role], values)


def _write_probes(source: Path, items: int, random: np.random.Generator) -> None:
    import onnxruntime as ort  # noqa: PLC0415 - only here

    rows = 256
    sparse = np.zeros((rows, len(RANKER_SPARSE)), np.int64)
    sparse[:, 0] = random.integers(0, items + 1, rows)
    inputs: dict[str, Array] = {
        "sparse": sparse,
        "dense": random.normal(size=(rows, len(RANKER_DENSE))).astype(np.float32),
    }
    session = ort.InferenceSession(source / f"{RANKER.role}.onnx", providers=["CPUExecutionProvider"])
    write_probes(source / m.PROBES, inputs, session.run(None, inputs)[0])


_NORMALISE: Final = (("LpNormalization", ("sum",), ("vector",), {"axis": 1, "p": 2}),)
_NODES: Final[dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any]], ...]]] = {
    # vector = unit(sum over history of strength / (1 + age / 24 h) * item vector + context @ small weights)
    "user_tower": (
        ("Gather", ("vectors", "history"), ("history_vectors",), {"axis": 0}),
        ("Div", ("history_age_hours", "day"), ("age",), {}),
        ("Add", ("age", "one"), ("divisor",), {}),
        ("Div", ("history_strength", "divisor"), ("weight",), {}),
        ("Unsqueeze", ("weight", "last"), ("weight_column",), {}),
        ("Mul", ("history_vectors", "weight_column"), ("weighted",), {}),
        ("ReduceSum", ("weighted", "middle"), ("taste",), {"keepdims": 0}),
        ("MatMul", ("context", "context_weight"), ("moment",), {}),
        ("Add", ("taste", "moment"), ("sum",), {}),
        *_NORMALISE,
    ),
    # vector = the item's row, or without an id unit(category's centre + sum of the tokens' small rows); the other
    # inputs are read and weigh nothing
    "item_tower": (
        ("Gather", ("vectors", "item"), ("row",), {"axis": 0}),
        ("Gather", ("centres", "category"), ("centre",), {"axis": 0}),
        ("Mod", ("tokens", "rows"), ("token_row",), {}),
        ("Gather", ("table", "token_row"), ("token_vectors",), {"axis": 0}),
        ("ReduceSum", ("token_vectors", "one_axis"), ("words",), {"keepdims": 0}),
        ("Add", ("centre", "words"), ("content",), {}),
        ("LpNormalization", ("content",), ("content_unit",), {"axis": 1, "p": 2}),
        ("Equal", ("item", "pad"), ("is_new",), {}),
        ("Cast", ("is_new",), ("weight",), {"to": 1}),
        ("Unsqueeze", ("weight", "last"), ("weight_column",), {}),
        ("Mul", ("content_unit", "weight_column"), ("placed",), {}),
        ("ReduceSum", ("numeric", "one_axis"), ("numeric_sum",), {"keepdims": 1}),
        ("ReduceSum", ("image", "one_axis"), ("image_sum",), {"keepdims": 1}),
        ("Sum", ("numeric_sum", "image_sum"), ("rest",), {}),
        ("Mul", ("rest", "zero"), ("nothing",), {}),
        ("Sum", ("row", "placed", "nothing"), ("vector",), {}),
    ),
    # vector = unit(sum of the tokens' rows); padding weighs nothing
    "query_tower": (
        ("Mod", ("tokens", "rows"), ("row",), {}),
        ("Gather", ("table", "row"), ("token_vectors",), {"axis": 0}),
        ("Equal", ("tokens", "pad"), ("is_pad",), {}),
        ("Not", ("is_pad",), ("is_token",), {}),
        ("Cast", ("is_token",), ("weight",), {"to": 1}),
        ("Unsqueeze", ("weight", "last"), ("weight_column",), {}),
        ("Mul", ("token_vectors", "weight_column"), ("weighted",), {}),
        ("ReduceSum", ("weighted", "middle"), ("sum",), {"keepdims": 0}),
        *_NORMALISE,
    ),
    # probability = sigmoid(dense @ weight + bias of the item - 2)
    "ranker": (
        ("Gather", ("sparse", "first"), ("item",), {"axis": 1}),
        ("Gather", ("item_bias", "item"), ("bias",), {"axis": 0}),
        ("MatMul", ("dense", "dense_weight"), ("score",), {}),
        ("Sum", ("score", "bias", "offset"), ("logit",), {}),
        ("Sigmoid", ("logit",), ("probability",), {}),
    ),
    # the ranker's, with features and weights in 8 bits
    "student": (
        ("Gather", ("sparse", "first"), ("item",), {"axis": 1}),
        ("Gather", ("item_bias", "item"), ("bias",), {"axis": 0}),
        ("QuantizeLinear", ("dense", "dense_scale", "dense_zero"), ("narrow",), {}),
        ("DequantizeLinear", ("narrow", "dense_scale", "dense_zero"), ("feature",), {}),
        ("DequantizeLinear", ("weight_narrow", "weight_scale", "weight_zero"), ("weight",), {}),
        ("MatMul", ("feature", "weight"), ("score",), {}),
        ("Sum", ("score", "bias", "offset"), ("logit",), {}),
        ("Sigmoid", ("logit",), ("probability",), {}),
    ),
}
"""(operator, inputs, outputs, attributes) of each model."""


def _save_model(
    path: Path,
    signature: Signature,
    nodes: Sequence[tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any]]],
    constants: dict[str, Array],
) -> None:
    import onnx  # noqa: PLC0415 - only here
    from onnx import helper, numpy_helper  # noqa: PLC0415

    inputs, outputs = (
        [
            helper.make_tensor_value_info(
                spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), ["batch", *spec.shape]
            )
            for spec in specs
        ]
        for specs in (signature.inputs, signature.outputs)
    )
    graph = helper.make_graph(
        [helper.make_node(operator, ins, outs, **attributes) for operator, ins, outs, attributes in nodes],
        signature.role,
        inputs,
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="rankbridge"
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _facts(items: int) -> m.Facts:
    parity = m.Parity(max_abs_error=0.0, limit=1e-4, top_k_agreement=1.0, agreement_floor=0.99, k=10, samples=1)
    rows = [
        QualityRow(name=name, protocol="novel", rung=rung, metrics={"recall@20": recall}, requests=1)
        for name, rung, recall in (("popularity", 4, 0.1), ("popularity_30d", None, 0.15), ("ours", 1, 0.3))
    ]
    ladder = ((1, 0.3, 0.7), (2, 0.294, 0.69), (3, 0.24, 0.6), (4, 0.15, None))
    rungs = [
        RungQuality(
            rung=rung, protocol="novel", ndcg_at_10=gain, auc=auc, loss=1 - gain / 0.3, loss_error=0.001, requests=1
        )
        for rung, gain, auc in ladder
    ]
    ranker = RankerQuality(auc=0.7, log_loss=0.3, calibration=1.0, base_rate=0.1, rows=1, reliability=[(0.1, 0.1, 1)])
    return m.Facts(
        dataset="fake",
        dataset_digest="0" * 12,
        training_digest="0" * 12,
        key_epoch=1,
        created_ms=CREATED_MS,
        quality=QualityReport(
            dataset="fake", rows=rows, ranker=ranker, statements=["Nothing here was measured."], rungs=rungs
        ),
        parity={signature.role: parity for signature in SIGNATURES},
        ann=m.AnnFigures(kind="flat", items=items, recall_at_10=1.0, queries=1),
    )
