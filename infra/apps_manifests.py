"""A recorded apps stack as plain Kubernetes manifests: for a control plane, for kube-score, for the edge table.

What Pulumi registers as inputs of a Kubernetes resource are the manifest's own fields. Secrets come out in the clear:
for throw-away values only.
"""

from __future__ import annotations

from typing import Any, Final

from infra.recording import Recorded, Recording

_FIRST: Final = (
    "CustomResourceDefinition",
    "Namespace",
    "PriorityClass",
    "RuntimeClass",
    "ResourceQuota",
    "LimitRange",
    "ServiceAccount",
    "ClusterRole",
    "Role",
    "ClusterRoleBinding",
    "RoleBinding",
    "NetworkPolicy",
    "Secret",
    "ConfigMap",
    "PersistentVolumeClaim",
    "Service",
    "PodDisruptionBudget",
)
"""Kinds that others need, in the order of applying."""


def is_manifest(resource: Recorded) -> bool:
    """Whether a resource becomes an object of the cluster."""
    return resource.custom and resource.type.startswith("kubernetes:")


def manifest(resource: Recorded) -> dict[str, Any]:
    """One resource as its manifest, secrets revealed."""
    return {key: resource.plain(key) for key in resource.inputs if not key.startswith("__")}


def manifests(recording: Recording) -> list[dict[str, Any]]:
    """Every object of a recorded stack, in the order of applying; the same for the same recording."""
    found = [manifest(r) for r in recording.resources if is_manifest(r)]
    return sorted(found, key=_order)


def _order(document: dict[str, Any]) -> tuple[int, str, str, str]:
    kind = str(document["kind"])
    rank = _FIRST.index(kind) if kind in _FIRST else len(_FIRST)
    meta = document["metadata"]
    return rank, kind, str(meta.get("namespace", "")), str(meta["name"])
