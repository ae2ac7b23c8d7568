"""A small bundle, and a delta of new items made by the job."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from workloads.bundle.fake import CREATED_MS, build_fake_bundle
from workloads.delta.making import make
from workloads.telemetry.progress import Progress

NOW = CREATED_MS + 86_400_000

NEW_ITEMS = """\
item,title,description,category,price,image,in_stock
new-feeder,Brass squirrel feeder,Hangs in trees,Garden,12.50,,
new-mug,Zeppelin mug,"Holds half a litre, of anything",Kitchen,4.20,,yes
new-lamp,Copper dragonfly lamp,,Lighting,,,true
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=200)


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "new.csv"
    path.write_text(NEW_ITEMS)
    return path


@pytest.fixture(scope="session")
def delta(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three items of NEW_ITEMS on top of `made`: indices 201 to 203."""
    scratch = tmp_path_factory.mktemp("delta")
    (scratch / "new.csv").write_text(NEW_ITEMS)
    return make(made, [], scratch / "new.csv", scratch / "deltas", Progress(io.StringIO()), now_ms=lambda: NOW)
