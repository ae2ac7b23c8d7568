"""Rounds of node hygiene over fakes: order of what is done, faults, and what is said."""

from __future__ import annotations

import itertools

from prometheus_client import CollectorRegistry

from workloads.contract.operators import SITE_LABEL
from workloads.operators.cloud import Group, MemoryCloud
from workloads.operators.cluster import MemoryCluster, Node
from workloads.operators.hygiene import Limits
from workloads.operators.sweeper import Sweeper

GONE, HERE = "i-0aaaaaaaaaaaaaaaa", "i-0bbbbbbbbbbbbbbbb"


def node(instance: str) -> Node:
    return Node(instance, f"aws:///eu-central-1a/{instance}", {SITE_LABEL: "aws"}, ready=False)


HOME = Node("worker-1", "k3s://worker-1", {SITE_LABEL: "onprem"}, ready=False)


class Scene:
    """A site with one instance gone and one alive, and a host at home."""

    def __init__(self) -> None:
        self.cluster = MemoryCluster([node(GONE), node(HERE), HOME])
        self.cloud = MemoryCloud({"g": Group(1, frozenset({HERE}))}, {GONE: "terminated", HERE: "running"})
        self.registry = CollectorRegistry()
        ticks = itertools.count(0, 10)
        self.sweeper = Sweeper(
            self.cluster,
            self.cloud,
            site="aws",
            region="eu-central-1",
            groups=["g"],
            limits=Limits(rounds=3),
            clock=lambda: float(next(ticks)),
            registry=self.registry,
        )

    def rounds(self, count: int) -> list[str]:
        return [self.sweeper.round() for _ in range(count)]

    def value(self, metric: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(metric, labels)


def test_the_password_goes_before_its_node_and_nothing_else_does():
    scene = Scene()
    assert scene.rounds(5) == [""] * 5
    assert scene.cluster.log == [
        ("remove-secret", "kube-system", f"{GONE}.node-password.k3s"),
        ("remove-node", GONE),
    ]
    assert set(scene.cluster.held) == {HERE, "worker-1"}
    assert scene.value("rankbridge_hygiene_nodes_removed_total") == 1


def test_a_cloud_that_fails_removes_nothing_and_the_count_begins_again():
    scene = Scene()
    scene.rounds(2)
    scene.cloud.fault = "cannot describe instances: Throttling"
    assert scene.rounds(20) == ["cannot describe instances: Throttling"] * 20
    scene.cloud.fault = ""
    scene.rounds(2)
    assert scene.cluster.log == []
    assert scene.value("rankbridge_hygiene_rounds_total", result="cloud-fault") == 20
    scene.rounds(1)
    assert ("remove-node", GONE) in scene.cluster.log


def test_a_cloud_that_answers_nothing_removes_nothing_and_says_why():
    scene = Scene()
    scene.cloud.states = {}
    assert set(scene.rounds(20)) == {f"EC2 does not know {HERE}, which its group counts on: the answer is not whole"}
    scene.cloud.held = {}
    assert set(scene.rounds(20)) == {"the answer lacks the group g"}
    assert scene.cluster.log == []
    assert scene.value("rankbridge_hygiene_rounds_total", result="held") == 40


def test_a_cluster_that_fails_is_asked_again():
    scene = Scene()
    scene.cluster.fault = "cannot list nodes"
    assert scene.rounds(2) == ["cannot list nodes"] * 2
    scene.cluster.fault = ""
    scene.rounds(3)
    assert ("remove-node", GONE) in scene.cluster.log
