"""One gateway for all attacks: what each leaves behind meets the next."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests have no packages; `siege` lies beside them

from siege import Siege


@pytest.fixture(scope="session")
def besieged(tmp_path_factory: pytest.TempPathFactory, bundle_path: Path) -> Iterator[Siege]:
    """A gateway process with an intake, and nobody else."""
    made = Siege(tmp_path_factory.mktemp("siege"), bundle_path)
    try:
        yield made
    finally:
        made.stop()
