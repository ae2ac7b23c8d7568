"""The parts that every pod of ours is made of: locked-down containers, scratch volumes, credentials for AWS.

What a container runs and what stands around a pod is its callers' business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

import pulumi_kubernetes as k8s
from pulumi import Input

from infra.apps_config import Image, Resources, SiteSettings
from infra.edges import ROLE_LABEL, SITE_LABEL
from workloads.contract.http import PATH_HEALTH, PATH_READY

USER: Final = 65_532
IDENTITY: Final = "/var/run/rankbridge/identity"
IDENTITY_PORT: Final = 9911
"""On loopback: what AWS's helper takes by itself."""
SCRATCH: Final = "/tmp"  # noqa: S108 -- a volume of the pod's own
MANAGED: Final = {"app.kubernetes.io/part-of": "rankbridge", "app.kubernetes.io/managed-by": "pulumi"}
IGNORED_CHECKS: Final = "kube-score/ignore"
REASON: Final = "rankbridge.io/why"
"""Prefix of annotations that say why an exception is made: `rankbridge.io/why-<check>`."""

GPU_TOLERATION: Final = k8s.core.v1.TolerationArgs(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")


def lost_node(seconds: int) -> list[k8s.core.v1.TolerationArgs]:
    """How long a pod waits on a node that is not heard from before it is replaced."""
    return [
        k8s.core.v1.TolerationArgs(
            key=f"node.kubernetes.io/{condition}", operator="Exists", effect="NoExecute", toleration_seconds=seconds
        )
        for condition in ("not-ready", "unreachable")
    ]


def labels(role: str, site: str) -> dict[str, str]:
    """What every object of a role at a site carries; the last two tell its pods."""
    return {**MANAGED, "app.kubernetes.io/name": role, **selector(role, site)}


def selector(role: str, site: str) -> dict[str, str]:
    """What tells a role's pods at a site from all others."""
    return {ROLE_LABEL: role, SITE_LABEL: site}


EVERYWHERE: Final = {
    "container-image-pull-policy": "an image is named by its digest: what a node has is it, and a site must be able to "
    "start pods while its registry is out of reach"
}
"""Exceptions that every pod makes."""


def exceptions(reasons: Mapping[str, str]) -> dict[str, str]:
    """Annotations that switch checks of kube-score off for a pod or what makes it, each with its reason."""
    given = {**EVERYWHERE, **reasons}
    return {
        IGNORED_CHECKS: ",".join(sorted(given)),
        **{reason_key(check): why for check, why in sorted(given.items())},
    }


def reason_key(check: str) -> str:
    """The annotation that says why a check does not apply; a name has 63 bytes at most, and one check's is longer."""
    domain, _, name = f"{REASON}-{check}".partition("/")
    return f"{domain}/{name[:63]}"


def http_probe(path: str, port: str, *, period: int = 5, failures: int = 3) -> k8s.core.v1.ProbeArgs:
    """Asks a container by HTTP."""
    return k8s.core.v1.ProbeArgs(
        http_get=k8s.core.v1.HTTPGetActionArgs(path=path, port=port),
        period_seconds=period,
        timeout_seconds=2,
        failure_threshold=failures,
    )


@dataclasses.dataclass(frozen=True)
class Probes:
    """Paths that say that a container lives and that it can answer; `startup_s` is how long it may take to live."""

    port: str
    live: str = PATH_HEALTH
    ready: str | None = PATH_READY
    """None for a sidecar whose state must not take its pod out of service."""
    startup_s: int = 120


def container(
    name: str,
    image: str,
    command: Sequence[Input[str]],
    resources: Resources,
    *,
    ports: Mapping[str, int] | None = None,
    probes: Probes | None = None,
    env: Sequence[k8s.core.v1.EnvVarArgs] = (),
    mounts: Sequence[k8s.core.v1.VolumeMountArgs] = (),
    extended: Mapping[str, str] | None = None,
    always: bool = False,
    drain_s: int = 0,
) -> k8s.core.v1.ContainerArgs:
    """A container without rights: no root, no capabilities, a read-only root, limits on everything.

    `extended` are resources that are not shared, such as GPUs. `always` makes an init container a sidecar. `drain_s`
    is waited before SIGTERM, while endpoints forget the pod.
    """
    asked = {"cpu": resources.cpu, "memory": resources.memory, "ephemeral-storage": resources.scratch}
    whole = dict(extended or {})
    startup = liveness = readiness = None
    if probes is not None:
        startup = http_probe(probes.live, probes.port, period=2, failures=max(probes.startup_s // 2, 1))
        liveness = http_probe(probes.live, probes.port, period=10, failures=6)
        readiness = None if probes.ready is None else http_probe(probes.ready, probes.port)
    return k8s.core.v1.ContainerArgs(
        name=name,
        image=image,
        image_pull_policy="IfNotPresent",
        command=list(command),
        ports=[k8s.core.v1.ContainerPortArgs(name=n, container_port=p) for n, p in ports.items()] if ports else None,
        env=list(env) or None,
        volume_mounts=list(mounts),
        resources=k8s.core.v1.ResourceRequirementsArgs(
            requests={**asked, **whole},
            limits={**asked, "cpu": resources.cpu_limit, **whole},
        ),
        security_context=k8s.core.v1.SecurityContextArgs(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            run_as_non_root=True,
            run_as_user=USER,
            run_as_group=USER,
            capabilities=k8s.core.v1.CapabilitiesArgs(drop=["ALL"]),
            seccomp_profile=k8s.core.v1.SeccompProfileArgs(type="RuntimeDefault"),
        ),
        restart_policy="Always" if always else None,
        lifecycle=k8s.core.v1.LifecycleArgs(
            pre_stop=k8s.core.v1.LifecycleHandlerArgs(sleep=k8s.core.v1.SleepActionArgs(seconds=drain_s))
        )
        if drain_s
        else None,
        startup_probe=startup,
        liveness_probe=liveness,
        readiness_probe=readiness,
    )


def security() -> k8s.core.v1.PodSecurityContextArgs:
    """What Pod Security's `restricted` wants of a pod."""
    return k8s.core.v1.PodSecurityContextArgs(
        run_as_non_root=True,
        run_as_user=USER,
        run_as_group=USER,
        fs_group=USER,
        fs_group_change_policy="OnRootMismatch",
        seccomp_profile=k8s.core.v1.SeccompProfileArgs(type="RuntimeDefault"),
    )


def scratch(name: str, size: str, *, medium: str | None = None) -> k8s.core.v1.VolumeArgs:
    """A volume that ends with its pod; in memory with `medium="Memory"`."""
    return k8s.core.v1.VolumeArgs(
        name=name, empty_dir=k8s.core.v1.EmptyDirVolumeSourceArgs(size_limit=size, medium=medium)
    )


def mount(name: str, path: str, *, read_only: bool = False) -> k8s.core.v1.VolumeMountArgs:
    """A volume in a container."""
    return k8s.core.v1.VolumeMountArgs(name=name, mount_path=path, read_only=read_only or None)


def variable(name: str, value: Input[str]) -> k8s.core.v1.EnvVarArgs:
    """An environment variable."""
    return k8s.core.v1.EnvVarArgs(name=name, value=value)


def config_volume(name: str, config_map: str) -> k8s.core.v1.VolumeArgs:
    """A ConfigMap as files."""
    return k8s.core.v1.VolumeArgs(name=name, config_map=k8s.core.v1.ConfigMapVolumeSourceArgs(name=config_map))


SERVING_ENV: Final = (
    # One thread in each numeric library: parallelism here is between processes.
    variable("OMP_NUM_THREADS", "1"),
    variable("OPENBLAS_NUM_THREADS", "1"),
    variable("PYTHONUNBUFFERED", "1"),
    # A pod's address is its own; who may reach it is NetworkPolicies' business.
    variable("RANKBRIDGE_LISTEN", "anywhere"),
)


@dataclasses.dataclass(frozen=True)
class Access:
    """How a pod becomes a role of AWS: a certificate of home's CA, exchanged by AWS's own helper in a sidecar.

    The helper answers in the pod as an instance's metadata service would (with tokens, as IMDSv2), renews sessions, and
    reads a renewed certificate. The secret `identity-<role>` (type kubernetes.io/tls, common name = the role's) is made
    by whoever runs the CA; a node's own role is out of reach (IMDSv2, one hop), and k3s has no IRSA. On an emulator
    there is neither.
    """

    role: str
    region: Input[str]
    s3_endpoint: Input[str]
    helper: Input[Sequence[str]]
    """What the sidecar runs."""
    emulator: str
    images: Mapping[Image, str]

    def env(self) -> list[k8s.core.v1.EnvVarArgs]:
        """AWS's standard configuration; nothing of ours names an endpoint."""
        found = [variable("AWS_REGION", self.region), variable("AWS_DEFAULT_REGION", self.region)]
        if self.emulator:
            return [
                *found,
                variable("AWS_ENDPOINT_URL", self.emulator),
                variable("AWS_ACCESS_KEY_ID", "test"),
                variable("AWS_SECRET_ACCESS_KEY", "test"),  # the emulator takes anything
            ]
        return [
            *found,
            variable("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{IDENTITY_PORT}"),
            # A NetworkPolicy can name the interface endpoint's range, not S3's.
            variable("AWS_ENDPOINT_URL_S3", self.s3_endpoint),
        ]

    def volumes(self) -> list[k8s.core.v1.VolumeArgs]:
        """Volumes of the pod."""
        if self.emulator:
            return []
        source = k8s.core.v1.SecretProjectionArgs(
            name=f"identity-{self.role}",
            items=[k8s.core.v1.KeyToPathArgs(key=k, path=k) for k in ("tls.crt", "tls.key")],
        )
        return [
            k8s.core.v1.VolumeArgs(
                name="identity",
                projected=k8s.core.v1.ProjectedVolumeSourceArgs(
                    default_mode=0o440, sources=[k8s.core.v1.VolumeProjectionArgs(secret=source)]
                ),
            ),
        ]

    def init(self) -> list[k8s.core.v1.ContainerArgs]:
        """The sidecar; nobody but it sees certificate and key."""
        if self.emulator:
            return []
        sidecar = container(
            "identity",
            self.images[Image.CREDENTIAL_HELPER],
            [],
            Resources("10m", "64Mi", "100m", "64Mi"),
            mounts=[mount("identity", IDENTITY, read_only=True)],
            always=True,
        )
        sidecar.command = self.helper
        # It listens to its pod only, where no probe comes from, and ends when it cannot serve. What comes after it
        # waits for the first of these, and so for its first session.
        check = k8s.core.v1.ExecActionArgs(
            command=["aws_signing_helper", "read-certificate-data", "--certificate", f"{IDENTITY}/tls.crt"]
        )
        sidecar.startup_probe = k8s.core.v1.ProbeArgs(
            exec_=check, initial_delay_seconds=5, period_seconds=5, timeout_seconds=5, failure_threshold=12
        )
        sidecar.liveness_probe = k8s.core.v1.ProbeArgs(
            exec_=check, period_seconds=60, timeout_seconds=5, failure_threshold=3
        )
        return [sidecar]


def identity_command(*, trust_anchor: str, profile: str, role: str, region: str) -> list[str]:
    """What the sidecar of a role's pods runs.

    Source: AWS, IAM Roles Anywhere user guide, "Get temporary security credentials" (`serve`).
    """
    return [
        *("aws_signing_helper", "serve", "--port", str(IDENTITY_PORT)),
        *("--certificate", f"{IDENTITY}/tls.crt", "--private-key", f"{IDENTITY}/tls.key"),
        *("--trust-anchor-arn", trust_anchor, "--profile-arn", profile, "--role-arn", role, "--region", region),
    ]


def tolerations(site: SiteSettings, *, waits_s: int) -> list[k8s.core.v1.TolerationArgs]:
    """The GPU nodes' taint at a site that has no other nodes, and how long to wait for a lost node."""
    return [*([GPU_TOLERATION] if site.has_gpus else []), *lost_node(waits_s)]


def on_nodes_of(site: SiteSettings, *, gpus: bool = False) -> k8s.core.v1.AffinityArgs:
    """A pod runs at its site and nowhere else; with `gpus` on nodes that have some."""
    wanted = {**site.selector, **({"nvidia.com/gpu.present": "true"} if gpus else {})}
    terms = [k8s.core.v1.NodeSelectorRequirementArgs(key=k, operator="In", values=[v]) for k, v in wanted.items()]
    return k8s.core.v1.AffinityArgs(
        node_affinity=k8s.core.v1.NodeAffinityArgs(
            required_during_scheduling_ignored_during_execution=k8s.core.v1.NodeSelectorArgs(
                node_selector_terms=[k8s.core.v1.NodeSelectorTermArgs(match_expressions=terms)]
            )
        )
    )


def spread(
    selector: Mapping[str, str],
    topology: str = "kubernetes.io/hostname",
    otherwise: str = "ScheduleAnyway",
    *,
    by_revision: bool = True,
) -> k8s.core.v1.TopologySpreadConstraintArgs:
    """Pods of a kind keep apart; `otherwise` is what happens when they cannot (`DoNotSchedule`)."""
    return k8s.core.v1.TopologySpreadConstraintArgs(
        max_skew=1,
        topology_key=topology,
        when_unsatisfiable=otherwise,
        label_selector=k8s.meta.v1.LabelSelectorArgs(match_labels=dict(selector)),
        match_label_keys=["pod-template-hash"] if by_revision else None,
        # Tainted servers count as empty otherwise, and no second pod would be let onto a worker.
        node_taints_policy="Honor",
    )
