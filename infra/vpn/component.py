"""AWS's end of the VPN: the gateway of a cloud site and, for each private site, a connection of two tunnels.

The private end is files (`infra.vpn.render`); this module hands them what only AWS knows. Tunnel keys come in and leave
as secrets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import pulumi
import pulumi_aws as aws
from pulumi import Input, Output, ResourceOptions

from infra.config import Attach, FoundationConfig, Routes
from infra.plan import Site
from infra.vpn import render
from infra.vpn.plan import Cipher, DhGroup, Link, Transport

AWS_CIPHER: Final = {Cipher.AES128_GCM: "AES128-GCM-16", Cipher.AES256_GCM: "AES256-GCM-16"}
AWS_INTEGRITY: Final = {DhGroup.P256: "SHA2-256", DhGroup.P384: "SHA2-384", DhGroup.P521: "SHA2-512"}
"""In IKE, where the cipher authenticates itself, AWS takes the pseudo-random function from here."""

DPD_SECONDS: Final = 30
"""The least that AWS takes."""
FOUR_BYTE_LIMIT: Final = 2_147_483_647
"""Above it AWS wants the ASN in another field."""

_OPTIONS: Final = (
    "InsideCidr",
    "PresharedKey",
    "IkeVersions",
    "Phase1DhGroupNumbers",
    "Phase1EncryptionAlgorithms",
    "Phase1IntegrityAlgorithms",
    "Phase1LifetimeSeconds",
    "Phase2DhGroupNumbers",
    "Phase2EncryptionAlgorithms",
    "Phase2IntegrityAlgorithms",
    "Phase2LifetimeSeconds",
    "DpdTimeoutAction",
    "DpdTimeoutSeconds",
    "StartupAction",
)


@dataclasses.dataclass(frozen=True)
class GatewayArgs:
    """What a cloud site's VPN gateway is made from."""

    config: FoundationConfig
    site: Site
    vpc_id: Input[str]
    route_tables: Sequence[aws.ec2.RouteTable]
    subnets: Sequence[Input[str]]


class Gateway(pulumi.ComponentResource):
    """Where VPN connections end in a cloud site, and how the site's route tables learn of the private ranges."""

    def __init__(self, name: str, args: GatewayArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:vpn:Gateway", name, None, opts)
        child = ResourceOptions(parent=self)
        site, names = args.site, args.config.names
        tags = names.tags(f"{site.name}-vpn", site=site.name)
        self.vpn_gateway: aws.ec2.VpnGateway | None = None
        self.transit_gateway: aws.ec2transitgateway.TransitGateway | None = None
        if args.config.vpn.attach is Attach.VIRTUAL_PRIVATE_GATEWAY:
            gateway = aws.ec2.VpnGateway(
                f"{site.name}-vpn",
                vpc_id=args.vpc_id,
                amazon_side_asn=str(site.asn),
                tags=tags,
                opts=ResourceOptions(parent=self, ignore_changes=args.config.emulator_forgets("availabilityZone")),
            )
            self.vpn_gateway = gateway
            for zone, table in zip(site.zones, args.route_tables, strict=True):
                if args.config.vpn.routes is Routes.PROPAGATED:
                    aws.ec2.VpnGatewayRoutePropagation(
                        f"{site.name}-{zone}", vpn_gateway_id=gateway.id, route_table_id=table.id, opts=child
                    )
                else:
                    self._static(args, zone, table, gateway_id=gateway.id)
        else:
            transit = aws.ec2transitgateway.TransitGateway(
                f"{site.name}-vpn",
                description=f"VPN connections of {site.name}",
                amazon_side_asn=site.asn,
                # Both tunnels carry traffic.
                vpn_ecmp_support="enable",
                tags=tags,
                opts=child,
            )
            self.transit_gateway = transit
            attachment = aws.ec2transitgateway.VpcAttachment(
                f"{site.name}-vpc",
                transit_gateway_id=transit.id,
                vpc_id=args.vpc_id,
                subnet_ids=list(args.subnets),
                tags=names.tags(f"{site.name}-vpc-attachment", site=site.name),
                opts=child,
            )
            # A VPC's route tables learn nothing from a transit gateway by themselves.
            for zone, table in zip(site.zones, args.route_tables, strict=True):
                self._static(args, zone, table, transit_gateway_id=transit.id, after=attachment)
        self.register_outputs({})

    def _static(
        self,
        args: GatewayArgs,
        zone: str,
        table: aws.ec2.RouteTable,
        *,
        gateway_id: Input[str] | None = None,
        transit_gateway_id: Input[str] | None = None,
        after: pulumi.Resource | None = None,
    ) -> None:
        for private in (s for s in args.config.sites if not s.is_cloud):
            aws.ec2.Route(
                f"{args.site.name}-{zone}-to-{private.name}",
                route_table_id=table.id,
                destination_cidr_block=str(private.cidr),
                gateway_id=gateway_id,
                transit_gateway_id=transit_gateway_id,
                opts=ResourceOptions(parent=self, depends_on=[after] if after else None),
            )


@dataclasses.dataclass(frozen=True)
class ConnectionArgs:
    """What one link is made from."""

    config: FoundationConfig
    link: Link
    gateway: Gateway
    psks: tuple[Output[str], Output[str]]
    """Pre-shared keys of both tunnels, secrets."""
    alarm_topic: Input[str]


class Connection(pulumi.ComponentResource):
    """A VPN connection with both tunnels alike, and an alarm for each."""

    def __init__(self, name: str, args: ConnectionArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:vpn:Connection", name, None, opts)
        child = ResourceOptions(parent=self)
        link, names = args.link, args.config.names
        asn = str(link.private.asn)
        extended = link.private.asn > FOUR_BYTE_LIMIT
        customer = aws.ec2.CustomerGateway(
            f"{link.name}-router",
            bgp_asn=None if extended else asn,
            bgp_asn_extended=asn if extended else None,
            ip_address=str(link.private.router),
            type="ipsec.1",
            tags=names.tags(f"{link.name}-router", site=link.private.name),
            opts=child,
        )
        options: dict[str, Any] = {}
        for tunnel, psk in zip(link.tunnels, args.psks, strict=True):
            options |= tunnel_options(tunnel.number, str(tunnel.inside), psk, args.config.vpn.transport)
        self.connection = aws.ec2.VpnConnection(
            link.name,
            customer_gateway_id=customer.id,
            vpn_gateway_id=args.gateway.vpn_gateway.id if args.gateway.vpn_gateway else None,
            transit_gateway_id=args.gateway.transit_gateway.id if args.gateway.transit_gateway else None,
            type="ipsec.1",
            tags=names.tags(link.name, site=link.cloud.name),
            opts=ResourceOptions(
                parent=self,
                ignore_changes=args.config.emulator_forgets(*(f"tunnel{n}{o}" for n in (1, 2) for o in _OPTIONS)),
                additional_secret_outputs=[
                    "customerGatewayConfiguration",
                    "tunnel1PresharedKey",
                    "tunnel2PresharedKey",
                ],
            ),
            **options,
        )
        for number, address in ((1, self.connection.tunnel1_address), (2, self.connection.tunnel2_address)):
            aws.cloudwatch.MetricAlarm(
                f"{link.name}-tunnel-{number}",
                name=names.of(link.name, f"tunnel-{number}-down"),
                alarm_description=f"Tunnel {number} of {link.name} is down",
                namespace="AWS/VPN",
                metric_name="TunnelState",
                dimensions={"VpnId": self.connection.id, "TunnelIpAddress": address},
                statistic="Maximum",
                period=60,
                evaluation_periods=3,
                comparison_operator="LessThanThreshold",
                threshold=1,
                # A tunnel that reports nothing is a tunnel that is down.
                treat_missing_data="breaching",
                alarm_actions=[args.alarm_topic],
                ok_actions=[args.alarm_topic],
                tags=names.tags(f"{link.name}-tunnel-{number}-down", site=link.cloud.name),
                opts=ResourceOptions(parent=self, ignore_changes=args.config.emulator_forgets("tags", "tagsAll")),
            )
        self.endpoints = self._endpoints(args)
        self.register_outputs({"connectionId": self.connection.id})

    def _endpoints(self, args: ConnectionArgs) -> Output[tuple[render.Endpoint, render.Endpoint]]:
        """Both tunnels as the private router needs them, checked against AWS's XML where AWS is real. A secret."""
        verify, link = args.config.vpn.verify_xml, args.link

        def build(values: Sequence[Any]) -> tuple[render.Endpoint, render.Endpoint]:
            first, second, psk1, psk2, xml = values
            endpoints = render.endpoints_of(link, (first, second), (psk1, psk2))
            if verify:
                render.verify(endpoints, xml)
            return endpoints

        c = self.connection
        return Output.secret(
            Output.all(c.tunnel1_address, c.tunnel2_address, *args.psks, c.customer_gateway_configuration).apply(build)
        )


def tunnel_options(number: int, inside: str, psk: Output[str], transport: Transport) -> dict[str, Any]:
    """One tunnel's options: IKEv2, one authenticated cipher, one curve, restart on a dead peer."""
    cipher, integrity = [AWS_CIPHER[transport.cipher]], [AWS_INTEGRITY[transport.dh_group]]
    group = [int(transport.dh_group)]
    values: dict[str, Any] = {
        "inside_cidr": inside,
        "preshared_key": psk,
        "ike_versions": ["ikev2"],
        "phase1_dh_group_numbers": group,
        "phase1_encryption_algorithms": cipher,
        "phase1_integrity_algorithms": integrity,
        "phase1_lifetime_seconds": transport.ike_lifetime,
        "phase2_dh_group_numbers": group,
        "phase2_encryption_algorithms": cipher,
        "phase2_integrity_algorithms": integrity,
        "phase2_lifetime_seconds": transport.child_lifetime,
        "dpd_timeout_action": "restart",
        "dpd_timeout_seconds": DPD_SECONDS,
        "startup_action": "start",
    }
    return {f"tunnel{number}_{key}": value for key, value in values.items()}
