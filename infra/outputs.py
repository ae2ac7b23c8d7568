"""What a foundation stack tells the world: one type, exported by the foundation and read by the apps layer.

`export` is the only place that names stack outputs and `read` the only one that reads them. The fields hold plain
values when read; while being exported they may still be outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

SCHEMA_VERSION: Final = 1
SECRET: Final = ("kubeconfig", "vpn_files")


@dataclasses.dataclass(frozen=True)
class NodeGroupOutputs:
    """A GPU node group as schedulers and handlers need to know it."""

    name: str
    auto_scaling_group: str
    minimum: int
    maximum: int
    gpus: int


@dataclasses.dataclass(frozen=True)
class SiteOutputs:
    """A site. What only a cloud site has is empty elsewhere."""

    name: str
    kind: str
    region: str
    cidr: str
    labels: Mapping[str, str]
    vpc_id: str | None = None
    private_subnet_ids: tuple[str, ...] = ()
    s3_endpoint_url: str | None = None
    """Where private sites reach S3 over the VPN."""
    queue_url: str | None = None
    """Spot, rebalance and termination notices."""
    agent_token_secret_arn: str | None = None
    repositories: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Image name to repository URL."""
    node_groups: tuple[NodeGroupOutputs, ...] = ()


@dataclasses.dataclass(frozen=True)
class FoundationOutputs:
    """Everything the apps layer may build on."""

    environment: str
    api_url: str
    pod_cidr: str
    service_cidr: str
    pod_mtu: int
    sites: tuple[SiteOutputs, ...]
    buckets: Mapping[str, str]
    """Data class to bucket name."""
    roles: Mapping[str, str]
    """Workload (`infra.iam.Role`) to role ARN."""
    trust_anchor_arn: str | None
    roles_anywhere_profile_arn: str | None
    alarm_topic_arn: str
    kubeconfig: str | None = dataclasses.field(default=None, repr=False)
    """Secret; absent where the stack installs no hosts."""
    vpn_files: str | None = dataclasses.field(default=None, repr=False)
    """Secret; JSON: private site -> path -> content of its router's files."""

    def site(self, name: str) -> SiteOutputs:
        """A site by its name; raises KeyError."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)


def export(outputs: FoundationOutputs, emit: Callable[[str, Any], None]) -> None:
    """Give each field to `emit` (`pulumi.export`) under its own name."""
    emit("schema_version", SCHEMA_VERSION)
    for field in dataclasses.fields(outputs):
        value = getattr(outputs, field.name)
        if field.name == "sites":
            value = [{f.name: _plain(getattr(s, f.name)) for f in dataclasses.fields(s)} for s in value]
        emit(field.name, value)


def _plain(value: object) -> object:
    """Nested records as mappings; outputs pass as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def read(values: Mapping[str, Any]) -> FoundationOutputs:
    """The foundation's outputs from a stack's, all known. Raises ValueError for another schema or a missing field."""
    version = values.get("schema_version")
    if version is None or int(version) != SCHEMA_VERSION:
        raise ValueError(
            f"the foundation exports schema {version}, this program reads {SCHEMA_VERSION}: update the older one"
        )
    fields = {f.name: f for f in dataclasses.fields(FoundationOutputs)}
    optional = {"kubeconfig", "vpn_files", "trust_anchor_arn", "roles_anywhere_profile_arn"}
    missing = sorted(set(fields) - set(values) - optional)
    if missing:
        raise ValueError("the foundation stack does not export " + ", ".join(missing) + ": run pulumi up there first")
    taken: dict[str, Any] = {name: values.get(name) for name in fields}
    taken["sites"] = tuple(_site(s) for s in values["sites"])
    taken["pod_mtu"] = int(values["pod_mtu"])
    return FoundationOutputs(**taken)


def _site(values: Mapping[str, Any]) -> SiteOutputs:
    # Numbers come back from an engine as floats, and absent values as missing keys.
    groups = tuple(
        NodeGroupOutputs(
            name=g["name"],
            auto_scaling_group=g["auto_scaling_group"],
            minimum=int(g["minimum"]),
            maximum=int(g["maximum"]),
            gpus=int(g["gpus"]),
        )
        for g in values.get("node_groups") or ()
    )
    known = {f.name for f in dataclasses.fields(SiteOutputs)}
    taken = {k: v for k, v in values.items() if k in known}
    return SiteOutputs(
        **{
            **taken,
            "node_groups": groups,
            "private_subnet_ids": tuple(values.get("private_subnet_ids") or ()),
            "repositories": values.get("repositories") or {},
        }
    )
