"""The one shape of a deployment: pods, their Services, identity, disruption budget, policy, scaling and metrics.

A role at a site is one `Service`. What runs in its pods comes in as containers (`infra.serving`); who may reach them
comes from the one table (`infra.edges`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pulumi
import pulumi_kubernetes as k8s
from pulumi import Input, ResourceOptions

from infra import pods
from infra.apps_config import Role, RoleSettings, SiteSettings
from infra.edges import SERVING
from workloads.contract.operators import IN_ROTATION, ROTATION_LABEL

STOP_S: Final = 45
"""Longer than drain and a server's own stop together."""
GATEWAY_WAITS_S: Final = 30
"""A gateway holds nothing: it is replaced soon after its node went silent."""
HOLDER_WAITS_S: Final = 3600
"""A GPU pod, or one with a volume, is not moved for a hiccup of the VPN: the other site serves meanwhile."""


_WARM: Final = {
    "deployment-targeted-by-hpa-does-not-have-replicas-configured": "the warm pods of the first update; later ones "
    "leave the number to the scaler (ignoreChanges)"
}


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A measure of load from outside the pods, and how much of it each pod (or all of them) should see."""

    metric: str
    target: int
    per_pod: bool
    query: str
    """The same as PromQL."""
    prometheus: str
    """Where KEDA asks; empty for an HPA that asks the external metrics API."""


@dataclasses.dataclass(frozen=True)
class ServiceArgs:
    """One role at one site."""

    site: SiteSettings
    settings: RoleSettings
    containers: Sequence[k8s.core.v1.ContainerArgs]
    init: Sequence[k8s.core.v1.ContainerArgs]
    """Init containers and sidecars, in the order of starting."""
    volumes: Sequence[k8s.core.v1.VolumeArgs]
    ports: Mapping[str, int]
    """What its Service offers, by name."""
    policy: Input[Any]
    """Spec of its NetworkPolicy."""
    scaling: Scaling | None = None
    claim: str = ""
    """Name of the volume that each pod of a StatefulSet keeps; empty for a Deployment."""
    runtime_class: str = ""
    shares_a_node: bool = False
    """Whether its pods must be where one volume is, so that they cannot be told to keep apart."""
    waits_s: int = GATEWAY_WAITS_S
    metrics: Sequence[str] = ()
    """Names of ports with /metrics; none where nobody watches."""
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of its pods."""
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Checks of kube-score that do not apply, with the reason."""


class Service(pulumi.ComponentResource):
    """Everything that makes a role at a site."""

    def __init__(self, name: str, args: ServiceArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:apps:Service", name, None, opts)
        self._name, self._args = name, args
        self._excused = pods.exceptions({**args.exceptions, **(_WARM if args.scaling is not None else {})})
        self._child = ResourceOptions(parent=self)
        role, site = args.settings.role.value, args.site.name
        self._labels, self._selector = pods.labels(role, site), pods.selector(role, site)
        k8s.core.v1.ServiceAccount(name, metadata=self._meta(), automount_service_account_token=False, opts=self._child)
        self._service(name, headless=False)
        self._service(f"{name}-pods", headless=True)
        workload = self._stateful_set() if args.claim else self._deployment()
        k8s.policy.v1.PodDisruptionBudget(
            name,
            metadata=self._meta(),
            spec=k8s.policy.v1.PodDisruptionBudgetSpecArgs(
                max_unavailable=1, selector=self._match(), unhealthy_pod_eviction_policy="AlwaysAllow"
            ),
            opts=self._child,
        )
        k8s.networking.v1.NetworkPolicy(name, metadata=self._meta(), spec=args.policy, opts=self._child)
        if args.scaling is not None:
            self._scale(args.scaling, workload)
        if args.metrics:
            self._monitor()
        self.register_outputs({})

    def _meta(self, name: str = "", **annotations: str) -> k8s.meta.v1.ObjectMetaArgs:
        return k8s.meta.v1.ObjectMetaArgs(
            name=name or self._name, namespace=SERVING, labels=self._labels, annotations=annotations or None
        )

    def _match(self) -> k8s.meta.v1.LabelSelectorArgs:
        return k8s.meta.v1.LabelSelectorArgs(match_labels=self._selector)

    def _service(self, name: str, *, headless: bool) -> None:
        # An agent asks pods, ready or not; everybody else asks the ready ones of one site and no other.
        k8s.core.v1.Service(
            name,
            metadata=self._meta(name),
            spec=k8s.core.v1.ServiceSpecArgs(
                type="ClusterIP",
                cluster_ip="None" if headless else None,
                publish_not_ready_addresses=headless or None,
                # A pod that is taken out of rotation gets no new request and goes on with what it has.
                selector={**self._selector, ROTATION_LABEL: IN_ROTATION},
                ports=[
                    k8s.core.v1.ServicePortArgs(name=n, port=p, target_port=n, protocol="TCP")
                    for n, p in self._args.ports.items()
                ],
            ),
            opts=self._child,
        )

    def _template(self) -> k8s.core.v1.PodTemplateSpecArgs:
        args = self._args
        return k8s.core.v1.PodTemplateSpecArgs(
            metadata=k8s.meta.v1.ObjectMetaArgs(
                labels={**self._labels, ROTATION_LABEL: IN_ROTATION},
                annotations={**self._excused, **args.annotations},
            ),
            spec=k8s.core.v1.PodSpecArgs(
                service_account_name=self._name,
                automount_service_account_token=False,
                enable_service_links=False,
                security_context=pods.security(),
                priority_class_name="rankbridge-serving",
                runtime_class_name=args.runtime_class or None,
                termination_grace_period_seconds=STOP_S,
                affinity=self._affinity(),
                tolerations=pods.tolerations(args.site, waits_s=args.waits_s),
                topology_spread_constraints=self._spread(),
                init_containers=list(args.init),
                containers=list(args.containers),
                volumes=list(args.volumes),
            ),
        )

    def _affinity(self) -> k8s.core.v1.AffinityArgs:
        affinity = pods.on_nodes_of(self._args.site, gpus=bool(self._args.runtime_class))
        if not self._args.shares_a_node and self._args.settings.maximum > 1:
            apart = k8s.core.v1.WeightedPodAffinityTermArgs(
                weight=100,
                pod_affinity_term=k8s.core.v1.PodAffinityTermArgs(
                    topology_key="kubernetes.io/hostname", label_selector=self._match()
                ),
            )
            affinity.pod_anti_affinity = k8s.core.v1.PodAntiAffinityArgs(
                preferred_during_scheduling_ignored_during_execution=[apart]
            )
        return affinity

    def _spread(self) -> list[k8s.core.v1.TopologySpreadConstraintArgs]:
        hosts = "ScheduleAnyway" if self._args.shares_a_node else "DoNotSchedule"
        revised = not self._args.claim
        return [
            pods.spread(self._selector, "kubernetes.io/hostname", hosts, by_revision=revised),
            pods.spread(self._selector, "topology.kubernetes.io/zone", by_revision=revised),
        ]

    def _deployment(self) -> k8s.apps.v1.Deployment:
        return k8s.apps.v1.Deployment(
            self._name,
            metadata=self._meta(**self._excused),
            spec=k8s.apps.v1.DeploymentSpecArgs(
                # The warm ones; from then on the number is the scaler's, and an update leaves it alone.
                replicas=self._args.settings.replicas,
                revision_history_limit=3,
                progress_deadline_seconds=900,
                selector=self._match(),
                strategy=k8s.apps.v1.DeploymentStrategyArgs(
                    type="RollingUpdate",
                    rolling_update=k8s.apps.v1.RollingUpdateDeploymentArgs(max_surge=1, max_unavailable=1),
                ),
                template=self._template(),
            ),
            opts=ResourceOptions(
                parent=self, ignore_changes=["spec.replicas"] if self._args.scaling is not None else None
            ),
        )

    def _stateful_set(self) -> k8s.apps.v1.StatefulSet:
        args = self._args
        return k8s.apps.v1.StatefulSet(
            self._name,
            metadata=self._meta(**self._excused),
            spec=k8s.apps.v1.StatefulSetSpecArgs(
                replicas=args.settings.replicas,
                service_name=f"{self._name}-pods",
                revision_history_limit=3,
                selector=self._match(),
                template=self._template(),
                persistent_volume_claim_retention_policy=(
                    k8s.apps.v1.StatefulSetPersistentVolumeClaimRetentionPolicyArgs(
                        when_deleted="Retain", when_scaled="Retain"
                    )
                ),
                volume_claim_templates=[
                    k8s.core.v1.PersistentVolumeClaimArgs(
                        metadata=k8s.meta.v1.ObjectMetaArgs(name=args.claim, labels=self._labels),
                        spec=claim_spec(args.site.storage_class, args.settings.storage),
                    )
                ],
            ),
            opts=self._child,
        )

    def _scale(self, scaling: Scaling, workload: k8s.apps.v1.Deployment | k8s.apps.v1.StatefulSet) -> None:
        settings = self._args.settings
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": self._name}
        after = ResourceOptions(parent=self, depends_on=[workload])
        if scaling.prometheus:
            trigger = {
                "type": "prometheus",
                "metricType": "AverageValue" if scaling.per_pod else "Value",
                "metadata": {
                    "serverAddress": scaling.prometheus,
                    "query": scaling.query,
                    "threshold": str(scaling.target),
                },
            }
            k8s.apiextensions.CustomResource(
                self._name,
                api_version="keda.sh/v1alpha1",
                kind="ScaledObject",
                metadata=self._meta(),
                spec={
                    "scaleTargetRef": target,
                    "minReplicaCount": settings.replicas,
                    "maxReplicaCount": settings.maximum,
                    "pollingInterval": 10,
                    "cooldownPeriod": 300,
                    # What a blind scaler falls back to: no fewer than are warm.
                    "fallback": {"failureThreshold": 3, "replicas": settings.replicas},
                    "triggers": [trigger],
                },
                opts=after,
            )
            return
        kind, value = ("AverageValue", "average_value") if scaling.per_pod else ("Value", "value")
        goal: dict[str, Any] = {value: str(scaling.target)}
        k8s.autoscaling.v2.HorizontalPodAutoscaler(
            self._name,
            metadata=self._meta(),
            spec=k8s.autoscaling.v2.HorizontalPodAutoscalerSpecArgs(
                scale_target_ref=k8s.autoscaling.v2.CrossVersionObjectReferenceArgs(
                    api_version="apps/v1", kind="Deployment", name=self._name
                ),
                min_replicas=settings.replicas,
                max_replicas=settings.maximum,
                metrics=[
                    k8s.autoscaling.v2.MetricSpecArgs(
                        type="External",
                        external=k8s.autoscaling.v2.ExternalMetricSourceArgs(
                            metric=k8s.autoscaling.v2.MetricIdentifierArgs(
                                name=scaling.metric,
                                selector=k8s.meta.v1.LabelSelectorArgs(match_labels={"site": self._args.site.name}),
                            ),
                            target=k8s.autoscaling.v2.MetricTargetArgs(type=kind, **goal),
                        ),
                    )
                ],
                behavior=k8s.autoscaling.v2.HorizontalPodAutoscalerBehaviorArgs(
                    scale_down=k8s.autoscaling.v2.HPAScalingRulesArgs(stabilization_window_seconds=300)
                ),
            ),
            opts=after,
        )

    def _monitor(self) -> None:
        k8s.apiextensions.CustomResource(
            f"{self._name}-metrics",
            api_version="monitoring.coreos.com/v1",
            kind="ServiceMonitor",
            metadata=self._meta(),
            spec={
                # The headless twin: a pod that is not ready says why.
                "selector": {"matchLabels": self._selector},
                "namespaceSelector": {"matchNames": [SERVING]},
                "endpoints": [
                    {
                        "port": port,
                        "path": "/metrics",
                        "interval": "15s",
                        "relabelings": [*relabelings("service"), HEADLESS_ONLY],
                    }
                    for port in self._args.metrics
                ],
            },
            opts=self._child,
        )


HEADLESS_ONLY: Final = {"sourceLabels": ["__meta_kubernetes_service_name"], "regex": ".*-pods", "action": "keep"}
"""Each pod is behind two Services and counts once."""


def relabelings(of: str) -> list[dict[str, Any]]:
    """Series carry site and role as `site` and `role`; `of` is `service` or `pod`."""
    prefix = f"__meta_kubernetes_{of}_label_rankbridge_io_"
    return [{"sourceLabels": [f"{prefix}{name}"], "targetLabel": name} for name in ("site", "role")]


def claim_spec(storage_class: str, size: str) -> k8s.core.v1.PersistentVolumeClaimSpecArgs:
    """A volume that one node writes."""
    return k8s.core.v1.PersistentVolumeClaimSpecArgs(
        access_modes=["ReadWriteOnce"],
        storage_class_name=storage_class,
        resources=k8s.core.v1.VolumeResourceRequirementsArgs(requests={"storage": size}),
    )


def scaled(role: Role, site: str, *, target: int, prometheus: str) -> Scaling:
    """How gateways and Triton are scaled: on requests in flight, and on the time that one waits in the queue."""
    if role is Role.GATEWAY:
        query = f'sum(rankbridge_in_flight{{site="{site}",role="gateway"}})'
        return Scaling("rankbridge_in_flight", target, per_pod=True, query=query, prometheus=prometheus)
    query = (
        f'sum(rate(nv_inference_queue_duration_us{{site="{site}"}}[1m])) / '
        f'clamp_min(sum(rate(nv_inference_request_success{{site="{site}"}}[1m])), 1)'
    )
    return Scaling("nv_inference_queue_us_per_request", target, per_pod=False, query=query, prometheus=prometheus)
