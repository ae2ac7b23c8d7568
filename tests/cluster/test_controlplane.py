"""The control plane itself: that what it says about pods is Kubernetes' own word."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from lightkube import ApiError, Client
from lightkube.models.core_v1 import Container, NodeStatus, PodSpec, ResourceRequirements, Toleration
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Namespace, Node, Pod

GPU = {"cpu": "8", "memory": "32Gi", "pods": "110", "nvidia.com/gpu": "1"}


def until(true: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


def pod(name: str, **limits: str) -> Pod:
    container = Container(
        name="main", image=f"images.invalid/x@sha256:{'0' * 64}", resources=ResourceRequirements(limits=limits)
    )
    spec = PodSpec(containers=[container], tolerations=[Toleration(operator="Exists")])
    return Pod(metadata=ObjectMeta(name=name, namespace="default"), spec=spec)


@pytest.fixture
def gpu_node(client: Client) -> str:
    name = "probe-gpu"
    labels = {"rankbridge.io/played-by": "kwok"}
    client.apply(Node(metadata=ObjectMeta(name=name, labels=labels), status=NodeStatus(capacity=GPU, allocatable=GPU)))
    status = Node(metadata=ObjectMeta(name=name), status=NodeStatus(capacity=GPU, allocatable=GPU))
    client.apply(Node.Status(metadata=status.metadata, status=status.status))
    return name


def test_a_pod_that_asks_for_a_gpu_runs_on_the_node_that_has_one(client: Client, gpu_node: str):
    client.apply(pod("asks", **{"nvidia.com/gpu": "1"}))
    try:
        assert until(lambda: phase(client, "asks") == "Running")
        spec = client.get(Pod, "asks").spec
        assert spec is not None
        assert spec.nodeName == gpu_node
        client.apply(pod("waits", **{"nvidia.com/gpu": "1"}))
        assert not until(lambda: phase(client, "waits") == "Running", 2)
    finally:
        for name in ("asks", "waits"):
            client.delete(Pod, name, grace_period=0)
        client.delete(Node, gpu_node)


def phase(client: Client, name: str) -> str | None:
    status = client.get(Pod, name).status
    return status.phase if status else None


def test_a_pod_that_may_do_anything_is_refused_where_pods_are_restricted(client: Client):
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    client.apply(Namespace(metadata=ObjectMeta(name="restricted", labels=labels)))
    refused = pod("anything")
    assert refused.metadata is not None
    refused.metadata.namespace = "restricted"
    with pytest.raises(ApiError, match="violates PodSecurity"):
        client.apply(refused)
