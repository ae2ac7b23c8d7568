"""What the sites' services stand on: namespaces and their guards, GPUs, and those who look after nodes.

`Platform` comes first in a stack. The three operators (cluster-autoscaler, node hygiene, spot handler) run at home,
next to the control plane, one of each for every cloud site, with just the rights that they use.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pulumi
import pulumi_kubernetes as k8s
import yaml
from pulumi import Output, ResourceOptions

from infra import edges, pods
from infra.apps_config import AppsConfig, Image, Resources, Role, RoleSettings, Sharing, mebibytes, millicores
from infra.edges import DEVICES, JOBS, PLATFORM, SERVING, Party
from infra.iam import Role as AwsRole
from infra.outputs import FoundationOutputs
from infra.pods import Access, mount
from workloads.contract.operators import Operator, access
from workloads.contract.sites import SiteKind

_RESTRICTED: Final = "restricted"
_OPERATOR: Final = Resources("100m", "256Mi", "500m", "256Mi")
_PLUGIN: Final = Resources("50m", "128Mi", "200m", "64Mi")
PRIORITIES: Final[Mapping[str, tuple[int, str, str]]] = {
    "rankbridge-platform": (200_000, "PreemptLowerPriority", "Those who look after nodes"),
    "rankbridge-serving": (100_000, "PreemptLowerPriority", "What answers requests; pushes jobs aside"),
    "rankbridge-jobs": (1_000, "Never", "What can wait"),
}
GPU_NODES: Final = {"nvidia.com/gpu.present": "true"}
_SIDE_CPU, _SIDE_MEMORY, _SIDE_CPU_LIMIT = 350, 1_536, 2_000
"""At least what agent and feedback ask for beside a main container: millicores, MiB, millicores."""


@dataclasses.dataclass(frozen=True)
class PlatformArgs:
    """What the platform is made from."""

    config: AppsConfig
    foundation: Output[FoundationOutputs]
    policy: Callable[[Party, str], Output[Any]]
    """Spec of the NetworkPolicy of a party at a site."""
    access: Callable[[AwsRole], Access]


class Platform(pulumi.ComponentResource):
    """Namespaces, quotas, priorities, GPUs and operators."""

    def __init__(self, name: str, args: PlatformArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:apps:Platform", name, None, opts)
        self._args = args
        self._child = ResourceOptions(parent=self)
        config = args.config
        self.namespaces = [self._namespace(n, _RESTRICTED) for n in (SERVING, JOBS, PLATFORM)]
        self.namespaces.append(
            self._namespace(
                DEVICES,
                "privileged",
                why="the device plugin speaks to the kubelet through a socket in a directory of the host",
            )
        )
        self._inside = ResourceOptions(parent=self, depends_on=self.namespaces)
        self._quota(SERVING, serving_quota(config))
        self._quota(JOBS, jobs_quota(config))
        self._quota(PLATFORM, {"pods": "12", **_NO_DOORS, **_quota(4_000, 4_096, 8_000)})
        for priority, (value, preemption, why) in PRIORITIES.items():
            k8s.scheduling.v1.PriorityClass(
                priority,
                metadata=k8s.meta.v1.ObjectMetaArgs(name=priority, labels=pods.MANAGED),
                value=value,
                preemption_policy=preemption,
                description=why,
                opts=self._child,
            )
        if any(site.has_gpus for site in config.sites):
            self._gpus()
            clouds = [s.name for s in config.sites if s.has_gpus and s.kind is SiteKind.CLOUD]
            self._autoscalers(clouds)
            self._watcher(Party.HYGIENE, AwsRole.HYGIENE, Operator.HYGIENE, clouds)
            self._watcher(Party.SPOT, AwsRole.SPOT, Operator.SPOT, clouds)
        self.register_outputs({})

    def _namespace(self, name: str, level: str, why: str = "") -> k8s.core.v1.Namespace:
        standard = "pod-security.kubernetes.io"
        made = k8s.core.v1.Namespace(
            name,
            metadata=k8s.meta.v1.ObjectMetaArgs(
                name=name,
                labels={
                    **pods.MANAGED,
                    **{f"{standard}/{mode}": level for mode in ("enforce", "warn", "audit")},
                    f"{standard}/enforce-version": "latest",
                },
                annotations={f"{pods.REASON}-privileged": why} if why else None,
            ),
            opts=self._child,
        )
        inside = ResourceOptions(parent=self, depends_on=[made])
        k8s.networking.v1.NetworkPolicy(
            f"{name}-default-deny",
            metadata=k8s.meta.v1.ObjectMetaArgs(name="default-deny", namespace=name, labels=pods.MANAGED),
            spec=edges.default_deny(),
            opts=inside,
        )
        k8s.core.v1.LimitRange(
            f"{name}-limits",
            metadata=k8s.meta.v1.ObjectMetaArgs(name="limits", namespace=name, labels=pods.MANAGED),
            spec=k8s.core.v1.LimitRangeSpecArgs(
                limits=[
                    k8s.core.v1.LimitRangeItemArgs(
                        type="Container",
                        default={"cpu": "1", "memory": "512Mi", "ephemeral-storage": "1Gi"},
                        default_request={"cpu": "100m", "memory": "256Mi", "ephemeral-storage": "256Mi"},
                    )
                ]
            ),
            opts=inside,
        )
        return made

    def _quota(self, namespace: str, hard: Mapping[str, str]) -> None:
        k8s.core.v1.ResourceQuota(
            f"{namespace}-quota",
            metadata=k8s.meta.v1.ObjectMetaArgs(name="quota", namespace=namespace, labels=pods.MANAGED),
            spec=k8s.core.v1.ResourceQuotaSpecArgs(hard=dict(hard)),
            opts=self._inside,
        )

    def _gpus(self) -> None:
        config = self._args.config
        k8s.node.v1.RuntimeClass(
            "nvidia",
            metadata=k8s.meta.v1.ObjectMetaArgs(name="nvidia", labels=pods.MANAGED),
            handler="nvidia",
            opts=self._child,
        )
        meta = k8s.meta.v1.ObjectMetaArgs(name="device-plugin", namespace=DEVICES, labels=pods.MANAGED)
        settings = k8s.core.v1.ConfigMap(
            "device-plugin", metadata=meta, data={"config.yaml": plugin_config(config)}, opts=self._inside
        )
        marks = {**pods.MANAGED, edges.ROLE_LABEL: Party.DEVICE_PLUGIN.value}
        selector = {edges.ROLE_LABEL: Party.DEVICE_PLUGIN.value}
        k8s.core.v1.ServiceAccount(
            "device-plugin", metadata=meta, automount_service_account_token=False, opts=self._inside
        )
        plugin = pods.container(
            "device-plugin",
            config.images[Image.DEVICE_PLUGIN],
            ["nvidia-device-plugin", "--config-file=/etc/nvidia/config.yaml"],
            _PLUGIN,
            mounts=[
                mount("kubelet", "/var/lib/kubelet/device-plugins"),
                mount("config", "/etc/nvidia", read_only=True),
            ],
        )
        root = "the kubelet's socket belongs to root"
        plugin.security_context = k8s.core.v1.SecurityContextArgs(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            run_as_user=0,
            capabilities=k8s.core.v1.CapabilitiesArgs(drop=["ALL"]),
            seccomp_profile=k8s.core.v1.SeccompProfileArgs(type="RuntimeDefault"),
        )
        excused = {
            "container-security-context-user-group-id": root,
            "pod-networkpolicy": "it speaks to the kubelet's socket only; its namespace is shut both ways",
            "pod-probes": "it has no port; the kubelet registers it anew when its socket goes",
        }
        kubelet = k8s.core.v1.HostPathVolumeSourceArgs(path="/var/lib/kubelet/device-plugins", type="Directory")
        k8s.apps.v1.DaemonSet(
            "device-plugin",
            metadata=meta,
            spec=k8s.apps.v1.DaemonSetSpecArgs(
                selector=k8s.meta.v1.LabelSelectorArgs(match_labels=selector),
                template=k8s.core.v1.PodTemplateSpecArgs(
                    metadata=k8s.meta.v1.ObjectMetaArgs(
                        labels=marks,
                        annotations={
                            **pods.exceptions(excused),
                            f"{pods.REASON}-host-path": "the kubelet hears of GPUs through a socket in its directory",
                            f"{pods.REASON}-root": root,
                        },
                    ),
                    spec=k8s.core.v1.PodSpecArgs(
                        service_account_name="device-plugin",
                        automount_service_account_token=False,
                        enable_service_links=False,
                        runtime_class_name="nvidia",
                        priority_class_name="system-node-critical",
                        node_selector=GPU_NODES,
                        tolerations=[pods.GPU_TOLERATION],
                        containers=[plugin],
                        volumes=[
                            k8s.core.v1.VolumeArgs(name="kubelet", host_path=kubelet),
                            pods.config_volume("config", "device-plugin"),
                        ],
                    ),
                ),
            ),
            opts=ResourceOptions(parent=self, depends_on=[settings]),
        )

    # Operators

    def _autoscalers(self, sites: Sequence[str]) -> None:
        """One for each cloud site: a process asks one region. Pods fit the groups of their own site only."""
        party = Party.AUTOSCALER
        account = self._account(party)
        self._declare_all(_autoscaler_access(sites), account)
        for site in sites:
            flags = self._args.foundation.apply(_autoscaler_of(site))
            self._operator(party, AwsRole.AUTOSCALER, Image.AUTOSCALER, site, flags, "/health-check", account)

    def _watcher(self, party: Party, role: AwsRole, operator: Operator, sites: Sequence[str]) -> None:
        """Node hygiene or the spot handler: one process for each cloud site, the same rights for all."""
        account = self._account(party)
        manifests = access(operator, namespace=PLATFORM, service_account=party.value, serving=[SERVING, JOBS])
        self._declare_all(manifests, account)
        for site in sites:
            flags = self._args.foundation.apply(_command_of(operator, site))
            self._operator(party, role, Image.OPERATORS, site, flags, "/healthz", account)

    def _account(self, party: Party) -> k8s.core.v1.ServiceAccount:
        home = self._args.config.home.name
        meta = k8s.meta.v1.ObjectMetaArgs(name=party.value, namespace=PLATFORM, labels=pods.labels(party.value, home))
        k8s.networking.v1.NetworkPolicy(
            party.value, metadata=meta, spec=self._args.policy(party, home), opts=self._inside
        )
        return k8s.core.v1.ServiceAccount(
            party.value, metadata=meta, automount_service_account_token=False, opts=self._inside
        )

    def _declare_all(self, manifests: Sequence[Mapping[str, Any]], account: pulumi.Resource) -> None:
        """Manifests that others render, as typed resources: rights, and the policies that narrow them."""
        opts = ResourceOptions(parent=self, depends_on=[*self.namespaces, account])
        for manifest in manifests:
            fields = {_snake(k): v for k, v in manifest.items() if k not in ("apiVersion", "kind", "metadata")}
            meta = {**manifest["metadata"], "labels": pods.MANAGED}
            where = meta.get("namespace", "")
            name = f"{where}-{meta['name']}" if where else meta["name"]
            _TYPED[manifest["kind"]](name, metadata=meta, **fields, opts=opts)

    def _operator(  # noqa: PLR0917 -- one caller for each operator, above
        self,
        party: Party,
        role: AwsRole,
        image: Image,
        site: str,
        command: Output[list[str]],
        health: str,
        account: pulumi.Resource,
    ) -> None:
        config, home = self._args.config, self._args.config.home
        name, watches = f"{site}-{party.value}", {WATCHES_LABEL: site}
        labels, selector = pods.labels(party.value, home.name), pods.selector(party.value, home.name)
        region = self._args.foundation.apply(lambda foundation: foundation.site(site).region)
        cloud = dataclasses.replace(self._args.access(role), region=region)
        main = pods.container(
            party.value,
            config.images[image],
            [],
            _OPERATOR,
            ports={"http": _HEALTH_PORT},
            probes=pods.Probes("http", live=health, ready=health if role is AwsRole.AUTOSCALER else "/readyz"),
            env=[*pods.SERVING_ENV, *cloud.env()],
            mounts=[mount("tmp", pods.SCRATCH)],
        )
        main.command = command
        excused = {
            "deployment-replicas": "one at a time: two would act on the same node",
            "deployment-has-host-podantiaffinity": "it has one pod",
            "pod-probes-identical": "it has one question to answer",
        }
        k8s.apps.v1.Deployment(
            name,
            metadata=k8s.meta.v1.ObjectMetaArgs(
                name=name, namespace=PLATFORM, labels={**labels, **watches}, annotations=pods.exceptions(excused)
            ),
            spec=k8s.apps.v1.DeploymentSpecArgs(
                replicas=1,
                revision_history_limit=3,
                selector=k8s.meta.v1.LabelSelectorArgs(match_labels={**selector, **watches}),
                strategy=k8s.apps.v1.DeploymentStrategyArgs(type="Recreate"),
                template=k8s.core.v1.PodTemplateSpecArgs(
                    metadata=k8s.meta.v1.ObjectMetaArgs(
                        labels={**labels, **watches}, annotations=pods.exceptions(excused)
                    ),
                    spec=k8s.core.v1.PodSpecArgs(
                        service_account_name=party.value,
                        automount_service_account_token=True,  # it speaks to the API: that is what it is for
                        enable_service_links=False,
                        security_context=pods.security(),
                        priority_class_name="rankbridge-platform",
                        affinity=pods.on_nodes_of(home),
                        tolerations=pods.tolerations(home, waits_s=30),
                        topology_spread_constraints=[pods.spread({**selector, **watches})],
                        init_containers=cloud.init(),
                        containers=[main],
                        volumes=[pods.scratch("tmp", "64Mi"), *cloud.volumes()],
                    ),
                ),
            ),
            opts=ResourceOptions(parent=self, depends_on=[account]),
        )
        k8s.policy.v1.PodDisruptionBudget(
            name,
            metadata=k8s.meta.v1.ObjectMetaArgs(name=name, namespace=PLATFORM, labels={**labels, **watches}),
            spec=k8s.policy.v1.PodDisruptionBudgetSpecArgs(
                max_unavailable=1,
                selector=k8s.meta.v1.LabelSelectorArgs(match_labels={**selector, **watches}),
                unhealthy_pod_eviction_policy="AlwaysAllow",
            ),
            opts=self._inside,
        )


WATCHES_LABEL: Final = "rankbridge.io/watches"
"""The site whose nodes an operator looks after."""
_TYPED: Final[Mapping[str, Any]] = {
    "ClusterRole": k8s.rbac.v1.ClusterRole,
    "ClusterRoleBinding": k8s.rbac.v1.ClusterRoleBinding,
    "Role": k8s.rbac.v1.Role,
    "RoleBinding": k8s.rbac.v1.RoleBinding,
    "ValidatingAdmissionPolicy": k8s.admissionregistration.v1.ValidatingAdmissionPolicy,
    "ValidatingAdmissionPolicyBinding": k8s.admissionregistration.v1.ValidatingAdmissionPolicyBinding,
}


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda m: "_" + m[0].lower(), name)


def _autoscaler_of(site: str) -> Callable[[FoundationOutputs], list[str]]:
    return lambda foundation: autoscaler_command(site, foundation)


def _command_of(operator: Operator, site: str) -> Callable[[FoundationOutputs], list[str]]:
    return lambda foundation: watcher_command(operator, site, foundation)


_HEALTH_PORT: Final = 8085
_SEE: Final = "get,list,watch"


def _autoscaler_access(sites: Sequence[str]) -> list[dict[str, Any]]:
    """As its own documentation has it (cluster-autoscaler, cloudprovider/aws/examples), less what is not used here."""
    name, group = "rankbridge-cluster-autoscaler", "rbac.authorization.k8s.io"

    def rule(group: str, resources: str, verbs: str, names: Sequence[str] = ()) -> dict[str, Any]:
        made: dict[str, Any] = {"apiGroups": [group], "resources": resources.split(","), "verbs": verbs.split(",")}
        return made | ({"resourceNames": list(names)} if names else {})

    cluster = [
        rule("", "events", "create,patch"),
        rule("", "pods/eviction", "create"),
        rule("", "pods/status", "update"),
        rule("", "nodes", f"{_SEE},update"),
        rule("", "namespaces,pods,services,replicationcontrollers,persistentvolumeclaims,persistentvolumes", _SEE),
        rule("batch", "jobs", _SEE),
        rule("apps", "statefulsets,replicasets,daemonsets", _SEE),
        rule("policy", "poddisruptionbudgets", "list,watch"),
        rule("storage.k8s.io", "storageclasses,csinodes,csidrivers,csistoragecapacities,volumeattachments", _SEE),
        rule("resource.k8s.io", "resourceclaims,resourceslices,deviceclasses", _SEE),
    ]
    own = [
        rule("coordination.k8s.io", "leases", "create"),
        rule("coordination.k8s.io", "leases", "get,update", [autoscaler_lease(s) for s in sites]),
        rule("", "configmaps", "create,list,watch"),
        rule("", "configmaps", "get,update,delete,watch", [autoscaler_status(s) for s in sites]),
    ]
    subject = {"kind": "ServiceAccount", "name": Party.AUTOSCALER.value, "namespace": PLATFORM}
    found: list[dict[str, Any]] = []
    for scope, meta, rules in (("Cluster", {}, cluster), ("", {"namespace": PLATFORM}, own)):
        found.append({"kind": f"{scope}Role", "metadata": {"name": name, **meta}, "rules": rules})
        reference = {"apiGroup": group, "kind": f"{scope}Role", "name": name}
        binding = {"metadata": {"name": name, **meta}, "roleRef": reference, "subjects": [subject]}
        found.append({"kind": f"{scope}RoleBinding", **binding})
    return found


def autoscaler_lease(site: str) -> str:
    """Name of the lease that a site's cluster-autoscaler holds."""
    return f"cluster-autoscaler-{site}"


def autoscaler_status(site: str) -> str:
    """Name of the ConfigMap in which a site's cluster-autoscaler says how it is."""
    return f"cluster-autoscaler-status-{site}"


def autoscaler_command(site: str, foundation: FoundationOutputs) -> list[str]:
    """What the cluster-autoscaler of a site runs: which groups there are is the foundation's knowledge."""
    groups = foundation.site(site).node_groups
    return [
        "./cluster-autoscaler",
        "--cloud-provider=aws",
        f"--namespace={PLATFORM}",
        f"--leader-elect-resource-name={autoscaler_lease(site)}",
        f"--status-config-map-name={autoscaler_status(site)}",
        *(f"--nodes={g.minimum}:{g.maximum}:{g.auto_scaling_group}" for g in groups),
        "--expander=least-waste",
        # Every pod of ours has an emptyDir, none keeps anything in it.
        "--skip-nodes-with-local-storage=false",
        "--skip-nodes-with-system-pods=false",
        "--scale-down-unneeded-time=10m",
        "--max-node-provision-time=15m",
        f"--address=:{_HEALTH_PORT}",
    ]


def watcher_command(operator: Operator, site: str, foundation: FoundationOutputs) -> list[str]:
    """What node hygiene or the spot handler of a site runs."""
    there = foundation.site(site)
    command = ["python", "-m", "workloads.operators", operator.value, "--site", site, "--region", there.region]
    if operator is Operator.HYGIENE:
        command += [part for g in there.node_groups for part in ("--group", g.auto_scaling_group)]
    else:
        command += ["--queue-url", there.queue_url or "", "--serving", SERVING, "--serving", JOBS]
    return [*command, "--listen", f"0.0.0.0:{_HEALTH_PORT}"]


def plugin_config(config: AppsConfig) -> str:
    """The NVIDIA device plugin's configuration file."""
    document: dict[str, Any] = {
        "version": "v1",
        "flags": {"migStrategy": "mixed" if config.gpu.sharing is Sharing.MIG else "none", "failOnInitError": True},
    }
    if config.gpu.sharing is Sharing.TIME_SLICING:
        shared = [{"name": "nvidia.com/gpu", "replicas": config.gpu.replicas}]
        # Asking for two shares would not be twice the time: it is refused.
        document["sharing"] = {"timeSlicing": {"failRequestsGreaterThanOne": True, "resources": shared}}
    return yaml.safe_dump(document, sort_keys=True)


# Quotas

_NO_DOORS: Final = {"services.nodeports": "0", "services.loadbalancers": "0"}


def _quota(cpu_m: int, memory_mi: int, cpu_limit_m: int) -> dict[str, str]:
    return {
        "requests.cpu": f"{cpu_m}m",
        "limits.cpu": f"{cpu_limit_m}m",
        "requests.memory": f"{memory_mi}Mi",
        "limits.memory": f"{memory_mi}Mi",
    }


def serving_quota(config: AppsConfig) -> dict[str, str]:
    """Room for every role at its highest, and the one pod more that an update starts; nothing beyond."""
    cpu = memory = cpu_limit = count = gpus = claims = 0
    for site in config.sites:
        for settings in site.roles.values():
            number = _most(settings)
            asks = settings.resources
            count += number
            cpu += number * (millicores(asks.cpu) + _SIDE_CPU)
            memory += number * (mebibytes(asks.memory) + _SIDE_MEMORY)
            cpu_limit += number * (millicores(asks.cpu_limit) + _SIDE_CPU_LIMIT)
            gpus += number if settings.role is Role.TRITON and site.has_gpus else 0
            claims += settings.replicas if settings.role in (Role.INTAKE, Role.FEATURE_STORE) else 0
    return {
        "pods": str(count),
        "persistentvolumeclaims": str(claims + 1),
        f"requests.{config.gpu.resource}": str(gpus),
        **_NO_DOORS,
        **_quota(cpu, memory, cpu_limit),
    }


def _most(settings: RoleSettings) -> int:
    return settings.maximum + 1


def jobs_quota(config: AppsConfig) -> dict[str, str]:
    """Room for each job once."""
    jobs = config.jobs
    pods_ = jobs.workers + len(jobs.gpu_types) + jobs.load_workers + 3
    return {
        "pods": str(pods_ * 2),  # finished ones count until they are swept
        "persistentvolumeclaims": "1",
        f"requests.{config.gpu.resource}": str(jobs.workers + len(jobs.gpu_types)),
        **_NO_DOORS,
        **_quota(pods_ * 4_500, pods_ * 20_480, pods_ * 8_500),
    }


def identity_command(role: AwsRole, foundation: FoundationOutputs) -> list[str]:
    """What makes a role's pods that role. Raises ValueError where the foundation trusts no certificate."""
    anchor, profile = foundation.trust_anchor_arn, foundation.roles_anywhere_profile_arn
    if anchor is None or profile is None:
        raise ValueError(
            "the foundation trusts no certificates, so that pods have no way to a role: give it identity.trust_anchor"
        )
    region = anchor.split(":")[3]  # of the anchor itself: a pod of another region asks there, too
    return pods.identity_command(trust_anchor=anchor, profile=profile, role=foundation.roles[role.value], region=region)
