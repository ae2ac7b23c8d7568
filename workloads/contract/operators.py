"""What the cluster's operators may do, and the marks by which they and the cluster's declarations find each other.

`access` renders everything that one operator's ServiceAccount is given: rights, where they hold, and guards, which are
admission policies that narrow a right where RBAC cannot (it knows no patterns of names and no fields). Whoever
declares a cluster declares exactly these manifests; nothing here talks to one.

Sources: Kubernetes, "Using RBAC Authorization", "Validating Admission Policy"; k3s, "Node Registration" (secrets
`<node>.node-password.k3s` in kube-system).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Final

SITE_LABEL: Final = "rankbridge.io/site"
"""On each node: the name of its site."""
ROTATION_LABEL: Final = "rankbridge.io/in-rotation"
"""On each serving pod's template with `IN_ROTATION`, and in the selector of its Services beside role and site; never
in the selector of its Deployment or of its disruption budget. A pod that loses the value leaves its Services' endpoints
at once and goes on with what it has begun; its Deployment still owns it and starts no other."""
IN_ROTATION: Final = "true"
WITHDRAWN: Final = "false"
CLOUD_PROVIDER_ID: Final = "aws:///"
"""What the provider id of a node on EC2 begins with: `aws:///<zone>/<instance>`. No private host has such a one."""
NODE_PASSWORD_SUFFIX: Final = ".node-password.k3s"  # noqa: S105 - the end of a secret's name
NODE_PASSWORD_NAMESPACE: Final = "kube-system"  # noqa: S105 - a namespace


class Operator(enum.StrEnum):
    """A process that acts on the cluster; the value is its name there, and its subcommand of `workloads.operators`."""

    HYGIENE = "hygiene"
    SPOT = "spot"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One right: verbs on resources of an API group."""

    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]

    def manifest(self) -> dict[str, Any]:
        """As a PolicyRule."""
        return {"apiGroups": [self.group], "resources": list(self.resources), "verbs": list(self.verbs)}


@dataclasses.dataclass(frozen=True)
class Guard:
    """What a request that a right allows must also be: a CEL expression that holds, or the request is refused."""

    name: str
    group: str
    resource: str
    operation: str
    """DELETE or UPDATE (a patch is one)."""
    expression: str
    message: str


@dataclasses.dataclass(frozen=True)
class Access:
    """An operator's rights by where they hold, and what narrows them."""

    cluster: tuple[Rule, ...]
    in_kube_system: tuple[Rule, ...] = ()
    in_serving: tuple[Rule, ...] = ()
    """In each namespace that holds serving pods."""
    guards: tuple[Guard, ...] = ()


_ON_EC2: Final = f"has(oldObject.spec.providerID) && oldObject.spec.providerID.startsWith('{CLOUD_PROVIDER_ID}')"

ACCESS: Final[Mapping[Operator, Access]] = {
    Operator.HYGIENE: Access(
        cluster=(Rule("", ("nodes",), ("list", "delete")),),
        # By name and unread: the right to delete gives no sight of what a secret holds.
        in_kube_system=(Rule("", ("secrets",), ("delete",)),),
        guards=(
            Guard("nodes", "", "nodes", "DELETE", _ON_EC2, "only nodes on EC2 may be removed"),
            Guard(
                "secrets",
                "",
                "secrets",
                "DELETE",
                f"oldObject.metadata.name.endsWith('{NODE_PASSWORD_SUFFIX}')",
                "only node passwords may be removed",
            ),
        ),
    ),
    Operator.SPOT: Access(
        cluster=(
            Rule("", ("nodes",), ("list", "patch")),
            Rule("", ("pods",), ("list",)),
            Rule("", ("pods/eviction",), ("create",)),
        ),
        in_serving=(Rule("", ("pods",), ("patch",)),),
        guards=(
            Guard(
                "nodes",
                "",
                "nodes",
                "UPDATE",
                f"{_ON_EC2} && object.metadata.?labels == oldObject.metadata.?labels"
                " && object.spec.?taints == oldObject.spec.?taints",
                "only nodes on EC2 may be cordoned, and nothing else about them changed",
            ),
            Guard(
                "pods",
                "",
                "pods",
                "UPDATE",
                "object.spec == oldObject.spec",
                "only marks of a pod may be changed, never what it runs",
            ),
        ),
    ),
}


def access(
    operator: Operator, *, namespace: str, service_account: str, serving: Sequence[str], prefix: str = "rankbridge"
) -> tuple[dict[str, Any], ...]:
    """All manifests that give a ServiceAccount of `namespace` an operator's rights, in the order to declare them in.

    ClusterRole and binding; Role and binding in kube-system and in each namespace of `serving`, where there are rights;
    a ValidatingAdmissionPolicy and its binding for each guard. Names begin with `<prefix>-<operator>`. The
    ServiceAccount itself is the declarer's.
    """
    given = ACCESS[operator]
    name = f"{prefix}-{operator}"
    subject = {"kind": "ServiceAccount", "name": service_account, "namespace": namespace}
    manifests = _bound("Cluster", name, None, given.cluster, subject)
    if given.in_kube_system:
        manifests += _bound("", name, NODE_PASSWORD_NAMESPACE, given.in_kube_system, subject)
    for served in serving:
        if given.in_serving:
            manifests += _bound("", name, served, given.in_serving, subject)
    username = f"system:serviceaccount:{namespace}:{service_account}"
    for guard in given.guards:
        manifests += _guarded(f"{name}-{guard.name}", guard, username)
    return tuple(manifests)


def _bound(
    scope: str, name: str, namespace: str | None, rules: Sequence[Rule], subject: Mapping[str, str]
) -> list[dict[str, Any]]:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    group = "rbac.authorization.k8s.io"
    return [
        {
            "apiVersion": f"{group}/v1",
            "kind": f"{scope}Role",
            "metadata": metadata,
            "rules": [rule.manifest() for rule in rules],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": f"{scope}RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": group, "kind": f"{scope}Role", "name": name},
            "subjects": [dict(subject)],
        },
    ]


def _guarded(name: str, guard: Guard, username: str) -> list[dict[str, Any]]:
    version = "admissionregistration.k8s.io/v1"
    rule = {
        "apiGroups": [guard.group],
        "apiVersions": ["v1"],
        "operations": [guard.operation],
        "resources": [guard.resource],
    }
    return [
        {
            "apiVersion": version,
            "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": name},
            "spec": {
                "failurePolicy": "Fail",
                "matchConstraints": {"resourceRules": [rule]},
                "matchConditions": [{"name": "operator", "expression": f"request.userInfo.username == '{username}'"}],
                "validations": [{"expression": guard.expression, "message": guard.message, "reason": "Forbidden"}],
            },
        },
        {
            "apiVersion": version,
            "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": name},
            "spec": {"policyName": name, "validationActions": ["Deny"]},
        },
    ]
