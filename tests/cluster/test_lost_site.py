"""A lost site: what Kubernetes itself does about it, and when. The baseline that failover in the request path beats.

The cloud site is lost, as the control plane at home sees it when the VPN is cut: its nodes' heartbeats end, and its
pods say nothing any more. Nothing is shortened: the grace period is Kubernetes' own and the tolerations are the
declared ones. A pod that declares none gets Kubernetes' 300 s; waiting for that is for RANKBRIDGE_LONG=1.

When home is lost the API server is lost with it: pods in aws run on, and nothing moves until home is back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.controlplane import ControlPlane
from infra.controlplane.api import Api, Manifest
from infra.controlplane.harness import Deployed, Figures, condition, is_leaving, is_ready, observe, until

SITE = "aws"
OF_SITE = f"rankbridge.io/site={SITE}"
IS_LONG = os.environ.get("RANKBRIDGE_LONG") == "1"
DEFAULT_TOLERATION_S = 300
HEARTBEAT_S = 10
"""A quarter of a node's lease: what a kubelet renews it after."""
PROBE = "declares-no-tolerations"
UNREACHABLE = "node.kubernetes.io/unreachable"


class Diary:
    """When the control plane noted each kind of thing about some nodes, in seconds after `begin`."""

    def __init__(self, api: Api, nodes: set[str]) -> None:
        self._nodes = nodes
        self._zero: float | None = None
        self._seen: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()
        looks = {
            ("v1", "Node"): self._node,
            ("discovery.k8s.io/v1", "EndpointSlice"): self._slice,
            ("v1", "Pod"): self._pod,
        }
        observe(api, looks)

    def begin(self) -> None:
        self._zero = time.monotonic()

    def times(self, what: str) -> list[float]:
        """One for each thing, earliest first."""
        return sorted(self._seen.get(what, {}).values())

    def _note(self, what: str, which: str) -> None:
        if self._zero is not None:
            with self._lock:
                self._seen.setdefault(what, {}).setdefault(which, time.monotonic() - self._zero)

    def _node(self, event: str, node: Manifest) -> None:
        name = node["metadata"]["name"]
        if event == "DELETED" or name not in self._nodes:
            return
        if condition(node, "Ready") != "True":
            self._note("node not ready", name)
        if any(t["key"] == UNREACHABLE and t["effect"] == "NoExecute" for t in node["spec"].get("taints", ())):
            self._note("node tainted", name)

    def _slice(self, event: str, piece: Manifest) -> None:
        service = piece["metadata"]["labels"].get("kubernetes.io/service-name", "")
        if event == "DELETED" or service.endswith("-pods"):
            return  # a headless Service names pods whether they are ready or not
        for end in piece.get("endpoints") or ():
            if end.get("nodeName") in self._nodes and not end["conditions"].get("ready"):
                self._note("endpoint out", f"{service} {end['addresses']}")

    def _pod(self, event: str, pod: Manifest) -> None:
        if event != "DELETED" and pod["spec"].get("nodeName") in self._nodes and is_leaving(pod):
            role = pod["metadata"]["labels"].get("rankbridge.io/role", PROBE)
            self._note(f"{role} given up", pod["metadata"]["uid"])


@dataclasses.dataclass(frozen=True)
class Loss:
    """A site that is lost from `diary`'s begin on, and what was there before."""

    diary: Diary
    nodes: set[str]
    waits: dict[str, int]
    gateways: int
    at_home: set[str]


@pytest.fixture(scope="session")
def loss(deployed: Deployed, plane: ControlPlane, api: Api) -> Iterator[Loss]:
    """Begins with the first test that asks for it; tests of other nodes may run meanwhile."""
    lay_probe(deployed, api)
    waits = {role: declared_wait_s(deployed, role) for role in ("gateway", "triton")}
    nodes = {n["metadata"]["name"] for n in api.find("v1", "Node", selector=OF_SITE)}
    at_home = {p["metadata"]["uid"] for p in deployed.pods(site="onprem")}
    gateways = len(deployed.pods("gateway", SITE))
    diary = Diary(api, nodes)
    time.sleep(2)  # watches first tell what is there
    diary.begin()
    plane.freeze(f"kwok-{SITE}")
    try:
        yield Loss(diary, nodes, waits, gateways, at_home)
    finally:
        plane.thaw(f"kwok-{SITE}")


def lay_probe(deployed: Deployed, api: Api) -> None:
    """A pod in aws that declares nothing about lost nodes, as most in the world."""
    gateway = deployed.of("Deployment", "gateway", SITE)
    namespace, template = gateway["metadata"]["namespace"], gateway["spec"]["template"]["spec"]
    size = {"cpu": "50m", "memory": "64Mi", "ephemeral-storage": "64Mi"}
    (first, *_) = template["containers"]
    container = {
        "name": "main",
        "image": first["image"],
        "securityContext": first["securityContext"],
        "resources": {"requests": size, "limits": size},
    }
    spec = {
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "nodeSelector": {"rankbridge.io/site": SITE},
        "securityContext": template["securityContext"],
        "containers": [container],
    }
    labels = {"app": PROBE}
    api.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": PROBE, "namespace": namespace},
            "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": spec}},
        }
    )
    assert until(deployed.is_settled), deployed.unsettled()


def declared_wait_s(deployed: Deployed, role: str) -> int:
    """How long a role in aws declares to wait for a node that is not heard from."""
    tolerations = deployed.workload(role, SITE)["spec"]["template"]["spec"]["tolerations"]
    (found,) = {t["tolerationSeconds"] for t in tolerations if t.get("key") == UNREACHABLE}
    return int(found)


def test_a_site_that_was_lost_just_now_still_counts_as_there(loss: Loss, deployed: Deployed, api: Api):
    assert loss.waits["gateway"] < DEFAULT_TOLERATION_S < loss.waits["triton"]
    behind = [
        end
        for piece in api.find("discovery.k8s.io/v1", "EndpointSlice", selector=OF_SITE)
        for end in piece.get("endpoints") or ()
    ]
    assert {end["nodeName"] for end in behind} <= loss.nodes
    assert all(end["conditions"]["ready"] for end in behind), "requests go on being sent into nothing"
    assert len(behind) >= len(deployed.pods("gateway", SITE)) > 0


@pytest.mark.timeout(900)
def test_a_lost_site_is_noted_and_its_pods_given_up_when_their_tolerations_say(
    loss: Loss, deployed: Deployed, plane: ControlPlane, api: Api, figures: Figures, baseline_file: Path
):
    diary, nodes, waits, gateways = loss.diary, loss.nodes, loss.waits, loss.gateways
    grace = plane.node_monitor_grace_s
    try:
        assert until(lambda: len(diary.times("node not ready")) == len(nodes), grace + 30)
        assert until(lambda: len(diary.times("node tainted")) == len(nodes), 60)
        assert until(lambda: len(diary.times("gateway given up")) == gateways, waits["gateway"] + 30)
        # A GPU pod waits for its node: no other may run it, and the VPN may be back soon.
        assert not diary.times("triton given up")
        successors = deployed.pods("gateway", SITE)
        assert {p["status"]["phase"] for p in successors} == {"Pending"}, "they wait for their own site"
        if IS_LONG:
            assert until(lambda: diary.times(f"{PROBE} given up"), DEFAULT_TOLERATION_S + 30)
            assert not diary.times("triton given up")
        assert all(seconds >= DEFAULT_TOLERATION_S for seconds in diary.times(f"{PROBE} given up"))
        assert {p["metadata"]["uid"] for p in deployed.pods(site="onprem")} == loss.at_home, "home was touched"
    finally:
        plane.thaw(f"kwok-{SITE}")
    back = time.monotonic()
    assert grace - HEARTBEAT_S - 5 <= diary.times("node not ready")[0] <= grace + 10
    assert diary.times("endpoint out")[0] >= diary.times("node not ready")[0] - 1
    assert diary.times("gateway given up")[0] >= diary.times("node tainted")[0] + waits["gateway"] - 2
    baseline = {
        "what": "Kubernetes' own reaction to a lost site, in seconds after its last sign of life",
        "node_monitor_grace_s": grace,
        "tolerations_s": {**waits, "undeclared": DEFAULT_TOLERATION_S},
        "nodes": len(nodes),
        "seconds": {
            "first node not ready": diary.times("node not ready")[0],
            "last node not ready": diary.times("node not ready")[-1],
            "first endpoint out of its Service": diary.times("endpoint out")[0],
            "last endpoint out of its Service": diary.times("endpoint out")[-1],
            "last node tainted": diary.times("node tainted")[-1],
            "first gateway given up": diary.times("gateway given up")[0],
            "last gateway given up": diary.times("gateway given up")[-1],
            **({"pod without tolerations given up": diary.times(f"{PROBE} given up")[0]} if IS_LONG else {}),
        },
    }
    write(baseline, baseline_file)
    for what, seconds in baseline["seconds"].items():  # type: ignore[attr-defined]  # written a few lines above
        figures.add(f"lost site: {what}", f"{seconds:.1f} s")

    assert until(lambda: all(is_ready(node) for node in api.find("v1", "Node", selector=OF_SITE)), 60)
    figures.add("lost site: nodes ready after its return", f"{time.monotonic() - back:.1f} s")
    assert until(deployed.is_settled, 60), deployed.unsettled()
    figures.add("lost site: all pods ready after its return", f"{time.monotonic() - back:.1f} s")


def write(baseline: dict[str, Any], file: Path) -> None:
    """Keep the baseline; a short run does not forget what a long one waited for."""
    seconds = {what: round(value, 1) for what, value in baseline["seconds"].items()}
    with contextlib.suppress(OSError, ValueError, KeyError):
        before = json.loads(file.read_text())
        seconds = {**{k: v for k, v in before["seconds"].items() if k not in seconds}, **seconds}
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps({**baseline, "seconds": seconds}, indent=1) + "\n")
    new.replace(file)
