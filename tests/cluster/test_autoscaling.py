"""Autoscaling, driven for real: Kubernetes' own autoscaler, asking a played server of external metrics.

KEDA does not run here (docs/apps.md). What it makes of a ScaledObject is an autoscaler of pods over an external
metric; the same is made here by its documented rules, from the very ScaledObject that was accepted. Stacks whose
engine is `hpa` declare such an autoscaler themselves.
"""

from __future__ import annotations

import ssl
import time
import urllib.request
from collections.abc import Iterator

import pytest

from infra.controlplane import ControlPlane
from infra.controlplane.api import Api, Manifest
from infra.controlplane.harness import Deployed, Figures, condition, until
from infra.controlplane.metrics import GROUP_VERSION, ExternalMetrics

HPA = "autoscaling/v2", "HorizontalPodAutoscaler"
API_SERVICE = "apiregistration.k8s.io/v1", "APIService", "v1beta1.external.metrics.k8s.io"
AT_ONCE = {"stabilizationWindowSeconds": 0, "policies": [{"type": "Percent", "value": 100, "periodSeconds": 1}]}
"""The test's own pace, in place of minutes."""


@pytest.fixture(scope="module")
def metrics(plane: ControlPlane, api: Api) -> Iterator[ExternalMetrics]:
    with ExternalMetrics(plane.home / "external-metrics", plane.front_proxy_ca) as server:
        for manifest in server.manifests():
            api.apply(manifest, manager="external-metrics")
        available = until(lambda: condition(api.get(*API_SERVICE), "Available") == "True", 60)
        assert available, api.get(*API_SERVICE)["status"]
        yield server
        # An API group whose server is gone would keep namespaces from being deleted.
        api.delete(*API_SERVICE)


def as_keda_makes_it(scaled: Manifest) -> Manifest:
    """The autoscaler that KEDA 2 makes of a ScaledObject with one trigger.

    Source: KEDA documentation, "Scaling Deployments, StatefulSets & Custom Resources": `keda-hpa-<name>`, the metric
    `s0-<type of the trigger>` selected by the ScaledObject's name, and the trigger's threshold as target.
    """
    metadata, spec = scaled["metadata"], scaled["spec"]
    (trigger,) = spec["triggers"]
    kind = trigger.get("metricType", "AverageValue")
    field = {"AverageValue": "averageValue", "Value": "value"}[kind]
    advanced = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {})
    reference = spec["scaleTargetRef"]
    metric = {
        "name": f"s0-{trigger['type']}",
        "selector": {"matchLabels": {"scaledobject.keda.sh/name": metadata["name"]}},
    }
    return {
        "apiVersion": HPA[0],
        "kind": HPA[1],
        "metadata": {"name": f"keda-hpa-{metadata['name']}", "namespace": metadata["namespace"]},
        "spec": {
            "scaleTargetRef": {
                "apiVersion": reference.get("apiVersion", "apps/v1"),
                "kind": reference.get("kind", "Deployment"),
                "name": reference["name"],
            },
            "minReplicas": spec.get("minReplicaCount", 0) or 1,
            "maxReplicas": spec.get("maxReplicaCount", 100),
            "metrics": [
                {
                    "type": "External",
                    "external": {"metric": metric, "target": {"type": kind, field: trigger["metadata"]["threshold"]}},
                }
            ],
            **({"behavior": advanced["behavior"]} if "behavior" in advanced else {}),
        },
    }


class Scaler:
    """One role's autoscaler at the test's own pace, and what the played metrics tell it."""

    def __init__(self, deployed: Deployed, metrics: ExternalMetrics, role: str, site: str) -> None:
        self._deployed, self._metrics, self._role, self._site = deployed, metrics, role, site
        self.manifest = as_keda_makes_it(deployed.of("ScaledObject", role, site))
        self.manifest["spec"]["behavior"] = {"scaleUp": AT_ONCE, "scaleDown": AT_ONCE}
        spec = self.manifest["spec"]
        self.low, self.high = int(spec["minReplicas"]), int(spec["maxReplicas"])
        external = spec["metrics"][0]["external"]
        self.metric, self._target = external["metric"]["name"], external["target"]

    @property
    def replicas(self) -> int:
        return int(self._deployed.workload(self._role, self._site)["spec"]["replicas"])

    def says(self, load: float) -> None:
        """So many times the load that the pods which are always warm are meant for."""
        is_average = self._target["type"] == "AverageValue"
        threshold = int(self._target["averageValue" if is_average else "value"])
        self._metrics.values[self.metric] = str(int(threshold * load * (self.low if is_average else 1)))

    def asked(self) -> int:
        where = self.manifest["metadata"]["namespace"], self.metric
        return self._metrics.asked.count(where)

    def status(self) -> Manifest:
        metadata = self.manifest["metadata"]
        return self._deployed.api.get(*HPA, metadata["name"], metadata["namespace"])

    def __enter__(self) -> Scaler:
        self._deployed.api.apply(self.manifest, manager="keda-operator")
        return self

    def __exit__(self, *_: object) -> None:
        metadata = self.manifest["metadata"]
        self._deployed.api.delete(*HPA, metadata["name"], metadata["namespace"])
        self._deployed.scale(self._role, self._site, self.low)


def test_only_the_api_server_may_ask_for_external_metrics(metrics: ExternalMetrics):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    (port,) = {m["spec"]["service"]["port"] for m in metrics.manifests() if m["kind"] == "APIService"}
    with pytest.raises(OSError, match=r"(?i)certificate.required|reset|EOF|closed"):
        urllib.request.urlopen(f"https://127.0.0.1:{port}/apis/{GROUP_VERSION}", context=context, timeout=5)


@pytest.mark.parametrize(
    ("role", "site"),
    [
        pytest.param("triton", "onprem", id="time in Triton's queue"),
        pytest.param("gateway", "aws", id="requests in flight"),
    ],
)
def test_replicas_follow_the_load_up_and_down_between_their_bounds(
    role: str, site: str, deployed: Deployed, metrics: ExternalMetrics, figures: Figures
):
    scaler = Scaler(deployed, metrics, role, site)
    low, high = scaler.low, scaler.high
    assert 1 < low < high
    scaler.says(1.0)
    with scaler:
        assert until(lambda: scaler.asked() >= 2), "the autoscaler never asked"
        assert scaler.replicas == low
        began = time.monotonic()
        scaler.says(1.5)
        assert until(lambda: scaler.replicas > low), scaler.status()
        figures.add(f"{role} at {site} scales out after", f"{time.monotonic() - began:.1f} s", "it looks each second")
        scaler.says(50.0)
        assert until(lambda: scaler.replicas == high, 45), scaler.status()
        asked = scaler.asked()
        assert until(lambda: scaler.asked() >= asked + 2)
        assert scaler.replicas == high, "however long the queue, no more than declared"
        began = time.monotonic()
        scaler.says(0.1)
        assert until(lambda: scaler.replicas == low, 45), scaler.status()
        figures.add(f"{role} at {site} scales in after", f"{time.monotonic() - began:.1f} s", f"{high} to {low} pods")
        asked = scaler.asked()
        assert until(lambda: scaler.asked() >= asked + 2)
        assert scaler.replicas == low, "however idle, no fewer than are to stay warm"
    assert until(deployed.is_settled, 60), deployed.unsettled()


def test_a_blind_autoscaler_leaves_replicas_as_they_are(deployed: Deployed, metrics: ExternalMetrics):
    scaler = Scaler(deployed, metrics, "triton", "onprem")
    scaler.says(2.0)
    with scaler:
        assert until(lambda: scaler.replicas == scaler.high), scaler.status()
        metrics.values.clear()
        assert until(lambda: condition(scaler.status(), "ScalingActive") == "False"), scaler.status()
        asked = scaler.asked()
        assert until(lambda: scaler.asked() >= asked + 2)
        assert scaler.replicas == scaler.high
    assert until(deployed.is_settled, 60), deployed.unsettled()
