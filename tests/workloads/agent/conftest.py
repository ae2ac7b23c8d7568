"""The bundle that the agent's tests install."""

from pathlib import Path

import pytest

from workloads.bundle.fake import build_fake_bundle


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake bundle; read only."""
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=60)
