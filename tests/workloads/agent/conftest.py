"""The bundles that the agent's tests install, and a site in memory to bring them to."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests have no packages; `agent_world` lies beside them

from agent_world import World

from workloads.agent.releases import FakeReleases
from workloads.bundle.fake import build_fake_bundle


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake bundle; read only."""
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=60)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, with other items; read only."""
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=70, seed=1, prefix="other")


@pytest.fixture(scope="session")
def third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third one; read only."""
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=50, seed=2, prefix="third")


@pytest.fixture
def releases(made: Path, other: Path, third: Path) -> FakeReleases:
    """A registry with all three."""
    return FakeReleases(made, other, third)


@pytest.fixture
def world(tmp_path: Path, releases: FakeReleases) -> World:
    """A site that serves nothing yet."""
    return World(tmp_path / "site", releases)


@pytest.fixture
def make_world(tmp_path: Path) -> Callable[..., World]:
    """Makes a site over bundles of a test's own."""

    def make(*bundles: Path, **more: object) -> World:
        return World(tmp_path / "site", FakeReleases(*bundles), **more)  # type: ignore[arg-type]  # World checks them

    return make
