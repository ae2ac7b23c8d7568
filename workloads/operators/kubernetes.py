"""The cluster's door over the Kubernetes API. Who we are is the pod's ServiceAccount, or KUBECONFIG's user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

import httpx2
from lightkube import ApiError, Client
from lightkube.core.exceptions import ConfigError
from lightkube.models.core_v1 import NodeCondition
from lightkube.models.meta_v1 import DeleteOptions, ObjectMeta
from lightkube.resources import core_v1
from lightkube.types import PatchType

from workloads.operators.cluster import ClusterFault, DeniedFault, Eviction, Node, Pod

TIMEOUT_S: Final = 5.0
PAGE: Final = 500
MIRROR: Final = "kubernetes.io/config.mirror"
_ENDED: Final = frozenset({"Succeeded", "Failed"})
_NOT_FOUND: Final = 404
_TOO_MANY_REQUESTS: Final = 429
_BUSY: Final = frozenset({401, 429, 502, 503, 504})
"""Answers that say something about the API server or about who we are, not about what was asked."""


class LightkubeCluster:
    """`Cluster` over one API server; calls may come from several threads."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @classmethod
    def open(cls) -> LightkubeCluster:
        """The cluster of this pod or of KUBECONFIG; asks it nothing yet. Raises ClusterFault when neither is there."""
        try:
            return cls(Client(timeout=httpx2.Timeout(TIMEOUT_S), field_manager="rankbridge-operators"))
        except (ConfigError, OSError, ValueError, KeyError, AssertionError) as error:  # a file without a user asserts
            raise ClusterFault(f"no cluster is configured: {error}") from error

    def nodes(self) -> Sequence[Node]:
        """See Cluster."""
        with _asking("list nodes"):
            return [_node(node) for node in self._client.list(core_v1.Node, chunk_size=PAGE)]

    def pods(self, node: str) -> Sequence[Pod]:
        """See Cluster."""
        with _asking(f"list pods on {node}"):
            found = self._client.list(core_v1.Pod, namespace="*", fields={"spec.nodeName": node}, chunk_size=PAGE)
            return [_pod(pod) for pod in found]

    def remove_node(self, name: str) -> None:
        """See Cluster."""
        with _asking(f"delete node {name}"), _gone_is_done():
            self._client.delete(core_v1.Node, name)

    def remove_secret(self, namespace: str, name: str) -> None:
        """See Cluster."""
        with _asking(f"delete secret {namespace}/{name}"), _gone_is_done():
            self._client.delete(core_v1.Secret, name, namespace=namespace)

    def cordon(self, node: str) -> None:
        """See Cluster."""
        with _asking(f"cordon {node}"):
            self._client.patch(core_v1.Node, node, {"spec": {"unschedulable": True}}, patch_type=PatchType.MERGE)

    def label_pod(self, namespace: str, name: str, label: str, value: str) -> None:
        """See Cluster."""
        change = {"metadata": {"labels": {label: value}}}
        with _asking(f"label pod {namespace}/{name}"), _gone_is_done():
            self._client.patch(core_v1.Pod, name, change, namespace=namespace, patch_type=PatchType.MERGE)

    def evict(self, namespace: str, name: str, grace_s: int | None) -> Eviction:
        """See Cluster. An API server that is short of breath answers as a budget does, and is asked again as well."""
        eviction = core_v1.PodEviction(
            metadata=ObjectMeta(name=name, namespace=namespace),
            deleteOptions=None if grace_s is None else DeleteOptions(gracePeriodSeconds=grace_s),
        )
        with _asking(f"evict {namespace}/{name}"):
            try:
                self._client.create(eviction, name, namespace=namespace)
            except httpx2.HTTPStatusError as error:
                if error.response.status_code == _NOT_FOUND:
                    return Eviction.GONE
                if error.response.status_code == _TOO_MANY_REQUESTS:
                    return Eviction.REFUSED
                raise
        return Eviction.ACCEPTED


@contextlib.contextmanager
def _asking(what: str) -> Iterator[None]:
    try:
        yield
    except httpx2.HTTPStatusError as error:
        denied = error.response.status_code not in _BUSY
        raise (DeniedFault if denied else ClusterFault)(f"cannot {what}: {error}") from error
    except (httpx2.HTTPError, ConfigError, OSError, ValueError) as error:
        raise ClusterFault(f"cannot {what}: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def _gone_is_done() -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        if error.response.status_code != _NOT_FOUND:
            raise


def _node(node: core_v1.Node) -> Node:
    metadata, spec, status = node.metadata or ObjectMeta(), node.spec, node.status
    conditions: Sequence[NodeCondition] = (status.conditions if status else None) or ()
    return Node(
        name=metadata.name or "",
        provider_id=(spec.providerID if spec else None) or "",
        labels=metadata.labels or {},
        ready=any(condition.type == "Ready" and condition.status == "True" for condition in conditions),
        unschedulable=bool(spec and spec.unschedulable),
    )


def _pod(pod: core_v1.Pod) -> Pod:
    metadata, spec, status = pod.metadata or ObjectMeta(), pod.spec, pod.status
    owners = metadata.ownerReferences or ()
    grace_s = spec.terminationGracePeriodSeconds if spec else None
    return Pod(
        namespace=metadata.namespace or "",
        name=metadata.name or "",
        labels=metadata.labels or {},
        stays=any(owner.controller and owner.kind == "DaemonSet" for owner in owners)
        or MIRROR in (metadata.annotations or {})
        or (status is not None and status.phase in _ENDED),
        leaving=metadata.deletionTimestamp is not None,
        grace_s=30 if grace_s is None else grace_s,
    )
