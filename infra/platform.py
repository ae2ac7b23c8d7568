"""What the sites' services stand on: namespaces and their guards, GPUs, and those who look after nodes.

`Platform` comes first in a stack. The three operators (cluster-autoscaler, node hygiene, spot handler) run at home,
next to the control plane, with just the rights that they use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pulumi
import pulumi_kubernetes as k8s
import yaml
from pulumi import Input, Output, ResourceOptions

from infra import edges, pods
from infra.apps_config import AppsConfig, Image, Resources, Role, RoleSettings, Sharing, mebibytes, millicores
from infra.edges import DEVICES, JOBS, PLATFORM, SERVING, Party
from infra.iam import Role as AwsRole
from infra.outputs import FoundationOutputs
from infra.pods import Access, mount

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


@dataclasses.dataclass(frozen=True)
class _Rights:
    """What an operator may do in the cluster, and in one namespace."""

    cluster: Sequence[tuple[str, str, str]]
    """API group, resources and verbs, each separated by commas."""
    namespace: str = ""
    own: Sequence[tuple[str, str, str, str]] = ()
    """In `namespace`: as above, and the names of the objects that are meant; empty for all."""


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
        for role in (AwsRole.AUTOSCALER, AwsRole.HYGIENE, AwsRole.SPOT):
            self._operator(role)
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

    def _operator(self, role: AwsRole) -> None:
        config, name = self._args.config, role.value if role is not AwsRole.AUTOSCALER else "cluster-autoscaler"
        home, rights = config.home, _RIGHTS[role]
        labels, selector = pods.labels(name, home.name), pods.selector(name, home.name)
        meta = k8s.meta.v1.ObjectMetaArgs(name=name, namespace=PLATFORM, labels=labels)
        account = k8s.core.v1.ServiceAccount(
            name, metadata=meta, automount_service_account_token=False, opts=self._inside
        )
        self._bind(name, labels, rights)
        k8s.networking.v1.NetworkPolicy(
            name, metadata=meta, spec=self._args.policy(Party(name), home.name), opts=self._inside
        )
        access = self._args.access(role)
        image = config.images[Image.AUTOSCALER if role is AwsRole.AUTOSCALER else Image.OPERATORS]
        main = pods.container(
            name,
            image,
            [],
            _OPERATOR,
            ports={"http": _HEALTH_PORT},
            probes=pods.Probes("http", live=_LIVE[role], ready=_LIVE[role]),
            env=[
                *pods.SERVING_ENV,
                *access.env(),
                pods.variable("RANKBRIDGE_HOME_SITE", home.name),
            ],
            mounts=[mount("tmp", pods.SCRATCH), *access.mounts()],
        )
        main.command = self._args.foundation.apply(lambda f: command(role, f, _HEALTH_PORT))
        terms = [
            k8s.core.v1.NodeSelectorRequirementArgs(key=k, operator="In", values=[v]) for k, v in home.selector.items()
        ]
        node = k8s.core.v1.NodeAffinityArgs(
            required_during_scheduling_ignored_during_execution=k8s.core.v1.NodeSelectorArgs(
                node_selector_terms=[k8s.core.v1.NodeSelectorTermArgs(match_expressions=terms)]
            )
        )
        excused = {
            "deployment-replicas": "one at a time: two would act on the same node",
            "deployment-pod-anti-affinity": "it has one pod",
            "deployment-has-poddisruptionbudget": "one pod that may be away for a minute; a budget would block drains",
        }
        k8s.apps.v1.Deployment(
            name,
            metadata=k8s.meta.v1.ObjectMetaArgs(
                name=name, namespace=PLATFORM, labels=labels, annotations=pods.exceptions(excused)
            ),
            spec=k8s.apps.v1.DeploymentSpecArgs(
                replicas=1,
                revision_history_limit=3,
                selector=k8s.meta.v1.LabelSelectorArgs(match_labels=selector),
                strategy=k8s.apps.v1.DeploymentStrategyArgs(type="Recreate"),
                template=k8s.core.v1.PodTemplateSpecArgs(
                    metadata=k8s.meta.v1.ObjectMetaArgs(labels=labels, annotations=pods.exceptions(excused)),
                    spec=k8s.core.v1.PodSpecArgs(
                        service_account_name=name,
                        automount_service_account_token=True,  # it speaks to the API: that is what it is for
                        enable_service_links=False,
                        security_context=pods.security(),
                        priority_class_name="rankbridge-platform",
                        affinity=k8s.core.v1.AffinityArgs(node_affinity=node),
                        tolerations=pods.tolerations(home, waits_s=30),
                        init_containers=access.init(),
                        containers=[main],
                        volumes=[pods.scratch("tmp", "64Mi"), *access.volumes()],
                    ),
                ),
            ),
            opts=ResourceOptions(parent=self, depends_on=[account]),
        )

    def _bind(self, name: str, labels: Mapping[str, str], rights: _Rights) -> None:
        who = [k8s.rbac.v1.SubjectArgs(kind="ServiceAccount", name=name, namespace=PLATFORM)]
        group = "rbac.authorization.k8s.io"
        meta = k8s.meta.v1.ObjectMetaArgs(name=f"rankbridge-{name}", labels=labels)
        k8s.rbac.v1.ClusterRole(name, metadata=meta, rules=[_rule(*one) for one in rights.cluster], opts=self._child)
        k8s.rbac.v1.ClusterRoleBinding(
            name,
            metadata=meta,
            role_ref=k8s.rbac.v1.RoleRefArgs(api_group=group, kind="ClusterRole", name=f"rankbridge-{name}"),
            subjects=who,
            opts=self._child,
        )
        if not rights.own:
            return
        meta = k8s.meta.v1.ObjectMetaArgs(name=f"rankbridge-{name}", namespace=rights.namespace, labels=labels)
        k8s.rbac.v1.Role(name, metadata=meta, rules=[_rule(*one) for one in rights.own], opts=self._inside)
        k8s.rbac.v1.RoleBinding(
            name,
            metadata=meta,
            role_ref=k8s.rbac.v1.RoleRefArgs(api_group=group, kind="Role", name=f"rankbridge-{name}"),
            subjects=who,
            opts=self._inside,
        )


def _rule(group: str, resources: str, verbs: str, names: str = "") -> k8s.rbac.v1.PolicyRuleArgs:
    return k8s.rbac.v1.PolicyRuleArgs(
        api_groups=[group],
        resources=resources.split(","),
        verbs=verbs.split(","),
        resource_names=names.split(",") if names else None,
    )


_HEALTH_PORT: Final = 8085
_LIVE: Final = {AwsRole.AUTOSCALER: "/health-check", AwsRole.HYGIENE: "/healthz", AwsRole.SPOT: "/healthz"}
_SEE: Final = "get,list,watch"
_RIGHTS: Final[Mapping[AwsRole, _Rights]] = {
    # As its own documentation has it (cluster-autoscaler, cloudprovider/aws/examples), less what is not used here.
    AwsRole.AUTOSCALER: _Rights(
        [
            ("", "events", "create,patch"),
            ("", "pods/eviction", "create"),
            ("", "pods/status", "update"),
            ("", "nodes", f"{_SEE},update"),
            ("", "namespaces,pods,services,replicationcontrollers,persistentvolumeclaims,persistentvolumes", _SEE),
            ("batch", "jobs", _SEE),
            ("apps", "statefulsets,replicasets,daemonsets", _SEE),
            ("policy", "poddisruptionbudgets", "list,watch"),
            (
                "storage.k8s.io",
                "storageclasses,csinodes,csidrivers,csistoragecapacities,volumeattachments",
                _SEE,
            ),
            (
                "resource.k8s.io",
                "resourceclaims,resourceslices,deviceclasses",
                _SEE,
            ),
        ],
        PLATFORM,
        [
            ("coordination.k8s.io", "leases", "create", ""),
            ("coordination.k8s.io", "leases", "get,update", "cluster-autoscaler"),
            ("", "configmaps", "create,list,watch", ""),
            ("", "configmaps", "get,update,delete,watch", "cluster-autoscaler-status"),
        ],
    ),
    # Node-password secrets are named after nodes, so that no list of names can be given.
    AwsRole.HYGIENE: _Rights(
        [("", "nodes", "get,list,delete"), ("", "events", "create,patch")],
        "kube-system",
        [("", "secrets", "delete", "")],
    ),
    AwsRole.SPOT: _Rights(
        [
            ("", "nodes", "get,list,patch"),
            ("", "pods", "get,list"),
            ("", "pods/eviction", "create"),
            ("", "events", "create,patch"),
            ("apps", "daemonsets", "get"),
        ]
    ),
}


def command(role: AwsRole, foundation: FoundationOutputs, port: int) -> list[str]:
    """What an operator runs: which groups and queues it looks after is the foundation's knowledge."""
    groups = [g for site in foundation.sites for g in site.node_groups]
    match role:
        case AwsRole.AUTOSCALER:
            nodes = [f"--nodes={g.minimum}:{g.maximum}:{g.auto_scaling_group}" for g in groups]
            return [
                "./cluster-autoscaler",
                "--cloud-provider=aws",
                f"--namespace={PLATFORM}",
                *nodes,
                "--expander=least-waste",
                "--skip-nodes-with-local-storage=false",
                "--skip-nodes-with-system-pods=false",
                "--scale-down-unneeded-time=10m",
                "--max-node-provision-time=15m",
                f"--address=:{port}",
            ]
        case AwsRole.HYGIENE:
            flags = [f"--group={g.auto_scaling_group}" for g in groups]
            return ["python", "-m", "workloads.operators", "hygiene", *flags, "--listen", f"0.0.0.0:{port}"]
        case AwsRole.SPOT:
            queues = [f"--queue-url={site.queue_url}" for site in foundation.sites if site.queue_url]
            return ["python", "-m", "workloads.operators", "spot", *queues, "--listen", f"0.0.0.0:{port}"]
    raise ValueError(f"{role.value} is no operator")


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


def access_config(role: AwsRole, foundation: FoundationOutputs) -> str:
    """The AWS configuration file of a role's pods. Raises ValueError where the foundation trusts no certificate."""
    anchor, profile = foundation.trust_anchor_arn, foundation.roles_anywhere_profile_arn
    if anchor is None or profile is None:
        raise ValueError(
            "the foundation trusts no certificates, so that pods have no way to a role: give it identity.trust_anchor"
        )
    return pods.aws_config(trust_anchor=anchor, profile=profile, role=foundation.roles[role.value])


def config_map_of(access: Access, namespace: str, text: Input[str], opts: ResourceOptions) -> k8s.core.v1.ConfigMap:
    """The AWS configuration file of a role, in one namespace."""
    return k8s.core.v1.ConfigMap(
        f"{namespace}-{access.config_map}",
        metadata=k8s.meta.v1.ObjectMetaArgs(name=access.config_map, namespace=namespace, labels=pods.MANAGED),
        data={"config": text},
        opts=opts,
    )
