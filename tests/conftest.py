"""What many suites share: one LocalStack for the whole run. Buckets and names are each test's own."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import pytest
import structlog

import workloads  # noqa: F401 - before any test module: ONNX Runtime must not report to its maker from tests either
from infra.emulator import ENVIRONMENT, Emulator


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """AWS on this machine, started once; tests that use it are `real_parts` and name their resources themselves."""
    if not (ENVIRONMENT / "bin" / "python").exists():
        pytest.skip("LocalStack is not installed: make localstack-install")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = Emulator(tmp_path_factory.mktemp("localstack"), port)
    started.start()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """A test that says where records go has a stream that ends with it: no later one may write there."""
    yield
    structlog.reset_defaults()
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Trainings first: with two workers the longest files must not be the last ones."""
    items.sort(key=lambda item: not {"training", "export"} & set(item.path.parts))
