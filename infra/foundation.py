"""Layer 1, the foundation: wires sites, storage, identity, VPN and the private cluster together, and exports them.

Everything that can be wrong in a stack file is refused here before the first resource is declared.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pulumi
import pulumi_aws as aws
from pulumi import Output, ResourceOptions
from pulumi.runtime import config as runtime_config

from infra import aws as cloud
from infra import cluster, config, outputs
from infra.cluster import File
from infra.config import CloudSite, FoundationConfig
from infra.iam import DataClass, Role, Scope
from infra.identity import Alarms, AlarmsArgs, Identity, IdentityArgs
from infra.onprem import OnPrem, OnPremArgs
from infra.outputs import FoundationOutputs, NodeGroupOutputs, SiteOutputs
from infra.storage import Registry, RegistryArgs, Storage, StorageArgs
from infra.vpn import plan as vpn_plan
from infra.vpn import render
from infra.vpn.component import Connection, ConnectionArgs, Gateway, GatewayArgs

EMULATED_SERVICES: Final = (
    "autoscaling",
    "cloudwatch",
    "ec2",
    "ecr",
    "events",
    "iam",
    "kms",
    "s3",
    "secretsmanager",
    "sns",
    "sqs",
    "ssm",
    "sts",
)
"""Services that this layer calls, by their names in the provider's endpoint table."""


def declare() -> None:
    """Declare the foundation of the current stack."""
    settings = config.read(pulumi.get_stack(), *_raw_config())
    stack = pulumi.Config()
    secrets = {key: stack.require_secret(key) for key in settings.secret_keys}
    Foundation(settings, secrets).export()


def _raw_config() -> tuple[dict[str, str], frozenset[str]]:
    """Every value of the stack with its namespace, and the keys of those that are encrypted.

    `pulumi.Config` can only be asked for keys one knows; refusing unknown ones needs them all.
    """
    values = {**runtime_config.get_config_env(), **runtime_config.CONFIG.get()}
    encrypted = {
        *runtime_config.get_config_secret_keys_env(),
        *(k for k in values if runtime_config.is_config_secret(k)),
    }
    return values, frozenset(encrypted)


def provider(settings: FoundationConfig, region: str) -> aws.Provider:
    """The provider of a region: refuses any account but the stack's, and goes nowhere else on an emulator."""
    if settings.emulator is None:
        return aws.Provider(f"aws-{region}", region=region, allowed_account_ids=[settings.account])
    endpoint = settings.emulator.endpoint
    return aws.Provider(
        f"aws-{region}",
        region=region,
        access_key="test",
        secret_key="test",  # noqa: S106 -- the emulator takes anything
        skip_credentials_validation=True,
        skip_metadata_api_check=True,
        s3_use_path_style=True,
        endpoints=[aws.ProviderEndpointArgs(**dict.fromkeys(EMULATED_SERVICES, endpoint))],
    )


class Foundation:
    """The whole of one stack, in the order in which its parts need each other."""

    def __init__(self, settings: FoundationConfig, secrets: Mapping[str, Output[str]]) -> None:
        self.settings = settings
        self.secrets = secrets
        self.scope = Scope(settings.names, settings.account)
        regions = dict.fromkeys(c.site.region for c in settings.clouds)
        if settings.storage.replica_region is not None:
            regions[settings.storage.replica_region] = None
        self.providers = {region: provider(settings, region) for region in regions}
        main = self._in(settings.storage.region)
        self.alarms = Alarms("alarms", AlarmsArgs(settings, self.scope), main)
        replica = settings.storage.replica_region
        self.storage = Storage(
            "storage",
            StorageArgs(
                settings,
                self.scope,
                [c.site.region for c in settings.clouds],
                self.providers[replica] if replica is not None else None,
            ),
            main,
        )
        self.networks: dict[str, cloud.Network] = {}
        self.notices: dict[str, cloud.Notices] = {}
        self.identities: dict[str, cloud.NodeIdentity] = {}
        self.registries: dict[str, Registry] = {}
        self.connections: list[Connection] = []
        for site in settings.clouds:
            self._cloud(site)
        self.identity = Identity(
            "identity",
            IdentityArgs(
                settings,
                self.scope,
                [(self._region(g.site), cloud.group_name(self.scope, g)) for g in settings.node_groups],
                [
                    self.scope.arn("sqs", c.site.region, settings.names.of(f"{c.site.name}-notices"))
                    for c in settings.clouds
                ],
            ),
            main,
        )
        self.onprem = OnPrem(
            settings.home.name,
            OnPremArgs(
                settings,
                secrets["k3s-server-token"],
                secrets["k3s-agent-token"],
                secrets.get("ssh-private-key"),
                self._snapshot_files(),
            ),
        )

    def _in(self, region: str) -> ResourceOptions:
        return ResourceOptions(providers=[self.providers[region]])

    def _region(self, site: str) -> str:
        return next(c.site.region for c in self.settings.clouds if c.site.name == site)

    def _cloud(self, site: CloudSite) -> None:
        settings, scope, name = self.settings, self.scope, site.site.name
        here = self._in(site.site.region)
        groups = [g for g in settings.node_groups if g.site == name]
        # By way of the policy, which must let the log service in before the flow log asks to write.
        logs = Output.concat("arn:aws:s3:::", self.storage.buckets[DataClass.LOGS].policy.bucket)
        network = cloud.Network(name, cloud.NetworkArgs(settings, scope, site, logs), here)
        subnets = [s.id for s in network.private_subnets]
        identity = cloud.NodeIdentity(
            name, cloud.NodeIdentityArgs(settings, scope, site, groups, self.secrets["k3s-agent-token"]), here
        )
        for group in groups:
            cloud.Nodes(
                group.name,
                cloud.NodesArgs(settings, scope, site, group, subnets, network.node_group_id, identity),
                here,
            )
        gateway = Gateway(name, GatewayArgs(settings, site.site, network.vpc.id, network.route_tables, subnets), here)
        for link in (link for link in settings.links if link.cloud == site.site):
            psks = (self.secrets[link.psk_keys[0]], self.secrets[link.psk_keys[1]])
            args = ConnectionArgs(settings, link, gateway, psks, self.alarms.topic.arn)
            self.connections.append(Connection(link.name, args, here))
        self.networks[name], self.identities[name] = network, identity
        self.notices[name] = cloud.Notices(name, cloud.NoticesArgs(settings, scope, site, groups), here)
        self.registries[name] = Registry(name, RegistryArgs(settings, name), here)

    def _snapshot_files(self) -> Output[list[File]]:
        """The servers' files that copy etcd snapshots to S3; none without certificates to do it with."""
        anchor, profile = self.identity.trust_anchor_arn, self.identity.profile_arn
        if anchor is None or profile is None:
            return Output.from_input([])
        region = self.settings.storage.region
        network = next(self.networks[c.site.name] for c in self.settings.clouds if c.site.region == region)
        bucket = self.scope.bucket(DataClass.SNAPSHOTS)
        role = self.scope.role_arn(Role.BACKUP.value)

        def files(values: Sequence[str]) -> list[File]:
            anchor_arn, profile_arn, endpoint = values
            return list(
                cluster.snapshot_files(
                    bucket=bucket,
                    key_alias=self.scope.key_alias("snapshots"),
                    endpoint=endpoint,
                    region=region,
                    profile=cluster.roles_anywhere_profile(
                        name=Role.BACKUP.value, trust_anchor=anchor_arn, profile=profile_arn, role=role
                    ),
                )
            )

        return Output.all(anchor, profile, network.s3_endpoint_url).apply(files)

    def _vpn_files(self) -> Output[str]:
        """Every private router's files, by site, as one JSON document. A secret: it holds the tunnels' keys."""
        settings = self.settings
        private = [s for s in settings.sites if not s.is_cloud]

        def build(values: Sequence[Any]) -> str:
            endpoints = [e for pair in values for e in pair]
            documents = {
                site.name: render.files(
                    site,
                    [e for e in endpoints if e.link.private == site],
                    settings.vpn.transport,
                    reachable=[s.cidr for s in settings.sites if s != site],
                    nat_traversal=settings.vpn.nat_traversal,
                )
                for site in private
            }
            return json.dumps(documents, sort_keys=True)

        return Output.secret(Output.all(*(c.endpoints for c in self.connections)).apply(build))

    def _site(self, name: str) -> SiteOutputs:
        settings = self.settings
        site = next(s for s in settings.sites if s.name == name)
        labels = site.labels()
        common = SiteOutputs(site.name, site.kind.value, site.region, str(site.cidr), labels)
        if not site.is_cloud:
            return common
        # A cloud node's zone is its own.
        del labels["topology.kubernetes.io/zone"]
        network = self.networks[name]
        # Outputs stand where values will be: see the module's docstring of infra.outputs.
        values: dict[str, Any] = {
            "vpc_id": network.vpc.id,
            "private_subnet_ids": tuple(s.id for s in network.private_subnets),
            "s3_endpoint_url": network.s3_endpoint_url,
            "queue_url": self.notices[name].queue.url,
            "agent_token_secret_arn": self.identities[name].secret_arn,
            "repositories": dict(self.registries[name].urls),
        }
        groups = tuple(
            NodeGroupOutputs(g.name, cloud.group_name(self.scope, g), g.minimum, g.maximum, g.types[0].gpus)
            for g in settings.node_groups
            if g.site == name
        )
        return dataclasses.replace(common, labels=labels, node_groups=groups, **values)

    def export(self) -> None:
        """Export everything the apps layer may build on."""
        settings, identity = self.settings, self.identity
        values: dict[str, Any] = {
            "trust_anchor_arn": identity.trust_anchor_arn,
            "roles_anywhere_profile_arn": identity.profile_arn,
            "alarm_topic_arn": self.alarms.topic.arn,
            "buckets": {d.value: b.bucket.bucket for d, b in self.storage.buckets.items()},
            "roles": {r.value: resource.arn for r, resource in identity.roles.items()},
            "kubeconfig": self.onprem.kubeconfig,
            "vpn_files": self._vpn_files(),
        }
        outputs.export(
            FoundationOutputs(
                environment=settings.environment,
                api_url=f"https://{settings.k3s.api}:{cluster.API_PORT}",
                pod_cidr=str(settings.network.pods),
                service_cidr=str(settings.network.services),
                pod_mtu=vpn_plan.pod_mtu(settings.network.mtu),
                sites=tuple(self._site(s.name) for s in settings.sites),
                **values,
            ),
            pulumi.export,
        )
