"""The apps' rules: images by digest, Triton's release and control, what a pod may be and who may reach it.

An exception is an annotation of the pod's template that says why (`rankbridge.io/why-<what>`). Unknown values pass, as
in `infra.rules.foundation`. Source: Kubernetes, "Pod Security Standards" (restricted).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from infra.rules import SECRET, UNKNOWN, Context, Resource, Rule, Value

DEPLOYMENT: Final = "kubernetes:apps/v1:Deployment"
STATEFUL_SET: Final = "kubernetes:apps/v1:StatefulSet"
DAEMON_SET: Final = "kubernetes:apps/v1:DaemonSet"
JOB: Final = "kubernetes:batch/v1:Job"
CRON_JOB: Final = "kubernetes:batch/v1:CronJob"
POD: Final = "kubernetes:core/v1:Pod"
SERVICE: Final = "kubernetes:core/v1:Service"
NAMESPACE: Final = "kubernetes:core/v1:Namespace"
NETWORK_POLICY: Final = "kubernetes:networking.k8s.io/v1:NetworkPolicy"
BUDGET: Final = "kubernetes:policy/v1:PodDisruptionBudget"
SERVERS: Final = frozenset({DEPLOYMENT, STATEFUL_SET, DAEMON_SET})
WORKLOADS: Final = SERVERS | {JOB, CRON_JOB, POD}

DIGEST: Final = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
TRITON_RELEASE: Final = "rankbridge.io/triton-release"
TRITON_FLOOR: Final = (26, 7)
WHY: Final = "rankbridge.io/why-"
ENFORCE: Final = "pod-security.kubernetes.io/enforce"

_TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = {
    CRON_JOB: ("spec", "jobTemplate", "spec", "template"),
    POD: (),
}


def template(resource: Resource) -> Resource:
    """The pod that a workload makes, as a resource of its own."""
    path = _TEMPLATES.get(resource.type, ("spec", "template"))
    inputs = resource.get(*path) if path else resource.inputs
    return Resource(resource.type, resource.name, inputs if isinstance(inputs, Mapping) else {})


def containers(pod: Resource, *, init: bool = True) -> Iterator[tuple[str, Resource]]:
    """Containers with their place in the pod; `init` with those that come first."""
    for key in ("initContainers", "containers") if init else ("containers",):
        for index, one in enumerate(pod.sequence("spec", key)):
            if isinstance(one, Mapping):
                yield f"{key}[{index}]", Resource(pod.type, pod.name, one)


def is_excused(pod: Resource, what: str) -> bool:
    """Whether the pod's annotations say why it may."""
    why = pod.get("metadata", "annotations", f"{WHY}{what}")
    return why is UNKNOWN or (isinstance(why, str) and len(why) > 10)


def _known(value: Value) -> bool:
    return value is not UNKNOWN and value is not SECRET


def _command(one: Resource) -> list[str]:
    return [str(part) for key in ("command", "args") for part in one.sequence(key) if _known(part)]


def _is_triton(one: Resource) -> bool:
    return any(part.rpartition("/")[2] == "tritonserver" for part in _command(one))


def digest_pinned(resource: Resource, _: Context) -> Iterator[str]:
    """A tag can change under us; a digest cannot."""
    for where, one in containers(template(resource)):
        image = one.get("image")
        if _known(image) and not DIGEST.fullmatch(str(image)):
            yield f"{where}.image must be name@sha256:<digest>, not {image}: rankbridge images pin"


def triton_release(resource: Resource, _: Context) -> Iterator[str]:
    """Old releases of Triton have known vulnerabilities."""
    pod = template(resource)
    if not any(_is_triton(one) for _, one in containers(pod)):
        return
    release = pod.get("metadata", "annotations", TRITON_RELEASE)
    if release is UNKNOWN:
        return
    found = re.fullmatch(r"(\d\d)\.(\d\d)", str(release))
    if found is None or (int(found[1]), int(found[2])) < TRITON_FLOOR:
        floor = ".".join(f"{part:02}" for part in TRITON_FLOOR)
        yield f"the annotation {TRITON_RELEASE} must name {floor} or newer, not {release}"


def triton_explicit(resource: Resource, _: Context) -> Iterator[str]:
    """Triton serves what an agent has verified and loaded, and nothing that merely lies there."""
    for where, one in containers(template(resource)):
        if _is_triton(one):
            mode = [part.partition("=")[2] for part in _command(one) if part.startswith("--model-control-mode")]
            if mode != ["explicit"]:
                yield f"{where} must run with --model-control-mode=explicit, not {', '.join(mode) or 'the default'}"


def inside_only(resource: Resource, _: Context) -> Iterator[str]:
    """Nothing is reached from outside but through the ingress."""
    kind = resource.get("spec", "type")
    if kind not in (None, "ClusterIP", UNKNOWN):
        yield f"spec.type must be ClusterIP, not {kind}: the ingress is the way in, and Triton has none"
    if resource.sequence("spec", "externalIPs"):
        yield "spec.externalIPs must be empty"


def probed(resource: Resource, _: Context) -> Iterator[str]:
    """A server says that it lives, and its pod when it can answer."""
    pod = template(resource)
    if is_excused(pod, "pod-probes"):
        return
    ready = False
    for where, one in containers(pod):
        stays = where.startswith("containers") or one.get("restartPolicy") == "Always"
        if stays and one.get("livenessProbe") is None:
            yield f"{where} must have a livenessProbe"
        ready = ready or one.get("readinessProbe") is not None
    if not ready and pod.inputs:
        yield "some container must have a readinessProbe"


def limited(resource: Resource, _: Context) -> Iterator[str]:
    """Nobody takes what others were promised."""
    for where, one in containers(template(resource)):
        for side in ("requests", "limits"):
            for what in ("cpu", "memory"):
                if one.get("resources", side, what) is None:
                    yield f"{where}.resources.{side}.{what} must be given"
        if one.get("resources", "requests", "memory") != one.get("resources", "limits", "memory"):
            yield f"{where}: memory must be limited to what it asks for, or a neighbour is ended for it"


def locked_down(resource: Resource, _: Context) -> Iterator[str]:
    """No root, no capabilities, no writing to the image, the runtime's seccomp profile."""
    pod = template(resource)
    root = is_excused(pod, "root")
    for where, one in containers(pod):
        security = Resource(one.type, one.name, _mapping(one.get("securityContext")))
        wanted: list[tuple[str, Value, bool]] = [
            ("allowPrivilegeEscalation", False, False),
            ("readOnlyRootFilesystem", True, False),
            ("runAsNonRoot", True, root),
        ]
        for key, value, excused in wanted:
            if not excused and security.get(key) not in (value, UNKNOWN):
                yield f"{where}.securityContext.{key} must be {str(value).lower()}"
        if list(security.sequence("capabilities", "drop")) != ["ALL"] or security.sequence("capabilities", "add"):
            yield f"{where}.securityContext.capabilities must drop ALL and add none"
        if security.get("seccompProfile", "type") not in ("RuntimeDefault", "Localhost", UNKNOWN):
            yield f"{where}.securityContext.seccompProfile must be RuntimeDefault"
        if security.get("privileged") not in (None, False, UNKNOWN):
            yield f"{where} must not be privileged"


def off_the_host(resource: Resource, _: Context) -> Iterator[str]:
    """A pod has nothing of its node: no network, processes, ports or files."""
    pod = template(resource)
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get("spec", key) not in (None, False, UNKNOWN):
            yield f"spec.{key} must be false"
    for where, one in containers(pod):
        if any(isinstance(port, Mapping) and port.get("hostPort") for port in one.sequence("ports")):
            yield f"{where} must not take a port of its node"
    for index, volume in enumerate(pod.sequence("spec", "volumes")):
        if isinstance(volume, Mapping) and volume.get("hostPath") and not is_excused(pod, "host-path"):
            yield f"volumes[{index}] must not be a path of the node, or the annotation {WHY}host-path must say why"


def spread(resource: Resource, _: Context) -> Iterator[str]:
    """Pods of a kind are not all on one node."""
    if resource.get("spec", "replicas") in (0, 1):
        return
    if not resource.get("spec", "template", "spec", "topologySpreadConstraints"):  # unknown is true
        yield "must spread its pods: topologySpreadConstraints"


def budgeted(resources: Sequence[Resource], _: Context) -> Iterator[tuple[Resource, str]]:
    """A drain takes one pod at a time."""
    budgets = [
        (b.get("metadata", "namespace"), _mapping(b.get("spec", "selector", "matchLabels")))
        for b in resources
        if b.type == BUDGET
    ]
    for resource in resources:
        if resource.type not in (DEPLOYMENT, STATEFUL_SET):
            continue
        labels = _mapping(template(resource).get("metadata", "labels"))
        place = resource.get("metadata", "namespace")
        if not any(where == place and chosen and chosen.items() <= labels.items() for where, chosen in budgets):
            yield resource, "must have a PodDisruptionBudget that selects its pods"


def default_deny(resources: Sequence[Resource], _: Context) -> Iterator[tuple[Resource, str]]:
    """A namespace is shut both ways until a policy opens something."""
    shut = {
        p.get("metadata", "namespace")
        for p in resources
        if p.type == NETWORK_POLICY
        and p.get("spec", "podSelector") in ({}, None)
        and set(map(str, p.sequence("spec", "policyTypes"))) == {"Ingress", "Egress"}
        and not p.sequence("spec", "ingress")
        and not p.sequence("spec", "egress")
    }
    for resource in resources:
        if resource.type == NAMESPACE and resource.get("metadata", "name") not in (*shut, UNKNOWN):
            yield resource, "must have a NetworkPolicy that selects every pod and allows nothing, in and out"


def restricted_namespace(resource: Resource, _: Context) -> Iterator[str]:
    """Pod Security refuses what these rules would miss."""
    level = resource.get("metadata", "labels", ENFORCE)
    if level in ("restricted", UNKNOWN):
        return
    why = resource.get("metadata", "annotations", f"{WHY}privileged")
    if not isinstance(why, str):
        yield f"the label {ENFORCE} must be restricted, not {level}, or the annotation {WHY}privileged must say why"


def _mapping(value: Value) -> Mapping[str, Value]:
    return value if isinstance(value, Mapping) else {}


RULES: Final = (
    Rule("digest-pinned", "Images by digest", WORKLOADS, digest_pinned),
    Rule("triton-release", "No Triton with known vulnerabilities", WORKLOADS, triton_release),
    Rule("triton-explicit", "Triton loads what it is told", WORKLOADS, triton_explicit),
    Rule("inside-only", "No NodePort, no LoadBalancer", frozenset({SERVICE}), inside_only),
    Rule("probed", "Probes", SERVERS, probed),
    Rule("limited", "Requests and limits", WORKLOADS, limited),
    Rule("locked-down", "Containers without rights", WORKLOADS, locked_down),
    Rule("off-the-host", "Nothing of the node", WORKLOADS, off_the_host),
    Rule("spread", "Pods apart", frozenset({DEPLOYMENT}), spread),
    Rule("budgeted", "Disruption budgets", check_all=budgeted),
    Rule("default-deny", "Namespaces shut both ways", check_all=default_deny),
    Rule("restricted-namespace", "Pod Security restricted", frozenset({NAMESPACE}), restricted_namespace),
)
"""Every rule of the apps, in the order in which violations are reported."""
