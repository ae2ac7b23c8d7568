"""The control plane itself: that what it says about pods is Kubernetes' own word, and what plays a machine plays it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.config import FoundationConfig
from infra.controlplane import ControlPlane, ControlPlaneError, nodes
from infra.controlplane.api import Api, Manifest, RefusedError
from infra.controlplane.build import kubernetes_version
from infra.controlplane.harness import join, until

IMAGE = f"images.invalid/x@sha256:{'0' * 64}"
PLAYED = {"rankbridge.io/played-by": "kwok"}


def pod(name: str, namespace: str, **limits: str) -> Manifest:
    spec = {
        "containers": [{"name": "main", "image": IMAGE, "resources": {"limits": limits}}],
        "tolerations": [{"operator": "Exists"}],
        "nodeSelector": PLAYED,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


@pytest.fixture
def free(api: Api) -> Iterator[str]:
    """A namespace in which pods may do anything."""
    labels = {"pod-security.kubernetes.io/enforce": "privileged"}
    api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "free", "labels": labels}})
    account = ("v1", "ServiceAccount", "default", "free")
    assert until(lambda: any(a["metadata"]["namespace"] == "free" for a in api.find(*account[:2])))
    yield "free"
    api.delete("v1", "Namespace", "free")


@pytest.fixture
def gpu_node(api: Api) -> Iterator[str]:
    size = {"cpu": "8", "memory": "32Gi", "pods": "110", "nvidia.com/gpu": "1"}
    status = {"capacity": size, "allocatable": size}
    join(api, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "probe", "labels": PLAYED}, "status": status})
    yield "probe"
    api.delete("v1", "Node", "probe")


def test_a_pod_that_asks_for_a_gpu_runs_on_the_node_that_has_one_and_the_next_waits(api: Api, free: str, gpu_node: str):
    def phase(name: str) -> str:
        return str(api.get("v1", "Pod", name, free)["status"]["phase"])

    api.apply(pod("asks", free, **{"nvidia.com/gpu": "1"}))
    assert until(lambda: phase("asks") == "Running")
    assert api.get("v1", "Pod", "asks", free)["spec"]["nodeName"] == gpu_node
    api.apply(pod("waits", free, **{"nvidia.com/gpu": "1"}))
    assert not until(lambda: phase("waits") == "Running", 2)
    api.delete("v1", "Pod", "asks", free)
    assert until(lambda: phase("waits") == "Running")


def test_a_pod_that_may_do_anything_is_refused_where_pods_are_restricted(api: Api):
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "restricted", "labels": labels}})
    with pytest.raises(RefusedError, match="violates PodSecurity") as refused:
        api.apply(pod("anything", "restricted"))
    assert refused.value.status == 403


def test_a_kind_that_the_server_does_not_have_is_refused(api: Api):
    with pytest.raises(RefusedError, match="no Nothing in v1"):
        api.find("v1", "Nothing")


def test_the_control_plane_is_of_the_pinned_version(api: Api, plane: ControlPlane):
    assert plane.server.startswith("https://127.0.0.1:")
    assert all(n["status"]["nodeInfo"]["kubeletVersion"] for n in api.find("v1", "Node"))
    assert kubernetes_version().startswith("v1.36.")


def test_its_credentials_are_the_owners_alone(plane: ControlPlane):
    secret = [plane.kubeconfig, plane.home / "tokens.csv", *(plane.home / "credentials").glob("*.key")]
    assert len(secret) > 3
    assert {path.stat().st_mode & 0o777 for path in secret} == {0o600}


def test_what_is_not_built_is_named_with_the_command_that_builds_it(tmp_path: Path):
    with pytest.raises(ControlPlaneError, match=r"kube-apiserver.* not built: make cluster-tools"):
        ControlPlane(tmp_path / "home", binaries=tmp_path).start()


def test_nodes_are_what_the_foundation_makes_of_machines(foundation: FoundationConfig):
    private = nodes.private_nodes(foundation)
    servers = [n for n in private if n["spec"].get("taints")]
    assert (len(servers), len(private) - len(servers)) == (3, 2)
    assert servers[0]["spec"]["taints"] == [{"key": "CriticalAddonsOnly", "value": "true", "effect": "NoExecute"}]
    assert {n["metadata"]["labels"]["topology.kubernetes.io/zone"] for n in private} == {"home-onprem"}
    gpu = nodes.gpu_nodes(foundation, "gpu-burst", 4)
    assert {n["metadata"]["labels"]["rankbridge.io/lifecycle"] for n in gpu} == {"on-demand", "spot"}
    assert len({n["metadata"]["labels"]["topology.kubernetes.io/zone"] for n in gpu}) == 3
    for node in gpu:
        labels = node["metadata"]["labels"]
        zone, name = labels["topology.kubernetes.io/zone"], node["metadata"]["name"]
        assert node["spec"]["providerID"] == f"aws:///{zone}/{name}"
        assert node["status"]["allocatable"] | {"cpu": "3500m", "nvidia.com/gpu": "1"} == node["status"]["allocatable"]
        assert node["spec"]["taints"] == [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
