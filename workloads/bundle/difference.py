"""What changed from one bundle to another: files, metrics, feature schema, what they were made from. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from workloads.bundle import manifest as m
from workloads.contract.tensors import FeatureSchema

Value = str | int | float | None


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """One fact before and after; None on the side that does not have it."""

    name: str
    before: Value
    after: Value


class FileChange(msgspec.Struct, frozen=True, kw_only=True):
    """One file that is not the same in both; sizes in bytes, None on the side that does not have it."""

    name: str
    before: int | None
    after: int | None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Only what differs, by name."""

    before: str
    after: str
    facts: list[Changed]
    files: list[FileChange]
    same_bytes: int
    """Of files that are in both: not sent again, not stored twice."""
    metrics: list[Changed]
    """`<protocol>.<row>.<metric>`, `<protocol>.rung_<n>.loss` and `ranker.<figure>`."""
    features: list[Changed]


_FACTS: Final = ("dataset", "dataset_digest", "training_digest", "key_epoch", "created_ms", "schema_version")


def compare(before: tuple[str, m.Manifest, FeatureSchema], after: tuple[str, m.Manifest, FeatureSchema]) -> Difference:
    """Each side: id, manifest, feature schema."""
    one, two = before[1], after[1]
    return Difference(
        before=before[0],
        after=after[0],
        facts=_changes({name: getattr(one, name) for name in _FACTS}, {name: getattr(two, name) for name in _FACTS}),
        files=[
            FileChange(
                name=name,
                before=one.files[name].size if name in one.files else None,
                after=two.files[name].size if name in two.files else None,
            )
            for name in sorted(one.files | two.files)
            if one.files.get(name) != two.files.get(name)
        ],
        same_bytes=sum(entry.size for name, entry in one.files.items() if two.files.get(name) == entry),
        metrics=_changes(_metrics(one), _metrics(two)),
        features=_changes(_features(before[2]), _features(after[2])),
    )


def _changes(before: Mapping[str, Value], after: Mapping[str, Value]) -> list[Changed]:
    return [
        Changed(name=name, before=before.get(name), after=after.get(name))
        for name in sorted({**before, **after})
        if before.get(name) != after.get(name)
    ]


def _metrics(manifest: m.Manifest) -> dict[str, Value]:
    quality = manifest.quality
    found: dict[str, Value] = {
        f"{row.protocol}.{row.name}.{metric}": value for row in quality.rows for metric, value in row.metrics.items()
    }
    found |= {f"{row.protocol}.rung_{row.rung}.loss": row.loss for row in quality.rungs}
    for figure in ("auc", "log_loss", "calibration"):
        found[f"ranker.{figure}"] = getattr(quality.ranker, figure)
    found["ann.recall_at_10"] = manifest.ann.recall_at_10
    return found


def _features(schema: FeatureSchema) -> dict[str, Value]:
    """Numbers and words as they are, lists by length and digest: a person looks whether they changed, not at them."""
    found: dict[str, Value] = {}
    for name, value in msgspec.to_builtins(schema).items():
        found[name] = value if isinstance(value, Value) else f"{len(value)} of sha256 {_digest(value)}"
    return found


def _digest(value: object) -> str:
    return m.identity(msgspec.json.encode(value, order="deterministic"))[: m.SHORT]
