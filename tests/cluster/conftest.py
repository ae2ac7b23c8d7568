"""One real control plane for the whole suite, with the foundation's nodes and everything of `apps-prod` on it.

`make test-cluster` builds it; `make test` skips these tests. Figures that tests measure are printed at the end in one
table, and those of a lost site are written to `.rankbridge/cluster/baseline.json` (`RANKBRIDGE_BASELINE` overrides).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightkube import Client, KubeConfig

from infra import apps_manifests, cluster, config, paper
from infra.config import FoundationConfig
from infra.controlplane import CRDS, ROOT, ControlPlane, ControlPlaneError, missing_binaries, nodes, volumes
from infra.controlplane.api import Api, Manifest, documents
from infra.controlplane.harness import Deployed, Figures, condition, is_ready, join, until
from infra.recording import Recording

GPU_NODES = 5
"""Of the group `gpu-base`: enough for what always runs in aws, and a GPU to spare."""
POD_START_MS = 400
AUTOSCALER_SYNC_S = 1
FIGURES = Figures()


def pytest_terminal_summary(terminalreporter: Any) -> None:  # noqa: ANN401 - pytest does not export its type
    if FIGURES.rows:
        terminalreporter.section("measured on the control plane")
        for line in FIGURES.lines():
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A lost site takes a minute and a half to be given up: meanwhile operators are tried, on nodes of their own."""
    files = [item.path.name for item in items]
    if "test_lost_site.py" in files and "test_operators.py" in files:
        first = files.index("test_lost_site.py")
        waits = [item for item, name in zip(items, files, strict=True) if name == "test_lost_site.py"]
        rest = [item for item in items if item not in waits]
        behind = max(n for n, item in enumerate(rest) if item.path.name == "test_operators.py")
        items[:] = [*rest[:first], waits[0], *rest[first : behind + 1], *waits[1:], *rest[behind + 1 :]]


@pytest.fixture(scope="session")
def figures() -> Figures:
    return FIGURES


@pytest.fixture(scope="session")
def baseline_file() -> Path:
    return Path(os.environ.get("RANKBRIDGE_BASELINE", ROOT / ".rankbridge" / "cluster" / "baseline.json"))


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    if os.environ.get("RANKBRIDGE_CLUSTER") != "1":
        pytest.skip("needs a Kubernetes control plane: make test-cluster")
    if missing := missing_binaries():
        pytest.fail(f"not built, or of other versions: {', '.join(missing)}. Build them: make cluster-tools")
    started = ControlPlane(
        tmp_path_factory.mktemp("controlplane"),
        admission=cluster.admission().text,
        autoscaler_sync_s=AUTOSCALER_SYNC_S,
        pod_start_ms=POD_START_MS,
    )
    try:
        took = started.start()
    except ControlPlaneError as error:
        pytest.fail(str(error))
    FIGURES.add("control plane up", f"{took:.1f} s", "at most 10 s")
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def client(plane: ControlPlane) -> Iterator[Client]:
    """An administrator's client, with applies that own what they set."""
    kubeconfig = KubeConfig.from_file(str(plane.kubeconfig))
    opened = Client(config=kubeconfig, namespace="default", field_manager="rankbridge", trust_env=False)
    yield opened
    opened._client._client.close()


@pytest.fixture(scope="session")
def api(plane: ControlPlane) -> Iterator[Api]:
    """An administrator's, in plain manifests."""
    with Api(plane.kubeconfig) as opened:
        yield opened


@pytest.fixture(scope="session")
def foundation() -> FoundationConfig:
    """`foundation-prod`, with what its operator adds made up."""
    return config.read("foundation-prod", *paper.sample("foundation-prod"))


@pytest.fixture(scope="session")
def recorded() -> Recording:
    """The recorded program of `apps-prod` upon `foundation-prod`."""
    found = paper.record_apps("apps-prod")
    FIGURES.add("apps-prod recorded", f"{found.seconds:.1f} s", "of processor time, at most 5 s")
    return found


@pytest.fixture(scope="session")
def manifests(recorded: Recording) -> list[Manifest]:
    """Every Kubernetes object of `apps-prod`, in the order of applying."""
    return list(apps_manifests.manifests(recorded))


@pytest.fixture(scope="session")
def machines(plane: ControlPlane, api: Api, foundation: FoundationConfig) -> list[Manifest]:
    """The foundation's nodes, all ready; the heartbeats of each site come from a KWOK of its own."""
    found = [*nodes.private_nodes(foundation), *nodes.gpu_nodes(foundation, "gpu-base", GPU_NODES)]
    for site in foundation.sites:
        plane.start_kwok(f"kwok-{site.name}", f"rankbridge.io/site={site.name}")
    for node in found:
        join(api, node)
    assert until(lambda: all(is_ready(node) for node in api.find("v1", "Node"))), "nodes do not become ready"
    return found


@pytest.fixture(scope="session")
def deployed(api: Api, machines: list[Manifest], manifests: list[Manifest]) -> Iterator[Deployed]:
    """Everything of `apps-prod`, applied once in order of dependency and settled."""
    assert machines
    for definition in documents(sorted(CRDS.glob("*.yaml"))):
        api.apply(definition, manager="addons")
    claims = [m for m in manifests if m["kind"] == "PersistentVolumeClaim"]
    claims += [c for m in manifests for c in m.get("spec", {}).get("volumeClaimTemplates", ())]
    for name in sorted({c["spec"]["storageClassName"] for c in claims}):
        api.apply(volumes.storage_class(name), manager="addons")
    kind = "apiextensions.k8s.io/v1", "CustomResourceDefinition"
    assert until(lambda: all(condition(c, "Established") == "True" for c in api.find(*kind)))
    with volumes.Provisioner(api):
        began = time.monotonic()
        for manifest in manifests:
            api.apply(manifest)
        FIGURES.add("apps-prod applied", f"{time.monotonic() - began:.1f} s", f"{len(manifests)} objects")
        done = Deployed(api, manifests)
        assert until(done.is_settled, 60), done.unsettled()
        FIGURES.add("all of it running", f"{time.monotonic() - began:.1f} s", f"{len(done.pods())} pods")
        yield done
