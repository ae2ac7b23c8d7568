"""From a file of new items to a delta, or to one sentence that says why not.

All or nothing: a row that breaks a rule stops the delta, because a delta is never changed once it is out.
It reads the bundle, the deltas before and the file, and writes below `out` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from workloads.bundle.delta import DeltaFault, write_delta
from workloads.bundle.session import open_session
from workloads.bundle.store import Bundle, BundleFault, open_bundle, verify
from workloads.contract.tensors import ITEM_TOWER
from workloads.data.events import RowFaults
from workloads.data.reading import SourceError
from workloads.delta.items import NewItem, read_items
from workloads.delta.placing import Floats, PlacingFault, categories, place
from workloads.telemetry.progress import Progress

STAGE: Final = "delta"
STEPS: Final = 4
SHOWN: Final = 20
"""Faults of rows that are printed one by one."""


class MakeFault(Exception):  # noqa: N818 - as BundleFault
    """Why there is no delta, and what to do about it."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


class OnnxItemTower:
    """The bundle's `item_tower.onnx`. Raises MakeFault when it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        try:
            self._session = open_session(path)
        except Exception as error:  # its exceptions have no base class of their own
            raise MakeFault(f"{path} cannot be loaded: {error}", "export the bundle again") from error

    def vectors(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Floats:
        """See placing.ItemTower."""
        count = len(inputs["item"])
        parts = [
            self._session.run(["vector"], {name: rows[at : at + ITEM_TOWER.max_batch] for name, rows in inputs.items()})
            for at in range(0, count, ITEM_TOWER.max_batch)
        ]
        return np.concatenate([part[0] for part in parts])


def make(
    bundle_path: Path,
    deltas: Sequence[Path],
    items: Path,
    out: Path,
    progress: Progress,
    *,
    now_ms: Callable[[], int],
) -> Path:
    """Write the delta of the items in a file and return its directory, `<out>/<bundle id>/<number>-<delta id>`.

    Raises MakeFault.
    """
    progress.step(STAGE, 0, STEPS)
    try:
        verify(bundle_path)
        bundle = open_bundle(bundle_path, deltas)
    except BundleFault as fault:
        raise MakeFault(str(fault), fault.remedy) from None
    progress.step(STAGE, 1, STEPS)
    new = _sound_items(items, bundle, progress)
    progress.step(STAGE, 2, STEPS, items=len(new))
    created_ms = now_ms()
    try:
        tower = OnnxItemTower(bundle.model_path(ITEM_TOWER))
        tables = place(new, contents(bundle), bundle.tables, bundle.features, tower=tower, now_ms=created_ms)
    except PlacingFault as fault:
        raise MakeFault(str(fault), "look at the item's price and image; if they are right, report it") from None
    progress.step(STAGE, 3, STEPS)
    catalogue = {name: [getattr(one, name) for one in new] for name in NewItem.__struct_fields__}
    catalogue["first_seen_ms"] = [created_ms] * len(new)
    try:
        delta = write_delta(out, bundle.next_delta(created_ms), catalogue, tables)
    except DeltaFault as fault:
        raise MakeFault(f"what was made is no delta: {fault}", "report it") from None
    progress.step(STAGE, STEPS, STEPS)
    return delta


def contents(bundle: Bundle) -> list[NewItem]:
    """What the item tower may read of an edition's items, in the order of their indices from 1 on."""
    prices = bundle.tables["price"].tolist()
    return [
        NewItem(
            item=item, title=title, description="", category=category, price=price or None, image=image, in_stock=True
        )
        for item, title, category, price, image in zip(
            bundle.item_ids[1:], bundle.titles[1:], bundle.categories[1:], prices[1:], bundle.images()[1:], strict=True
        )
    ]


def _sound_items(path: Path, bundle: Bundle, progress: Progress) -> list[NewItem]:
    """The items of a file all of whose rows keep the rules. Raises MakeFault."""
    faults = RowFaults()
    try:
        new = read_items(path, bundle.index.keys(), faults, lambda text: progress.note(STAGE, text))
    except SourceError as error:
        raise MakeFault(error.fault, error.remedy) from None
    for fault in sorted(faults.samples, key=lambda one: one.row)[:SHOWN]:
        value = f", not {fault.value!r}" if fault.value else ""
        progress.note(STAGE, f"{path.name}, row {fault.row}: {fault.field} {fault.rule}{value}")
    if faults.bad_rows:
        worst = "; ".join(f"{total.rows} x {total.field} {total.rule}" for total in faults.totals()[:4])
        raise MakeFault(
            f"{faults.bad_rows} of {faults.rows_read} rows of {path} break a rule: {worst}",
            "correct these rows, or take them out; a delta is never changed once it is out, so none was made",
        )
    unknown = {one.category for one, index in zip(new, categories(new, bundle.features), strict=True) if not index}
    if unknown - {""}:
        names = ", ".join(repr(name) for name in sorted(unknown - {""})[:5])
        progress.note(
            STAGE,
            f"the bundle knows no category {names}: such items are placed by text, price and image alone",
            categories=len(unknown - {""}),
        )
    return new
