"""What the operators see of a cluster and do to it: one door, its records, and its fake.

Knows no Kubernetes client (`workloads.operators.kubernetes` does) and nothing of AWS but how a node names its instance.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from workloads.contract.operators import CLOUD_PROVIDER_ID, IN_ROTATION, ROTATION_LABEL, SITE_LABEL

_PROVIDER_ID: Final = re.compile(
    re.escape(CLOUD_PROVIDER_ID) + r"([a-z]{2}(?:-[a-z]+)+-\d+)([a-z0-9-]*)/(i-[0-9a-f]{8,17})"
)


class ClusterFault(Exception):  # noqa: N818 - a fault of somebody else, as everywhere here
    """The cluster did not answer, or refused; the message says what was asked and what came back."""


class DeniedFault(ClusterFault):
    """The API server answered and will not do this one thing; it may do others."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A node as far as operators care."""

    name: str
    provider_id: str
    labels: Mapping[str, str]
    ready: bool
    """Whether its kubelet was heard within the control plane's grace."""
    unschedulable: bool = False


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod on a node that is to be emptied."""

    namespace: str
    name: str
    labels: Mapping[str, str]
    stays: bool
    """Nobody evicts it: a DaemonSet's, a static one, or one that has ended."""
    leaving: bool
    """Its deletion has begun."""
    grace_s: int = 30

    @property
    def title(self) -> str:
        """Namespace and name, for logs."""
        return f"{self.namespace}/{self.name}"


class Eviction(enum.StrEnum):
    """What came of asking for an eviction."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    """A disruption budget holds it for now."""
    GONE = "gone"


class Cluster(Protocol):
    """The API server; every method raises ClusterFault when there is no whole answer, DeniedFault when it is no."""

    def nodes(self) -> Sequence[Node]:
        """All nodes, of all sites."""
        ...

    def pods(self, node: str) -> Sequence[Pod]:
        """All pods that are bound to a node."""
        ...

    def remove_node(self, name: str) -> None:
        """Delete a Node; nothing happens when it is gone."""
        ...

    def remove_secret(self, namespace: str, name: str) -> None:
        """Delete a Secret unread; nothing happens when it is gone."""
        ...

    def cordon(self, node: str) -> None:
        """Let no new pod come to a node."""
        ...

    def label_pod(self, namespace: str, name: str, label: str, value: str) -> None:
        """Set one label of a pod; nothing happens when it is gone."""
        ...

    def evict(self, namespace: str, name: str, grace_s: int | None) -> Eviction:
        """Ask for a pod's eviction; `grace_s` shortens the time that it has to end."""
        ...


def instance_of(node: Node, *, site: str, region: str) -> str | None:
    """The EC2 instance that a node of our site is, or None for every node that is not certainly one of ours.

    Three witnesses must agree: the site's label, the provider id in the region, and the name, which is the instance's.
    """
    found = _PROVIDER_ID.fullmatch(node.provider_id)
    if found is None or node.labels.get(SITE_LABEL) != site:
        return None
    where, _, instance = found.groups()
    return instance if where == region and instance == node.name else None


class MemoryCluster:
    """A cluster in memory; what was done stands in `log` in its order.

    `fault` makes every call fail, `denies` names methods that raise DeniedFault, `refuses(pod)` plays a disruption
    budget. An evicted pod is gone at once unless `ends_slowly`.
    """

    def __init__(self, nodes: Sequence[Node] = (), pods: Mapping[str, Sequence[Pod]] | None = None) -> None:
        self.held = {node.name: node for node in nodes}
        self.bound = {node: list(there) for node, there in (pods or {}).items()}
        self.fault = ""
        self.refuses: Callable[[Pod], bool] = lambda _: False
        self.denies: frozenset[str] = frozenset()
        self.ends_slowly = False
        self.log: list[tuple[str, ...]] = []

    def nodes(self) -> Sequence[Node]:
        """See Cluster."""
        self._asked()
        return tuple(self.held.values())

    def pods(self, node: str) -> Sequence[Pod]:
        """See Cluster."""
        self._asked()
        return tuple(self.bound.get(node, ()))

    def remove_node(self, name: str) -> None:
        """See Cluster."""
        self._asked()
        self.log.append(("remove-node", name))
        self.held.pop(name, None)

    def remove_secret(self, namespace: str, name: str) -> None:
        """See Cluster."""
        self._asked()
        self.log.append(("remove-secret", namespace, name))

    def cordon(self, node: str) -> None:
        """See Cluster."""
        self._asked("cordon")
        self.log.append(("cordon", node))
        self.held[node] = dataclasses.replace(self.held[node], unschedulable=True)

    def label_pod(self, namespace: str, name: str, label: str, value: str) -> None:
        """See Cluster."""
        self._asked("label_pod")
        self.log.append(("label", namespace, name, label, value))
        self._change(namespace, name, lambda pod: dataclasses.replace(pod, labels={**pod.labels, label: value}))

    def evict(self, namespace: str, name: str, grace_s: int | None) -> Eviction:
        """See Cluster."""
        self._asked("evict")
        pod = next((p for there in self.bound.values() for p in there if p.title == f"{namespace}/{name}"), None)
        if pod is None:
            return Eviction.GONE
        if self.refuses(pod):
            self.log.append(("refuse", namespace, name))
            return Eviction.REFUSED
        self.log.append(("evict", namespace, name, str(grace_s)))
        slowly = self.ends_slowly
        self._change(namespace, name, lambda p: dataclasses.replace(p, leaving=True) if slowly else None)
        return Eviction.ACCEPTED

    def _asked(self, method: str = "") -> None:
        if self.fault:
            raise ClusterFault(self.fault)
        if method in self.denies:
            raise DeniedFault(f"cannot {method}")

    def _change(self, namespace: str, name: str, change: Callable[[Pod], Pod | None]) -> None:
        for there in self.bound.values():
            for place, pod in enumerate(there):
                if (pod.namespace, pod.name) == (namespace, name):
                    changed = change(pod)
                    there[place : place + 1] = [changed] if changed else []
                    return


def in_rotation(pod: Pod) -> bool:
    """Whether a pod gets requests through its Services."""
    return pod.labels.get(ROTATION_LABEL) == IN_ROTATION
