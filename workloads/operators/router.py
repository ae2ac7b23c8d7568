"""Taking pods out of the way of new requests before they end: one door, as Kubernetes does it, and its fake.

In the cluster a pod's weight is whether its Services select it. What else routes requests later (a gateway's router)
gets an implementation of this door and nothing around it changes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from workloads.contract.operators import ROTATION_LABEL, WITHDRAWN
from workloads.operators.cluster import Cluster, DeniedFault, Pod, in_rotation


class Router(Protocol):
    """Who decides where a new request goes."""

    def withdraw(self, pods: Sequence[Pod]) -> int:
        """Give these pods weight 0: no new request, those under way go on. The number that had a weight until now.

        May be called again for the same pods. Raises ClusterFault.
        """
        ...


class Services:
    """Services of some namespaces, which select pods by `ROTATION_LABEL` beside role and site."""

    def __init__(self, cluster: Cluster, namespaces: Collection[str]) -> None:
        self._cluster = cluster
        self._namespaces = frozenset(namespaces)

    def withdraw(self, pods: Sequence[Pod]) -> int:
        """See Router; pods of other namespaces are not ours to mark."""
        ours = [pod for pod in pods if pod.namespace in self._namespaces and in_rotation(pod)]
        denied: DeniedFault | None = None
        for pod in ours:
            try:
                self._cluster.label_pod(pod.namespace, pod.name, ROTATION_LABEL, WITHDRAWN)
            except DeniedFault as error:  # one that cannot be marked is no reason to leave the others in rotation
                denied = error
        if denied is not None:
            raise denied
        return len(ours)


class MemoryRouter:
    """Remembers who was withdrawn, by title."""

    def __init__(self) -> None:
        self.withdrawn: list[str] = []

    def withdraw(self, pods: Sequence[Pod]) -> int:
        """See Router."""
        new = [pod.title for pod in pods if pod.title not in self.withdrawn]
        self.withdrawn += new
        return len(new)
