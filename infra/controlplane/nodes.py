"""The foundation's nodes as Node objects: names, labels, taints and zones from the very functions that set machines up.

Pure. What no declaration knows is stated here: the size of an EC2 type (AWS's tables of instance types), and the size
of a private host, which is the operator's hardware and is given. What a kubelet adds by itself is added as it would.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Final

from infra import cluster
from infra.config import FoundationConfig, Host, HostRole, NodeGroup
from infra.plan import Site

NodeManifest = dict[str, Any]

RESERVED_CPU_M: Final = 500
RESERVED_MEMORY_MI: Final = 1_024 + 200
"""What `infra.cluster` has the kubelet keep: kube-reserved, system-reserved, and the eviction threshold."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Processors and memory (GiB) of a machine."""

    cpu: int
    memory_gib: int


EC2_SIZES: Final[Mapping[str, Size]] = {
    "g6.xlarge": Size(4, 16),
    "g5.xlarge": Size(4, 16),
    "g4dn.xlarge": Size(4, 16),
}
"""AWS documentation, "Amazon EC2 accelerated computing instances"."""
PRIVATE_HOST: Final = Size(16, 64)
"""What the suite takes a private host to be."""


def private_nodes(config: FoundationConfig, size: Size = PRIVATE_HOST) -> list[NodeManifest]:
    """A node for each private host: servers keep work away by their taint where there are workers."""
    return [_private(config, host, size) for host in config.onprem.hosts]


def gpu_nodes(config: FoundationConfig, group: str, count: int, *, first: int = 0) -> list[NodeManifest]:
    """Nodes number `first` and on of an Auto Scaling group, spread over its zones as the group spreads them.

    Raises KeyError for a group that the foundation does not have.
    """
    declared = {g.name: g for g in config.node_groups}[group]
    site = {s.name: s for s in config.sites}[declared.site]
    return [_gpu(config, site, declared, number) for number in range(first, first + count)]


def _private(config: FoundationConfig, host: Host, size: Size) -> NodeManifest:
    declared = (cluster.server if host.role is HostRole.SERVER else cluster.agent)(config, host)
    return _node(host.name, str(host.address), declared, {}, size, gpus=0)


def _gpu(config: FoundationConfig, site: Site, group: NodeGroup, number: int) -> NodeManifest:
    instance_type = group.types[number % len(group.types)]
    zone = site.zones[number % len(site.zones)]
    name = f"i-{hashlib.sha256(f'{group.name}/{number}'.encode()).hexdigest()[:17]}"
    is_spot = group.is_mixed and number >= group.on_demand_base
    added = {  # what the join script learns from the instance's metadata
        "topology.kubernetes.io/zone": zone,
        "rankbridge.io/gpu-type": instance_type.name,
        "rankbridge.io/lifecycle": "spot" if is_spot else "on-demand",
    }
    declared = cluster.gpu_config(config, site, group)
    address = str(site.cidr[1_000 + number])
    node = _node(name, address, declared, added, EC2_SIZES[instance_type.name], gpus=instance_type.gpus)
    node["spec"]["providerID"] = f"aws:///{zone}/{name}"
    return node


def _node(
    name: str, address: str, declared: Mapping[str, object], more: Mapping[str, str], size: Size, *, gpus: int
) -> NodeManifest:
    labels = dict(_pairs(declared, "node-label"))
    kubelet = {"kubernetes.io/hostname": name, "kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux"}
    taints = []
    for key, rest in _pairs(declared, "node-taint"):
        value, _, effect = rest.partition(":")
        taints.append({"key": key, "value": value, "effect": effect})
    whole = {"pods": "110", "ephemeral-storage": "200Gi"}
    if gpus:
        whole["nvidia.com/gpu"] = str(gpus)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {**labels, **kubelet, **more}},
        "spec": {"taints": taints} if taints else {},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}],
            "capacity": {**whole, "cpu": str(size.cpu), "memory": f"{size.memory_gib}Gi"},
            "allocatable": {
                **whole,
                "cpu": f"{size.cpu * 1_000 - RESERVED_CPU_M}m",
                "memory": f"{size.memory_gib * 1_024 - RESERVED_MEMORY_MI}Mi",
            },
        },
    }


def _pairs(declared: Mapping[str, object], key: str) -> list[tuple[str, str]]:
    values = declared.get(key, [])
    assert isinstance(values, list)  # noqa: S101 -- infra.cluster makes it
    return [(name, value) for name, _, value in (str(v).partition("=") for v in values)]
