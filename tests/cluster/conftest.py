"""One real control plane for the whole suite: `make test-cluster` builds it; `make test` skips these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lightkube import Client, KubeConfig

from infra.controlplane import ControlPlane, ControlPlaneError


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    if os.environ.get("RANKBRIDGE_CLUSTER") != "1":
        pytest.skip("needs a Kubernetes control plane: make test-cluster")
    started = ControlPlane(tmp_path_factory.mktemp("controlplane"))
    try:
        took = started.start()
    except ControlPlaneError as error:
        pytest.fail(str(error))
    print(f"\ncontrol plane up after {took:.1f} s")  # noqa: T201 - a figure of the suite, shown with -s
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def client(plane: ControlPlane) -> Iterator[Client]:
    """An administrator's client, with applies that own what they set."""
    config = KubeConfig.from_file(str(plane.kubeconfig))
    opened = Client(config=config, namespace="default", field_manager="rankbridge", trust_env=False)
    yield opened
    opened._client._client.close()
