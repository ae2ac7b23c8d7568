"""Where new items stand among those that are there: their rows in the contract's item tables.

An item's vector is what the bundle's own item tower makes of its content. It is asked without the item's id:
ids were hidden from it in a share of the steps of its training, so that it can place an item by text, category,
price and image alone. What is not known of a new item is no sign of what it is: the tower is told the mean popularity
of its category, while the tables, which count, say 0, and where it has no image the category's mean image. Its
neighbours are the items whose content lies nearest by cosine, all asked alike: without ids, so that what people made of
the others does not hide that they are of a kind, and without images of their own where it has none. Scores are on the
scale of those that were learned from people (`neighbour_scale`).
Arrays in, arrays out; it knows no file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from workloads.contract.tensors import IMAGE_DIM, NEIGHBOURS, PAD, FeatureSchema
from workloads.data.features import item_inputs, price_bands
from workloads.delta.items import NewItem
from workloads.models.text import item_text, token_table

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Tables = Mapping[str, npt.NDArray[Any]]

_BLOCK: Final = 512
"""New items compared with all others at a time: 20 MB for 10,000 items."""


class PlacingFault(ValueError):  # noqa: N818 - as BundleFault
    """An item that the bundle's item tower cannot place."""


class ItemTower(Protocol):
    """Makes vectors of items' content."""

    def vectors(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Floats:
        """[k, VECTOR_DIM] of k rows of `contract.tensors.ITEM_TOWER`'s inputs."""
        ...


def place(
    items: Sequence[NewItem],
    there: Sequence[NewItem],
    tables: Tables,
    schema: FeatureSchema,
    *,
    tower: ItemTower,
    now_ms: int,
) -> Tables:
    """Rows of `contract.tensors.ITEM_TABLES` for new items that follow those of `tables`, in order.

    `tables` are the edition's, row 0 included: the bundle and the deltas before; `there` is the content of their
    items, in the order of the rows 1 to N. Raises PlacingFault.
    """
    category, price = categories(items, schema), prices(items)
    count, of = len(items), tables["category"][1:]
    first_seen = np.full(count, now_ms, dtype=np.int64)
    known = slice(schema.items)
    popularity = tables["popularity"][1:][known]
    own, theirs = images(items), images(there)
    seen = theirs[known].any(axis=1)
    usual = functools.partial(usual_of, theirs[known][seen], of[known][seen])
    ask = functools.partial(content_vectors, schema=schema, tower=tower, now_ms=now_ms)
    vectors = ask(items, usual_of(popularity, of[known], category), filled(own, usual(category)))
    scale = neighbour_scale(tables["neighbour_scores"])
    neighbours = np.zeros((count, NEIGHBOURS), dtype=np.int32)
    scores = np.zeros((count, NEIGHBOURS), dtype=np.float32)
    for some, image in ((own.any(axis=1), filled(theirs, usual(of))), (~own.any(axis=1), usual(of))):
        if some.any():
            others = np.zeros((len(there) + 1, vectors.shape[1]), dtype=np.float32)
            others[1:] = ask(there, usual_of(popularity, of[known], of), image)
            near, near_scores = nearest(vectors, others, scale)
            neighbours[some], scores[some] = near[some], near_scores[some]
    nobody = np.zeros(count, dtype=np.float32)
    return {
        "vectors": vectors,
        "category": category,
        "price": price,
        "price_band": price_bands(price, schema.price_edges),
        "popularity": nobody,
        "popularity_recent": nobody,
        "popularity_category": nobody,
        "first_seen_ms": first_seen,
        "in_stock": np.array([one.in_stock for one in items], dtype=np.uint8),
        "neighbours": neighbours,
        "neighbour_scores": scores,
    }


def categories(items: Sequence[NewItem], schema: FeatureSchema) -> Ints:
    """Category index of each item; 0 for one that the bundle does not know."""
    index = {name: place for place, name in enumerate(schema.categories, 1)}
    return np.array([index.get(one.category, PAD) for one in items], dtype=np.int32)


def prices(items: Sequence[NewItem]) -> Floats:
    """Price of each item; 0 where it is not known."""
    return np.array([one.price or 0.0 for one in items], dtype=np.float32)


def images(items: Sequence[NewItem]) -> Floats:
    """Image features [k, IMAGE_DIM]; zeros where an item has none."""
    found = np.zeros((len(items), IMAGE_DIM), dtype=np.float32)
    for row, one in enumerate(items):
        if one.image:
            found[row] = one.image
    return found


def filled(given: Floats, usual: Floats) -> Floats:
    """Rows of `given`, or of `usual` where those are all zero; both [k, D]."""
    return np.where(given.any(axis=1, keepdims=True), given, usual)


def usual_of(values: Floats, category: Ints, kinds: Ints) -> Floats:
    """What to expect of items of categories `kinds` [k]: the mean of `values` [n, ...] in their `category` [n].

    The mean of all where a category is unknown or has none; 0 of no values. Told 0 instead of a usual popularity, the
    tower places an item among those that people had seen and did not want.
    """
    shape = values.shape[1:]
    whole = values.mean(axis=0) if len(values) else np.zeros(shape)
    means = {
        kind: values[category == kind].mean(axis=0) for kind in set(kinds.tolist()) & set(category.tolist()) - {PAD}
    }
    return np.array([means.get(kind, whole) for kind in kinds.tolist()], dtype=np.float32).reshape(-1, *shape)


def content_vectors(
    items: Sequence[NewItem], popularity: Floats, image: Floats, *, schema: FeatureSchema, tower: ItemTower, now_ms: int
) -> Floats:
    """Vectors [k, VECTOR_DIM] by content alone, for items of this popularity [k] and image [k, IMAGE_DIM].

    Raises PlacingFault.
    """
    count = len(items)
    inputs = item_inputs(  # row 0 is PAD's, as everywhere
        category=np.concatenate([[PAD], categories(items, schema)]),
        price=np.concatenate([[0.0], prices(items)]).astype(np.float32),
        popularity=np.concatenate([[0.0], popularity]).astype(np.float32),
        of_items=schema.items,
        first_seen_ms=np.full(count + 1, now_ms, dtype=np.int64),
        tokens=token_table(["", *(item_text(one.title, one.category) for one in items)]),
        image=np.concatenate([np.zeros((1, IMAGE_DIM), dtype=np.float32), image]),
        reference_ms=schema.reference_ms,
    )
    inputs["item"] = np.full(count + 1, PAD, dtype=np.int64)
    vectors = np.asarray(tower.vectors({name: rows[1:] for name, rows in inputs.items()}), dtype=np.float32)
    unusable = ~np.isfinite(vectors).all(axis=1)
    if unusable.any():
        item = items[int(unusable.argmax())].item
        raise PlacingFault(f"the bundle's item tower gives no finite vector for the item {item!r}")
    return vectors


def neighbour_scale(learned: Floats) -> Floats:
    """What a typical item's neighbours score, by their place: the median over items that have any, [NEIGHBOURS].

    Ones where nothing was learned: there is nothing to be outranked then.
    """
    some = learned[learned[:, 0] > 0]
    return np.asarray(np.median(some, axis=0), dtype=np.float32) if len(some) else np.ones(NEIGHBOURS, np.float32)


def nearest(vectors: Floats, there: Floats, scale: Floats) -> tuple[Ints, Floats]:
    """Neighbours [k, NEIGHBOURS] of new items and their scores, best first; PAD and 0 where there are no more.

    `vectors` [k, D] are the new items', `there` [N+1, D] those of the items before them, row 0 of nobody. An item is
    no neighbour of its own. The score of the neighbour at place j is its cosine times `scale[j]`: an item that looks
    like another says at most as much as a typical item's people said about their j-th neighbour, so that half of what
    was learned outranks it.
    """
    everything = _units(np.concatenate([there, vectors]))
    first = len(there)
    kept = min(NEIGHBOURS, len(everything) - 2)
    neighbours = np.zeros((len(vectors), NEIGHBOURS), dtype=np.int32)
    scores = np.zeros((len(vectors), NEIGHBOURS), dtype=np.float32)
    for start in range(0, len(vectors), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(vectors)))
        cosine = everything[first + rows] @ everything.T
        cosine[:, PAD] = -np.inf
        cosine[rows - start, first + rows] = -np.inf
        best = np.argpartition(-cosine, kept - 1, axis=1)[:, :kept]
        values = np.take_along_axis(cosine, best, axis=1)
        order = np.lexsort((best, -values), axis=1)
        values = np.take_along_axis(values, order, axis=1) * scale[:kept]
        scores[rows, :kept] = np.maximum(values, 0.0)
        neighbours[rows, :kept] = np.where(values > 0, np.take_along_axis(best, order, axis=1), PAD)
    return neighbours, scores


def _units(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)
