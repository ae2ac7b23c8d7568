"""Signed bundles and a delta, a registry in memory, and a process that can be killed at any step."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests have no packages; `mortality` lies beside them

from mortality import Made, Mortal

from workloads.bundle.delta import write_delta
from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.registry import Registry
from workloads.bundle.signature import Trust, make_key, sign
from workloads.bundle.store import open_bundle
from workloads.contract.tensors import ITEM_TABLES, NEIGHBOURS, VECTOR_DIM
from workloads.objects.memory import MemoryObjects


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("signed")
    key = make_key(root / "publisher.key")
    old, new = (build_fake_bundle(root / "bundles", items=4, seed=seed) for seed in (1, 2))
    facts = open_bundle(new).next_delta(created_ms=1_790_000_000_000)
    axes = {"N+1": 1, "VECTOR_DIM": VECTOR_DIM, "NEIGHBOURS": NEIGHBOURS}
    tables = {name: np.zeros([axes[axis] for axis in shape], dtype) for name, (dtype, shape) in ITEM_TABLES.items()}
    catalogue: dict[str, list[Any]] = {
        "item": ["item-new"],
        "title": ["A new lantern"],
        "description": ["It came today."],
        "category": ["Lighting"],
        "price": [9.5],
        "image": [[]],
        "first_seen_ms": [1_790_000_000_000],
        "in_stock": [True],
    }
    delta = write_delta(root / "deltas", facts, catalogue, tables)
    for directory in (old, new, delta):
        sign(directory, key.private)
    return Made(key, Trust.of(key), old, new, delta)


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mortal:
    """Fsync and rename are steps; removing is what a dead process no longer does."""
    mortal = Mortal()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what the dead leave goes with the test

    def watch(name: str, *, counted: bool) -> None:
        real = getattr(os, name)

        def watched(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as the real one
            return mortal.step(f"{name} {arguments[0]}", lambda: real(*arguments, **options), counted=counted)

        monkeypatch.setattr(os, name, watched)

    for name in ("fsync", "rename", "replace"):
        watch(name, counted=True)
    for name in ("unlink", "rmdir"):
        watch(name, counted=False)
    return mortal


@pytest.fixture
def registry(signed: Made) -> Registry:
    return Registry(MemoryObjects(), signed.trust)
