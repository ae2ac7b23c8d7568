"""Small inputs that several tests of the data room share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workloads.data.simulator import Simulation, SimulatorConfig, simulate

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def simulation() -> Simulation:
    """150,000 events of 3,000 people: enough to measure what was planted, two seconds to make."""
    return simulate(SimulatorConfig(users=3_000, items=1_500, events=150_000, seed=7))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets; tests of it are skipped where there is none."""
    folder = Path(os.environ.get("RANKBRIDGE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here: ../shared/data is missing, and RANKBRIDGE_SHARED_DATA is not set")
    return folder
