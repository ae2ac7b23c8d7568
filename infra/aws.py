"""A cloud site: its VPC, the doors in and out of it, its GPU node groups, and the notices that AWS sends about them.

Security groups name ranges and prefix lists, never the whole internet: what nodes need comes through endpoints and the
VPN. Knows nothing of VPN connections, buckets' contents or Kubernetes objects.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Final

import pulumi
import pulumi_aws as aws
from pulumi import Input, Output, ResourceOptions

from infra import cluster, iam, plan
from infra.config import CloudSite, Egress, FoundationConfig, NodeGroup
from infra.iam import DataClass, Scope

LAUNCH_HOOK: Final = "joined"
TERMINATE_HOOK: Final = "drained"
JOIN_SECONDS: Final = 900
"""Time a node has from launch until it answers its launch hook: driver, k3s, join."""
DRAIN_SECONDS: Final = 300

EVENTS: Final[Mapping[str, tuple[str, str]]] = {
    "spot-notice": ("aws.ec2", "EC2 Spot Instance Interruption Warning"),
    "rebalance": ("aws.ec2", "EC2 Instance Rebalance Recommendation"),
    "terminating": ("aws.autoscaling", "EC2 Instance-terminate Lifecycle Action"),
}
"""Notices that reach the queue, by the end of their rule's name: AWS takes 64 characters with environment and site."""


def token_secret_name(scope: Scope, site: str) -> str:
    """Name of the agent token in Secrets Manager."""
    return f"{scope.names.prefix}/{site}/k3s-agent-token"


def s3_url(dns_names: Sequence[str]) -> str:
    """The URL at which home reaches S3 through an interface endpoint, from the endpoint's DNS names.

    AWS lists the regional name first, as `*.vpce-...`; buckets are addressed below `bucket.`.
    """
    return f"https://bucket.{dns_names[0].removeprefix('*.')}"


@dataclasses.dataclass(frozen=True)
class NetworkArgs:
    """What a VPC is made from."""

    config: FoundationConfig
    scope: Scope
    cloud: CloudSite
    log_bucket: Input[str]
    """ARN of the bucket that flow logs go to."""


class Network(pulumi.ComponentResource):
    """A VPC with private subnets for nodes, endpoints for what they need, and an egress only if configured."""

    def __init__(self, name: str, args: NetworkArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:aws:Network", name, None, opts)
        self._args = args
        self._site = args.cloud.site
        self._cut = plan.vpc_plan(self._site)
        self._child = ResourceOptions(parent=self)
        site = self._site.name
        self.vpc = aws.ec2.Vpc(
            f"{site}-vpc",
            cidr_block=str(self._site.cidr),
            enable_dns_support=True,
            enable_dns_hostnames=True,
            tags=self._tags(site),
            opts=self._child,
        )
        # What nobody chose a group for gets one that allows nothing.
        aws.ec2.DefaultSecurityGroup(
            f"{site}-default",
            vpc_id=self.vpc.id,
            ingress=[],
            egress=[],
            tags=self._tags(f"{site}-default"),
            opts=self._child,
        )
        self.private_subnets = [
            aws.ec2.Subnet(
                f"{site}-{subnet.name}",
                vpc_id=self.vpc.id,
                cidr_block=str(subnet.cidr),
                availability_zone=subnet.zone,
                map_public_ip_on_launch=False,
                tags=self._tags(f"{site}-{subnet.name}"),
                opts=self._child,
            )
            for subnet in self._cut.private
        ]
        self.route_tables = [self._table(subnet.zone) for subnet in self._cut.private]
        for subnet, resource, table in zip(self._cut.private, self.private_subnets, self.route_tables, strict=True):
            aws.ec2.RouteTableAssociation(
                f"{site}-{subnet.name}", subnet_id=resource.id, route_table_id=table.id, opts=self._child
            )
        if args.cloud.egress is not Egress.NONE:
            self._nat()
        aws.ec2.FlowLog(
            f"{site}-flow-log",
            vpc_id=self.vpc.id,
            traffic_type="ALL",
            log_destination_type="s3",
            log_destination=Output.concat(args.log_bucket, "/vpc/"),
            max_aggregation_interval=60,
            tags=self._tags(f"{site}-flow-log"),
            opts=self._child,
        )
        self.s3_gateway = self._s3_gateway()
        self.node_group_id = self._node_security_group().id
        self.s3_endpoint_url = self._interface_endpoints()
        self.register_outputs({"vpcId": self.vpc.id})

    def _tags(self, name: str) -> dict[str, str]:
        return self._args.config.names.tags(name, site=self._site.name)

    def _table(self, zone: str) -> aws.ec2.RouteTable:
        name = f"{self._site.name}-private-{zone}"
        return aws.ec2.RouteTable(name, vpc_id=self.vpc.id, tags=self._tags(name), opts=self._child)

    def _nat(self) -> None:
        """A way out through address translation; what may use it is the security group's decision."""
        site = self._site.name
        internet = aws.ec2.InternetGateway(
            f"{site}-internet", vpc_id=self.vpc.id, tags=self._tags(f"{site}-internet"), opts=self._child
        )
        public = aws.ec2.RouteTable(
            f"{site}-public", vpc_id=self.vpc.id, tags=self._tags(f"{site}-public"), opts=self._child
        )
        aws.ec2.Route(
            f"{site}-public-internet",
            route_table_id=public.id,
            destination_cidr_block="0.0.0.0/0",
            gateway_id=internet.id,
            opts=self._child,
        )
        single = self._args.cloud.egress is Egress.NAT_SINGLE
        gateways = []
        for subnet in self._cut.public[: 1 if single else None]:
            resource = aws.ec2.Subnet(
                f"{site}-{subnet.name}",
                vpc_id=self.vpc.id,
                cidr_block=str(subnet.cidr),
                availability_zone=subnet.zone,
                map_public_ip_on_launch=False,
                tags=self._tags(f"{site}-{subnet.name}"),
                opts=self._child,
            )
            aws.ec2.RouteTableAssociation(
                f"{site}-{subnet.name}", subnet_id=resource.id, route_table_id=public.id, opts=self._child
            )
            address = aws.ec2.Eip(
                f"{site}-nat-{subnet.zone}",
                domain="vpc",
                tags=self._tags(f"{site}-nat-{subnet.zone}"),
                opts=ResourceOptions(parent=self, depends_on=[internet]),
            )
            gateways.append(
                aws.ec2.NatGateway(
                    f"{site}-nat-{subnet.zone}",
                    allocation_id=address.id,
                    subnet_id=resource.id,
                    tags=self._tags(f"{site}-nat-{subnet.zone}"),
                    opts=ResourceOptions(parent=self, depends_on=[internet]),
                )
            )
        for index, (subnet, table) in enumerate(zip(self._cut.private, self.route_tables, strict=True)):
            aws.ec2.Route(
                f"{site}-nat-{subnet.zone}",
                route_table_id=table.id,
                destination_cidr_block="0.0.0.0/0",
                nat_gateway_id=gateways[0 if single else index].id,
                opts=self._child,
            )

    def _s3_gateway(self) -> aws.ec2.VpcEndpoint:
        site = self._site
        buckets = [self._args.scope.bucket(c) for c in DataClass]
        return aws.ec2.VpcEndpoint(
            f"{site.name}-s3-gateway",
            vpc_id=self.vpc.id,
            service_name=f"com.amazonaws.{site.region}.s3",
            vpc_endpoint_type="Gateway",
            route_table_ids=[t.id for t in self.route_tables],
            policy=iam.s3_endpoint_policy(buckets, images=site.region),
            tags=self._tags(f"{site.name}-s3-gateway"),
            opts=ResourceOptions(parent=self, ignore_changes=self._args.config.emulator_forgets("policy")),
        )

    def _security_group(
        self,
        name: str,
        description: str,
        ingress: Sequence[aws.ec2.SecurityGroupIngressArgs],
        egress: Sequence[aws.ec2.SecurityGroupEgressArgs],
    ) -> aws.ec2.SecurityGroup:
        full = f"{self._site.name}-{name}"
        return aws.ec2.SecurityGroup(
            full,
            name=self._args.config.names.of(full),
            description=description,
            vpc_id=self.vpc.id,
            ingress=list(ingress),
            egress=list(egress),
            tags=self._tags(full),
            opts=self._child,
        )

    def _node_security_group(self) -> aws.ec2.SecurityGroup:
        config = self._args.config
        home = [str(config.home.cidr)]
        others = [str(s.cidr) for s in config.sites if s != self._site]
        vpc = [str(self._site.cidr)]
        out: list[tuple[str, str, int, list[str]]] = [
            ("Kubernetes API at home", "tcp", cluster.API_PORT, home),
            ("Overlay to nodes of other sites", "udp", cluster.VXLAN_PORT, others),
            ("Endpoints in the VPC", "tcp", 443, vpc),
            ("VPC resolver", "udp", 53, [f"{self._cut.resolver}/32"]),
            ("VPC resolver", "tcp", 53, [f"{self._cut.resolver}/32"]),
        ]
        if self._args.cloud.egress_cidrs:
            out.append(("Configured ranges outside", "tcp", 443, [str(c) for c in self._args.cloud.egress_cidrs]))
        egress = [
            aws.ec2.SecurityGroupEgressArgs(
                description=description, protocol=protocol, from_port=port, to_port=port, cidr_blocks=ranges
            )
            for description, protocol, port, ranges in out
        ]
        egress += [
            aws.ec2.SecurityGroupEgressArgs(
                description="Overlay between nodes here",
                protocol="udp",
                from_port=cluster.VXLAN_PORT,
                to_port=cluster.VXLAN_PORT,
                self=True,
            ),
            # S3 in the region.
            aws.ec2.SecurityGroupEgressArgs(
                protocol="tcp",
                from_port=443,
                to_port=443,
                prefix_list_ids=[self.s3_gateway.prefix_list_id],
            ),
        ]
        return self._security_group(
            "nodes",
            "GPU nodes: the overlay, and the kubelet for home",
            [
                aws.ec2.SecurityGroupIngressArgs(
                    description="Overlay from nodes of other sites",
                    protocol="udp",
                    from_port=cluster.VXLAN_PORT,
                    to_port=cluster.VXLAN_PORT,
                    cidr_blocks=others,
                ),
                aws.ec2.SecurityGroupIngressArgs(
                    description="Overlay between nodes here",
                    protocol="udp",
                    from_port=cluster.VXLAN_PORT,
                    to_port=cluster.VXLAN_PORT,
                    self=True,
                ),
                aws.ec2.SecurityGroupIngressArgs(
                    description="Kubelet from the control plane at home",
                    protocol="tcp",
                    from_port=cluster.KUBELET_PORT,
                    to_port=cluster.KUBELET_PORT,
                    cidr_blocks=home,
                ),
            ],
            egress,
        )

    def _interface_endpoints(self) -> Output[str]:
        """S3 for home over the VPN, and the configured services for nodes. The URL is S3's, as home sees it."""
        site, config = self._site, self._args.config
        private = [str(s.cidr) for s in config.sites if not s.is_cloud]

        def https(description: str, ranges: list[str]) -> aws.ec2.SecurityGroupIngressArgs:
            return aws.ec2.SecurityGroupIngressArgs(
                description=description, protocol="tcp", from_port=443, to_port=443, cidr_blocks=ranges
            )

        from_home = self._security_group("s3-endpoint", "S3 over the VPN", [https("Private sites", private)], [])
        from_vpc = self._security_group("endpoints", "AWS services", [https("The VPC", [str(site.cidr)])], [])

        def endpoint(
            service: str, group: aws.ec2.SecurityGroup, *, own_names: bool, policy: str | None
        ) -> aws.ec2.VpcEndpoint:
            return aws.ec2.VpcEndpoint(
                f"{site.name}-{service}",
                vpc_id=self.vpc.id,
                service_name=f"com.amazonaws.{site.region}.{service}",
                vpc_endpoint_type="Interface",
                subnet_ids=[s.id for s in self.private_subnets],
                security_group_ids=[group.id],
                private_dns_enabled=own_names,
                policy=policy,
                tags=self._tags(f"{site.name}-{service}"),
                opts=ResourceOptions(parent=self, ignore_changes=config.emulator_forgets("policy")),
            )

        # The gateway endpoint answers S3's own names inside the VPC; home uses the endpoint's names instead.
        buckets = [self._args.scope.bucket(c) for c in DataClass]
        s3 = endpoint("s3", from_home, own_names=False, policy=iam.s3_endpoint_policy(buckets))
        for service in self._args.cloud.endpoints:
            endpoint(service, from_vpc, own_names=True, policy=None)
        if config.emulator is not None:
            return Output.from_input(config.emulator.endpoint)
        return s3.dns_entries.apply(lambda entries: s3_url([e.dns_name or "" for e in entries]))


@dataclasses.dataclass(frozen=True)
class NoticesArgs:
    """What the notices of a cloud site are made from."""

    config: FoundationConfig
    scope: Scope
    cloud: CloudSite
    groups: Sequence[NodeGroup]


class Notices(pulumi.ComponentResource):
    """EventBridge rules that put spot, rebalance and termination notices into the queue of the spot handler."""

    def __init__(self, name: str, args: NoticesArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:aws:Notices", name, None, opts)
        child = ResourceOptions(parent=self)
        site = args.cloud.site
        names = args.config.names
        full = f"{site.name}-notices"
        dead = aws.sqs.Queue(
            f"{full}-dead",
            name=names.of(f"{full}-dead"),
            message_retention_seconds=14 * 86_400,
            sqs_managed_sse_enabled=True,
            tags=names.tags(f"{full}-dead", site=site.name),
            opts=child,
        )
        self.queue = aws.sqs.Queue(
            full,
            name=names.of(full),
            # A spot notice is worth two minutes; the queue outlives a restart of its reader, not more.
            message_retention_seconds=3_600,
            visibility_timeout_seconds=60,
            receive_wait_time_seconds=20,
            sqs_managed_sse_enabled=True,
            redrive_policy=dead.arn.apply(lambda arn: json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 5})),
            tags=names.tags(full, site=site.name),
            opts=child,
        )
        rules = []
        for event, (source, detail_type) in EVENTS.items():
            rule = aws.cloudwatch.EventRule(
                f"{site.name}-{event}",
                name=names.of(site.name, event),
                description=f"{detail_type}, for the spot handler",
                event_pattern=json.dumps(self._pattern(args, source, detail_type), sort_keys=True),
                tags=names.tags(f"{site.name}-{event}", site=site.name),
                opts=child,
            )
            rules.append(rule)
        policy = aws.sqs.QueuePolicy(
            full,
            queue_url=self.queue.url,
            policy=Output.all(self.queue.arn, *(r.arn for r in rules)).apply(
                lambda arns: iam.queue_policy(arns[0], arns[1:])
            ),
            opts=child,
        )
        for event, rule in zip(EVENTS, rules, strict=True):
            aws.cloudwatch.EventTarget(
                f"{site.name}-{event}",
                rule=rule.name,
                target_id="queue",
                arn=self.queue.arn,
                opts=ResourceOptions(parent=self, depends_on=[policy]),
            )
        aws.ssm.Parameter(
            full,
            name=names.path(site.name, "notices"),
            description="URL of the queue with spot, rebalance and termination notices",
            type="String",
            value=self.queue.url,
            tags=names.tags(full, site=site.name),
            opts=child,
        )
        self.register_outputs({"queueUrl": self.queue.url})

    @staticmethod
    def _pattern(args: NoticesArgs, source: str, detail_type: str) -> dict[str, object]:
        pattern: dict[str, object] = {"source": [source], "detail-type": [detail_type]}
        if source == "aws.autoscaling":
            names = [group_name(args.scope, g) for g in args.groups]
            pattern["detail"] = {"AutoScalingGroupName": names}
        return pattern


def group_name(scope: Scope, group: NodeGroup) -> str:
    """Name of a node group's Auto Scaling group."""
    return scope.names.of(group.site, group.name)


@dataclasses.dataclass(frozen=True)
class NodeIdentityArgs:
    """What the nodes of one site share."""

    config: FoundationConfig
    scope: Scope
    cloud: CloudSite
    groups: Sequence[NodeGroup]
    agent_token: Output[str]
    """The k3s agent-only token, a secret."""


class NodeIdentity(pulumi.ComponentResource):
    """The role of a site's GPU nodes, the key of their volumes, and the token that only this role may read."""

    def __init__(self, name: str, args: NodeIdentityArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:aws:NodeIdentity", name, None, opts)
        child = ResourceOptions(parent=self)
        names, site, scope = args.config.names, args.cloud.site, args.scope
        full = f"nodes-{site.name}"
        throw_away = args.config.storage.force_destroy
        self.key = aws.kms.Key(
            full,
            description=f"Volumes and join token of GPU nodes at {site.name}",
            enable_key_rotation=True,
            deletion_window_in_days=7 if throw_away else 30,
            policy=iam.autoscaling_key_policy(args.config.account),
            tags=names.tags(full, site=site.name),
            opts=child,
        )
        aws.kms.Alias(full, name=scope.key_alias(full), target_key_id=self.key.id, opts=child)
        secret = aws.secretsmanager.Secret(
            f"{site.name}-agent-token",
            name=token_secret_name(scope, site.name),
            description="k3s agent-only token: lets a machine join as an agent, never as a server",
            kms_key_id=self.key.arn,
            recovery_window_in_days=0 if throw_away else 7,
            tags=names.tags(f"{site.name}-agent-token", site=site.name),
            opts=child,
        )
        self.token = aws.secretsmanager.SecretVersion(
            f"{site.name}-agent-token", secret_id=secret.id, secret_string=args.agent_token, opts=child
        )
        self.secret_arn = secret.arn
        role = aws.iam.Role(
            full,
            name=scope.role_name(full),
            description=f"GPU nodes at {site.name}",
            assume_role_policy=iam.trust_service("ec2.amazonaws.com"),
            tags=names.tags(full, site=site.name),
            opts=child,
        )
        self.policy = aws.iam.RolePolicy(
            full,
            name="node",
            role=role.name,
            policy=iam.node(
                scope,
                site.region,
                site=site.name,
                token_secret=token_secret_name(scope, site.name),
                groups=[group_name(scope, g) for g in args.groups],
            ),
            opts=child,
        )
        self.profile = aws.iam.InstanceProfile(
            full, name=scope.role_name(full), role=role.name, tags=names.tags(full, site=site.name), opts=child
        )
        self.register_outputs({"profileArn": self.profile.arn})


@dataclasses.dataclass(frozen=True)
class NodesArgs:
    """What one GPU node group is made from."""

    config: FoundationConfig
    scope: Scope
    cloud: CloudSite
    group: NodeGroup
    subnets: Sequence[Input[str]]
    security_group: Input[str]
    identity: NodeIdentity


class Nodes(pulumi.ComponentResource):
    """One Auto Scaling group of GPU nodes that join the cluster by themselves, and are replaced when they cannot."""

    def __init__(self, name: str, args: NodesArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:aws:Nodes", name, None, opts)
        self._args = args
        self._child = ResourceOptions(parent=self)
        group, names = args.group, args.config.names
        full = f"{group.site}-{group.name}"
        self.group_name = group_name(args.scope, group)
        template = self._template(full)
        refresh = aws.autoscaling.GroupInstanceRefreshArgs(
            strategy="Rolling",
            preferences=aws.autoscaling.GroupInstanceRefreshPreferencesArgs(
                # A new node first, then an old one goes: GPUs that serve are never fewer than wanted.
                min_healthy_percentage=100,
                max_healthy_percentage=150,
                # AWS cannot roll back to a template whose image is an SSM parameter, and refuses to promise it.
                auto_rollback=group.image_id is not None,
                instance_warmup="300",
                skip_matching=True,
            ),
        )
        plain = aws.autoscaling.GroupLaunchTemplateArgs(id=template.id, version=template.latest_version.apply(str))
        self.group = aws.autoscaling.Group(
            full,
            name=self.group_name,
            min_size=group.minimum,
            max_size=group.maximum,
            desired_capacity=group.minimum,
            vpc_zone_identifiers=list(args.subnets),
            launch_template=None if group.is_mixed else plain,
            mixed_instances_policy=self._mixed(template) if group.is_mixed else None,
            warm_pool=None if group.is_mixed else self._warm_pool(),
            # Rebalance recommendations come before the two-minute notice; a warm pool has no spot.
            capacity_rebalance=group.is_mixed,
            # In the group itself, so that not even its first instance goes without.
            initial_lifecycle_hooks=[
                aws.autoscaling.GroupInitialLifecycleHookArgs(
                    name=LAUNCH_HOOK,
                    lifecycle_transition="autoscaling:EC2_INSTANCE_LAUNCHING",
                    heartbeat_timeout=JOIN_SECONDS,
                    default_result="ABANDON",
                ),
                aws.autoscaling.GroupInitialLifecycleHookArgs(
                    name=TERMINATE_HOOK,
                    lifecycle_transition="autoscaling:EC2_INSTANCE_TERMINATING",
                    heartbeat_timeout=DRAIN_SECONDS,
                    default_result="CONTINUE",
                ),
            ],
            instance_refresh=refresh,
            health_check_type="EC2",
            health_check_grace_period=JOIN_SECONDS,
            # Nodes can join only once the tunnels are up, and those need the private router: never wait for them here.
            wait_for_capacity_timeout="0",
            force_delete=args.config.storage.force_destroy,
            tags=[
                aws.autoscaling.GroupTagArgs(key=k, value=v, propagate_at_launch=True)
                for k, v in {**names.tags(full, site=group.site), **autoscaler_tags(args.config, group)}.items()
            ],
            opts=ResourceOptions(
                parent=self,
                # The autoscaler's from the first minute on.
                ignore_changes=["desiredCapacity"],
                depends_on=[args.identity.policy, args.identity.token],
            ),
        )
        self.register_outputs({"groupName": self.group.name})

    def _template(self, full: str) -> aws.ec2.LaunchTemplate:
        args, group = self._args, self._args.group
        names, site = args.config.names, args.cloud.site
        facts = cluster.JoinFacts(
            region=site.region,
            group=self.group_name,
            launch_hook=LAUNCH_HOOK,
            token_secret=token_secret_name(args.scope, site.name),
            artefacts=args.scope.bucket(DataClass.ARTEFACTS),
            aws_endpoint=args.config.emulator.endpoint if args.config.emulator else None,
        )
        text = cluster.user_data(args.config, site, group, facts)
        tags = {**names.tags(full, site=site.name), "rankbridge.io/node-group": group.name}
        return aws.ec2.LaunchTemplate(
            full,
            name=names.of(full),
            description=f"GPU node of {group.name} at {site.name}",
            update_default_version=True,
            image_id=group.image_id or f"resolve:ssm:{group.image_parameter}",
            instance_type=group.types[0].name,
            iam_instance_profile=aws.ec2.LaunchTemplateIamInstanceProfileArgs(arn=args.identity.profile.arn),
            metadata_options=aws.ec2.LaunchTemplateMetadataOptionsArgs(
                http_endpoint="enabled",
                http_tokens="required",
                # Pods are one hop further than the host, and the node's role is not theirs.
                http_put_response_hop_limit=1,
                instance_metadata_tags="disabled",
            ),
            network_interfaces=[
                aws.ec2.LaunchTemplateNetworkInterfaceArgs(
                    device_index=0,
                    associate_public_ip_address="false",
                    delete_on_termination="true",
                    security_groups=[args.security_group],
                )
            ],
            block_device_mappings=[
                aws.ec2.LaunchTemplateBlockDeviceMappingArgs(
                    device_name=group.root_device,
                    ebs=aws.ec2.LaunchTemplateBlockDeviceMappingEbsArgs(
                        volume_type="gp3",
                        volume_size=group.volume_gib,
                        encrypted="true",
                        kms_key_id=args.identity.key.arn,
                        delete_on_termination="true",
                    ),
                )
            ],
            monitoring=aws.ec2.LaunchTemplateMonitoringArgs(enabled=True),
            user_data=base64.b64encode(text.encode()).decode(),
            tag_specifications=[
                aws.ec2.LaunchTemplateTagSpecificationArgs(resource_type=kind, tags=tags)
                for kind in ("instance", "volume", "network-interface")
            ],
            tags=tags,
            opts=ResourceOptions(parent=self, ignore_changes=args.config.emulator_forgets("tagSpecifications")),
        )

    def _mixed(self, template: aws.ec2.LaunchTemplate) -> aws.autoscaling.GroupMixedInstancesPolicyArgs:
        group = self._args.group
        return aws.autoscaling.GroupMixedInstancesPolicyArgs(
            instances_distribution=aws.autoscaling.GroupMixedInstancesPolicyInstancesDistributionArgs(
                on_demand_allocation_strategy="prioritized",
                on_demand_base_capacity=group.on_demand_base,
                on_demand_percentage_above_base_capacity=100 - group.spot_percent,
                spot_allocation_strategy="price-capacity-optimized",
            ),
            launch_template=aws.autoscaling.GroupMixedInstancesPolicyLaunchTemplateArgs(
                launch_template_specification=aws.autoscaling.GroupMixedInstancesPolicyLaunchTemplateLaunchTemplateSpecificationArgs(
                    launch_template_id=template.id, version=template.latest_version.apply(str)
                ),
                overrides=[
                    aws.autoscaling.GroupMixedInstancesPolicyLaunchTemplateOverrideArgs(instance_type=t.name)
                    for t in group.types
                ],
            ),
        )

    def _warm_pool(self) -> aws.autoscaling.GroupWarmPoolArgs:
        group = self._args.group
        return aws.autoscaling.GroupWarmPoolArgs(
            pool_state="Stopped", min_size=group.warm_pool, max_group_prepared_capacity=group.maximum + group.warm_pool
        )


def autoscaler_tags(config: FoundationConfig, group: NodeGroup) -> dict[str, str]:
    """What cluster-autoscaler reads to find the group, and to know its nodes while it has none."""
    base = "k8s.io/cluster-autoscaler"
    site = next(s for s in config.sites if s.name == group.site)
    key, _, effect = cluster.GPU_TAINT.partition("=")
    labels = cluster.node_labels(site, group)
    return {
        f"{base}/enabled": "true",
        f"{base}/{config.names.prefix}": "owned",
        f"{base}/node-template/resources/nvidia.com/gpu": str(group.types[0].gpus),
        f"{base}/node-template/taint/{key}": effect,
        **{f"{base}/node-template/label/{k}": v for k, v in labels.items()},
    }
