"""The whole program of each stack reads like the architecture."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable
from typing import Any

import pulumi
import pytest
import yaml
from botocore.session import Session

from infra import config, outputs, recording
from infra.iam import DataClass, Role
from infra.plan import FaultsError
from infra.recording import Recording, Secret
from infra.rules import UNKNOWN, evaluate
from infra.rules import foundation as rules

Record = Callable[..., Recording]
Fill = Callable[..., tuple[dict[str, str], frozenset[str]]]
STACKS = ("foundation-local", "foundation-dev", "foundation-prod")
ROUTE = "aws:ec2/route:Route"


class Counted:
    """Makes sure that what is asserted inside `apply` was asserted: the count must be what the test says."""

    def __init__(self) -> None:
        self.runs = 0

    def on(self, output: pulumi.Output[Any], check: Callable[[Any], None]) -> pulumi.Output[Any]:
        """Run `check` on a value once it is known, and count it when it passed."""

        def counted(value: object) -> object:
            check(value)
            self.runs += 1
            return value

        return output.apply(counted)


@pytest.mark.parametrize("stack", STACKS)
def test_in_a_preview_nothing_is_asked_and_what_is_secret_stays_so(recorded: Record, stack: str):
    run = recorded(stack, preview=True)
    assert run.outputs["vpn_files"] is UNKNOWN
    assert run.outputs["sites"] is UNKNOWN
    assert "vpn_files" in run.secret_outputs
    assert {r.urn for r in run.resources} == {r.urn for r in recorded(stack).resources}


@pytest.mark.parametrize("stack", STACKS)
def test_no_secret_leaves_the_program_unmarked(recorded: Record, filled: Fill, stack: str):
    values, secrets = filled(stack)
    run = recorded(stack)
    plain = json.dumps([[r.resource().inputs for r in run.resources]], default=str)
    shown = {k: v for k, v in run.outputs.items() if k not in run.secret_outputs}
    for key in secrets:
        assert values[key] not in plain, key
        assert values[key] not in json.dumps(shown, default=str), key


@pytest.mark.parametrize("stack", STACKS)
def test_every_aws_resource_has_the_provider_of_a_region(recorded: Record, stack: str):
    run = recorded(stack)
    providers = {r.urn for r in run.of("pulumi:providers:aws")}
    homeless = [
        r.urn for r in run.custom() if r.type.startswith("aws:") and r.provider.rpartition("::")[0] not in providers
    ]
    assert not homeless


def test_a_provider_refuses_every_account_but_the_stacks(recorded: Record):
    for provider in recorded("foundation-prod").of("pulumi:providers:aws"):
        assert json.loads(provider.inputs["allowedAccountIds"]) == ["111122223333"]


def test_the_emulators_provider_can_reach_nothing_else(recorded: Record):
    (provider,) = recorded("foundation-local").of("pulumi:providers:aws")
    endpoints = json.loads(provider.inputs["endpoints"])[0]
    services = {r.type.split(":")[1].split("/")[0] for r in recorded("foundation-local").custom()}
    # The provider's names for what the SDK calls otherwise.
    called = {"cloudwatch": "events"}
    assert {called.get(s, s) for s in services} | {"cloudwatch", "sts"} == set(endpoints)
    assert set(endpoints.values()) == {"http://127.0.0.1:4566"}


@pytest.mark.parametrize("stack", STACKS)
def test_every_resource_is_part_of_a_component(recorded: Record, stack: str):
    run = recorded(stack)
    components = {r.urn for r in run.resources if not r.custom}
    assert all(r.parent in components for r in run.custom())


# Network


def test_nodes_live_in_three_private_subnets_without_a_way_to_the_internet(recorded: Record):
    run = recorded("foundation-prod")
    assert [s.inputs["availabilityZone"] for s in run.of(rules.SUBNET)] == [
        "eu-central-1a",
        "eu-central-1b",
        "eu-central-1c",
    ]
    assert not run.of("aws:ec2/internetGateway:InternetGateway")
    assert not run.of(ROUTE)


def test_one_nat_gateway_serves_all_zones_where_configured(recorded: Record):
    run = recorded("foundation-dev")
    assert len(run.of("aws:ec2/natGateway:NatGateway")) == 1
    nats = [r for r in run.of(ROUTE) if "natGatewayId" in r.inputs]
    assert {r.inputs["natGatewayId"] for r in nats} == {"aws-nat-eu-central-1a-id"}
    assert len(nats) == 2


def test_each_zone_has_its_own_nat_gateway_where_configured(filled: Fill):
    def edit(decoded: dict[str, Any]) -> None:
        decoded["sites"][1]["egress"] = "nat-per-zone"
        decoded["sites"][1]["egress_cidrs"] = ["192.0.2.0/24"]

    run = recording.record("foundation-prod", *filled("foundation-prod", edit))
    assert len(run.of("aws:ec2/natGateway:NatGateway")) == 3
    nats = {r.inputs["natGatewayId"] for r in run.of(ROUTE) if "natGatewayId" in r.inputs}
    assert len(nats) == 3
    egress = run.one(rules.SECURITY_GROUP, "aws-nodes").inputs["egress"]
    assert ["192.0.2.0/24"] in [e.get("cidrBlocks") for e in egress]
    assert evaluate(rules.RULES, run.rules_view()) == []


def test_s3_has_a_gateway_for_the_vpc_and_an_interface_for_home(recorded: Record):
    run = recorded("foundation-prod")
    gateway = run.one("aws:ec2/vpcEndpoint:VpcEndpoint", "aws-s3-gateway").inputs
    interface = run.one("aws:ec2/vpcEndpoint:VpcEndpoint", "aws-s3").inputs
    assert (gateway["vpcEndpointType"], interface["vpcEndpointType"]) == ("Gateway", "Interface")
    group = run.one(rules.SECURITY_GROUP, "aws-s3-endpoint").inputs
    assert [i["cidrBlocks"] for i in group["ingress"]] == [["10.10.0.0/16"]]
    (site,) = (s for s in run.outputs["sites"] if s["name"] == "aws")
    assert site["s3_endpoint_url"].startswith("https://bucket.vpce-")


def test_flow_logs_wait_for_the_bucket_that_lets_them_in(recorded: Record):
    run = recorded("foundation-prod")
    (log,) = run.of("aws:ec2/flowLog:FlowLog")
    assert log.inputs["logDestination"] == "arn:aws:s3:::rankbridge-prod-111122223333-logs/vpc/"
    assert run.one("aws:s3/bucketPolicy:BucketPolicy", "logs").urn in log.dependencies


def test_the_kubelet_is_open_to_home_only(recorded: Record):
    ingress = recorded("foundation-prod").one(rules.SECURITY_GROUP, "aws-nodes").inputs["ingress"]
    assert [i["cidrBlocks"] for i in ingress if i["fromPort"] == 10250] == [["10.10.0.0/16"]]
    assert {i["protocol"] for i in ingress} == {"tcp", "udp"}


# Nodes


def user_data(run: Recording, template: str) -> dict[str, Any]:
    text = base64.b64decode(run.one(rules.TEMPLATE, template).inputs["userData"]).decode()
    assert text.startswith("#cloud-config\n")
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def test_the_base_group_has_a_warm_pool_and_the_burst_group_mixes_spot(recorded: Record):
    run = recorded("foundation-prod")
    base, burst = (run.one(rules.GROUP, f"aws-gpu-{n}").inputs for n in ("base", "burst"))
    assert base["warmPool"] == {"poolState": "Stopped", "minSize": 2, "maxGroupPreparedCapacity": 6}
    assert "mixedInstancesPolicy" not in base
    assert "warmPool" not in burst
    policy = burst["mixedInstancesPolicy"]
    assert policy["instancesDistribution"]["onDemandBaseCapacity"] == 1
    assert policy["instancesDistribution"]["onDemandPercentageAboveBaseCapacity"] == 20
    assert [o["instanceType"] for o in policy["launchTemplate"]["overrides"]] == [
        "g6.xlarge",
        "g5.xlarge",
        "g4dn.xlarge",
    ]
    assert burst["minSize"] == 0


def test_capacity_belongs_to_the_autoscaler_and_is_never_waited_for(recorded: Record):
    for group in recorded("foundation-prod").of(rules.GROUP):
        assert group.ignored == ("desiredCapacity",)
        assert group.inputs["waitForCapacityTimeout"] == "0"


def test_the_autoscaler_knows_a_group_while_it_is_empty(recorded: Record):
    tags = {t["key"]: t["value"] for t in recorded("foundation-prod").one(rules.GROUP, "aws-gpu-burst").inputs["tags"]}
    prefix = "k8s.io/cluster-autoscaler/node-template"
    assert tags[f"{prefix}/resources/nvidia.com/gpu"] == "1"
    assert tags[f"{prefix}/taint/nvidia.com/gpu"] == "present:NoSchedule"
    assert tags[f"{prefix}/label/rankbridge.io/site"] == "aws"


def test_the_image_is_found_through_its_ssm_parameter(recorded: Record):
    image = recorded("foundation-prod").one(rules.TEMPLATE, "aws-gpu-base").inputs["imageId"]
    assert image.startswith("resolve:ssm:/aws/service/deeplearning/ami/")


def test_a_refresh_promises_a_rollback_only_where_aws_can_roll_back(recorded: Record):
    promised = {
        stack: [g.inputs["instanceRefresh"]["preferences"]["autoRollback"] for g in recorded(stack).of(rules.GROUP)]
        for stack in ("foundation-prod", "foundation-local")
    }
    # An image by SSM parameter in prod, by id in local.
    assert promised == {"foundation-prod": [False, False], "foundation-local": [True]}


@pytest.mark.parametrize(("system", "device"), [("al2023", "/dev/xvda"), ("ubuntu-22.04", "/dev/sda1")])
def test_the_encrypted_volume_is_the_images_root(filled: Fill, system: str, device: str):
    def edit(values: dict[str, Any]) -> None:
        for group in values["node_groups"]:
            group["image_parameter"] = (
                f"/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-{system}/latest"
            )

    templates = recording.record("foundation-prod", *filled("foundation-prod", edit), preview=True).of(rules.TEMPLATE)
    assert templates
    for template in templates:
        (mapping,) = template.inputs["blockDeviceMappings"]
        assert mapping["deviceName"] == device
        assert mapping["ebs"]["encrypted"] == "true"


NAMED = {
    "aws:cloudwatch/eventRule:EventRule": ("events", "RuleName"),
    "aws:cloudwatch/metricAlarm:MetricAlarm": ("cloudwatch", "AlarmName"),
    "aws:autoscaling/group:Group": ("autoscaling", "XmlStringMaxLen255"),
    "aws:ec2/launchTemplate:LaunchTemplate": ("ec2", "LaunchTemplateName"),
    "aws:ecr/repository:Repository": ("ecr", "RepositoryName"),
    "aws:iam/instanceProfile:InstanceProfile": ("iam", "instanceProfileNameType"),
    "aws:iam/role:Role": ("iam", "roleNameType"),
    "aws:kms/alias:Alias": ("kms", "AliasNameType"),
    "aws:rolesanywhere/profile:Profile": ("rolesanywhere", "ResourceName"),
    "aws:secretsmanager/secret:Secret": ("secretsmanager", "NameType"),
}
LENGTHS = {"aws:s3/bucket:Bucket": 63, "aws:sqs/queue:Queue": 80}
"""What AWS's own models leave out."""


def test_the_longest_names_that_a_stack_may_have_are_not_too_long_for_aws(filled: Fill):
    longest = "a" * 20

    def edit(values: dict[str, Any]) -> None:
        (cloud,) = [s for s in values["sites"] if s["kind"] == "cloud"]
        cloud["name"] = longest
        values["vpn"]["inside"] = {f"onprem-{longest}": next(iter(values["vpn"]["inside"].values()))}
        for number, group in enumerate(values["node_groups"]):
            group |= {"site": longest, "name": f"{number:a>20}"}

    values, _ = filled("foundation-prod", edit)
    values |= {f"rankbridge:psk-onprem-{longest}-{n}": f"x{n}" * 16 for n in (1, 2)}
    secrets = frozenset(k for k in values if k.partition(":")[2].startswith(("psk-", "k3s-", "ssh-")))
    run = recording.record(f"foundation-{longest}", values, secrets, preview=True)
    session = Session()
    limits = {t: session.get_service_model(s).shape_for(n).metadata["max"] for t, (s, n) in NAMED.items()} | LENGTHS
    seen = 0
    for resource in run.resources:
        if resource.type in limits:
            name = resource.inputs["bucket" if resource.type.startswith("aws:s3/") else "name"]
            assert len(name) <= limits[resource.type], (resource.type, name)
            seen += 1
    assert {r.type for r in run.resources} >= set(limits)
    assert seen > 40


def test_user_data_holds_no_token_and_says_where_it_is(recorded: Record, filled: Fill):
    values, secrets = filled("foundation-prod")
    files = {f["path"]: f["content"] for f in user_data(recorded("foundation-prod"), "aws-gpu-base")["write_files"]}
    assert "RB_TOKEN_SECRET=rankbridge-prod/aws/k3s-agent-token\n" in files["/etc/rankbridge/join.env"]
    assert not [k for k in secrets if values[k] in str(files)]


def test_only_the_nodes_own_role_reads_the_token_and_only_this_one(recorded: Record):
    run = recorded("foundation-prod")
    readers = {}
    for policy in run.of("aws:iam/rolePolicy:RolePolicy"):
        for statement in json.loads(policy.inputs["policy"])["Statement"]:
            if "secretsmanager:GetSecretValue" in statement["Action"]:
                readers[policy.name] = statement["Resource"]
    arn = "arn:aws:secretsmanager:eu-central-1:111122223333:secret:rankbridge-prod/aws/k3s-agent-token-??????"
    assert readers == {"nodes-aws": [arn]}


def test_spot_rebalance_and_termination_notices_reach_one_queue(recorded: Record):
    run = recorded("foundation-prod")
    patterns = [json.loads(r.inputs["eventPattern"]) for r in run.of("aws:cloudwatch/eventRule:EventRule")]
    assert {p["detail-type"][0] for p in patterns} == {
        "EC2 Spot Instance Interruption Warning",
        "EC2 Instance Rebalance Recommendation",
        "EC2 Instance-terminate Lifecycle Action",
    }
    targets = {t.inputs["arn"] for t in run.of("aws:cloudwatch/eventTarget:EventTarget")}
    assert targets == {"arn:aws:sqs:eu-central-1:111122223333:rankbridge-prod-aws-notices"}


# VPN


def test_both_tunnels_are_alike_but_for_range_and_key(recorded: Record, filled: Fill):
    values, _ = filled("foundation-prod")
    connection = recorded("foundation-prod").one(rules.CONNECTION, "onprem-aws")
    one, two = (
        {k.removeprefix(f"tunnel{n}"): connection.plain(k) for k in connection.inputs if k.startswith(f"tunnel{n}")}
        for n in (1, 2)
    )
    differing = {k for k in one if one[k] != two[k]}
    assert differing == {"InsideCidr", "PresharedKey"}
    assert one["PresharedKey"] == values["rankbridge:psk-onprem-aws-1"]
    assert isinstance(connection.inputs["tunnel1PresharedKey"], Secret)
    assert one["Phase1DhGroupNumbers"] == [20]
    assert one["IkeVersions"] == ["ikev2"]


def test_route_tables_learn_the_private_ranges_by_propagation(recorded: Record):
    assert len(recorded("foundation-prod").of("aws:ec2/vpnGatewayRoutePropagation:VpnGatewayRoutePropagation")) == 3


def test_routes_are_written_where_propagation_is_not_implemented(recorded: Record):
    run = recorded("foundation-local")
    assert not run.of("aws:ec2/vpnGatewayRoutePropagation:VpnGatewayRoutePropagation")
    static = [r for r in run.of(ROUTE) if r.inputs["destinationCidrBlock"] == "10.210.0.0/16"]
    assert {r.inputs["gatewayId"] for r in static} == {"aws-vpn-id"}
    assert len(static) == 2


def test_each_tunnel_has_an_alarm_that_rings_when_it_is_silent(recorded: Record):
    alarms = recorded("foundation-prod").of("aws:cloudwatch/metricAlarm:MetricAlarm")
    assert len({a.inputs["dimensions"]["TunnelIpAddress"] for a in alarms}) == 2
    assert {a.inputs["treatMissingData"] for a in alarms} == {"breaching"}


def test_the_routers_files_leave_as_one_secret(recorded: Record, filled: Fill):
    values, _ = filled("foundation-prod")
    run = recorded("foundation-prod")
    files = json.loads(run.outputs["vpn_files"])
    assert set(files) == {"onprem"}
    assert values["rankbridge:psk-onprem-aws-2"] in files["onprem"]["etc/swanctl/conf.d/rankbridge.conf"]
    assert "vpn_files" in run.secret_outputs


def test_a_connection_that_aws_made_otherwise_stops_the_program(filled: Fill, monkeypatch: pytest.MonkeyPatch):
    honest = recording._configuration

    def dishonest(*args: Any) -> str:  # noqa: ANN401 -- passed on
        return honest(*args).replace("<asn>64620</asn>", "<asn>64999</asn>")

    monkeypatch.setattr(recording, "_configuration", dishonest)
    with pytest.raises(FaultsError, match=r"AWS's ASN = 64999: must be 64620"):
        recording.record("foundation-prod", *filled("foundation-prod"))


def test_with_a_transit_gateway_routes_point_to_it(filled: Fill):
    def edit(decoded: dict[str, Any]) -> None:
        decoded["vpn"]["attach"] = "transit-gateway"

    run = recording.record("foundation-prod", *filled("foundation-prod", edit))
    assert run.one(rules.CONNECTION, "onprem-aws").inputs["transitGatewayId"] == "aws-vpn-id"
    assert {r.inputs["transitGatewayId"] for r in run.of(ROUTE)} == {"aws-vpn-id"}
    assert evaluate(rules.RULES, run.rules_view()) == []


def second_region(decoded: dict[str, Any]) -> None:
    """A second region and an edge site: an entry each, and their tunnels."""
    decoded["sites"] += [
        {"name": "aws2", "kind": "cloud", "region": "eu-west-1", "zones": ["eu-west-1a", "eu-west-1b"],
         "cidr": "10.30.0.0/16", "asn": 64630},
        {"name": "shop", "kind": "edge", "cidr": "10.50.0.0/24", "asn": 4_200_000_001, "router": "203.0.113.9"},
    ]  # fmt: skip
    decoded["vpn"]["inside"] |= {
        name: [f"169.254.{n}.0/30", f"169.254.{n}.4/30"]
        for n, name in enumerate(("onprem-aws2", "shop-aws", "shop-aws2"), start=20)
    }


def test_a_second_region_and_an_edge_site_are_an_entry_each(filled: Fill):
    run = recording.record("foundation-prod", *filled("foundation-prod", second_region))
    assert {r.name for r in run.of(rules.CONNECTION)} == {"onprem-aws", "shop-aws", "onprem-aws2", "shop-aws2"}
    assert len(run.of("aws:ec2/vpc:Vpc")) == 2
    vpcs = {r.name: r.provider for r in run.of("aws:ec2/vpc:Vpc")}
    assert "aws-eu-west-1" in vpcs["aws2-vpc"]
    shop = run.one("aws:ec2/customerGateway:CustomerGateway", "shop-aws-router").inputs
    assert (shop.get("bgpAsn"), shop["bgpAsnExtended"]) == (None, "4200000001")
    assert set(json.loads(run.outputs["vpn_files"])) == {"onprem", "shop"}
    assert evaluate(rules.RULES, run.rules_view()) == []


# On-prem


def test_servers_join_one_after_the_other_and_agents_after_all_of_them(recorded: Record):
    run = recorded("foundation-prod")
    commands = {r.name: r for r in run.of("command:remote:Command")}
    order = ["home-server-1", "home-server-2", "home-server-3"]
    for earlier, later in itertools.pairwise(order):
        assert commands[earlier].urn in commands[later].dependencies
    assert {commands[n].urn for n in order} <= set(commands["home-worker-1"].dependencies)


def test_the_first_server_founds_the_cluster_and_the_others_join_it(recorded: Record):
    run = recorded("foundation-prod")
    written = {}
    for command in run.of("command:remote:Command"):
        for line in (command.plain("stdin") or "").splitlines():
            if line.startswith("put /etc/rancher/k3s/config.yaml "):
                written[command.name] = yaml.safe_load(base64.b64decode(line.split()[-1]))
    assert written["home-server-1"]["cluster-init"] is True
    assert written["home-server-2"]["server"] == written["home-server-3"]["server"] == "https://10.10.0.11:6443"
    assert written["home-worker-1"]["server"] == "https://10.10.0.10:6443"


def test_agents_never_get_the_server_token(recorded: Record, filled: Fill):
    values, _ = filled("foundation-prod")
    token = base64.b64encode(values["rankbridge:k3s-server-token"].encode()).decode()
    run = recorded("foundation-prod")
    assert token in run.one("command:remote:Command", "home-server-1").plain("stdin")
    assert token not in run.one("command:remote:Command", "home-worker-1").plain("stdin")


def test_what_a_host_printed_is_neither_logged_nor_sent_back_to_it(recorded: Record):
    commands = recorded("foundation-prod").of("command:remote:Command")
    assert commands
    assert {(c.inputs["logging"], c.inputs["addPreviousOutputInEnv"]) for c in commands} == {("none", False)}


def test_without_hosts_nothing_is_installed_and_there_is_no_kubeconfig(recorded: Record):
    run = recorded("foundation-local")
    assert not run.of("command:remote:Command")
    assert run.outputs["kubeconfig"] is None


def test_the_kubeconfig_is_secret_and_names_the_clusters_address(recorded: Record):
    run = recorded("foundation-prod")
    assert "kubeconfig" in run.secret_outputs
    assert yaml.safe_load(run.outputs["kubeconfig"])["clusters"][0]["cluster"]["server"] == "https://10.10.0.10:6443"


# Storage and identity


def test_each_class_of_data_has_a_bucket_with_a_key_of_its_own(recorded: Record):
    run = recorded("foundation-prod")
    kind = "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration"
    keys = {}
    for data in DataClass:
        (rule,) = run.one(kind, data.value).inputs["rules"]
        keys[data] = rule["applyServerSideEncryptionByDefault"]["kmsMasterKeyId"]
    assert len(set(keys.values())) == len(DataClass)


def test_published_models_are_locked_in_governance_mode_with_an_end(recorded: Record):
    run = recorded("foundation-prod")
    locks = {r.name: r.inputs for r in run.of("aws:s3/bucketObjectLockConfiguration:BucketObjectLockConfiguration")}
    assert set(locks) == {"models", "models-replica"}
    assert locks["models"]["rule"]["defaultRetention"] == {"mode": "GOVERNANCE", "days": 90}


def test_models_and_snapshots_are_copied_to_the_other_region(recorded: Record):
    run = recorded("foundation-prod")
    copies = run.of("aws:s3/bucketReplicationConfig:BucketReplicationConfig")
    assert {c.name for c in copies} == {"models", "snapshots"}
    assert "aws-eu-west-1" in run.one(rules.BUCKET, "models-replica").provider
    assert "aws-eu-central-1" in run.one(rules.BUCKET, "models").provider


def test_buckets_are_emptied_by_destroy_only_where_they_are_throw_away(recorded: Record):
    for stack, empties in (("foundation-local", True), ("foundation-dev", False), ("foundation-prod", False)):
        assert {r.inputs["forceDestroy"] for r in recorded(stack).of(rules.BUCKET)} == {empties}


def test_every_workload_role_is_bound_to_its_certificates_name(recorded: Record):
    run = recorded("foundation-prod")
    for role in Role:
        (statement,) = json.loads(run.one("aws:iam/role:Role", role.value).inputs["assumeRolePolicy"])["Statement"]
        assert statement["Condition"]["StringEquals"] == {"aws:PrincipalTag/x509Subject/CN": role.value}
        assert ":home-ca" in statement["Condition"]["ArnEquals"]["aws:SourceArn"].replace("rankbridge-prod-", "")


def test_one_role_writes_models_another_removes_them_and_only_home_touches_its_replicas(recorded: Record):
    run = recorded("foundation-prod")
    models, replicas = (
        "arn:aws:s3:::rankbridge-prod-111122223333-models/",
        ("arn:aws:s3:::rankbridge-prod-111122223333-data/replica/"),
    )
    may: dict[tuple[str, str], set[str]] = {}
    for policy in run.of("aws:iam/rolePolicy:RolePolicy"):
        for statement in json.loads(policy.inputs["policy"])["Statement"]:
            for action in statement["Action"]:
                for place in (models, replicas):
                    if any(resource.startswith(place) for resource in statement["Resource"]):
                        may.setdefault((place, action), set()).add(policy.name)
    assert may[models, "s3:PutObject"] == {"publisher"}
    assert may[models, "s3:DeleteObject"] == may[models, "s3:DeleteObjectVersion"] == {"cleaner"}
    assert may[replicas, "s3:PutObject"] == may[replicas, "s3:DeleteObject"] == {"replicator"}
    assert not [action for _, action in may if action == "s3:BypassGovernanceRetention"]


# Outputs


@pytest.mark.parametrize("stack", STACKS)
def test_what_is_exported_is_what_is_read(recorded: Record, filled: Fill, stack: str):
    run = recorded(stack)
    read = outputs.read(run.outputs)
    assert set(read.roles) == {r.value for r in Role}
    assert set(read.buckets) == {d.value for d in DataClass}
    aws = read.site("aws")
    assert aws.queue_url
    assert aws.s3_endpoint_url
    assert aws.agent_token_secret_arn
    assert [g.gpus for g in aws.node_groups] == [1] * len(aws.node_groups)
    assert read.pod_mtu == config.read(stack, *filled(stack)).network.mtu - 50


def test_outputs_survive_an_engine_that_makes_floats_of_numbers(recorded: Record):
    run = recorded("foundation-prod")
    floats = json.loads(json.dumps(run.outputs), parse_int=float)
    assert outputs.read(floats) == outputs.read(run.outputs)


def test_another_schema_is_refused(recorded: Record):
    values = {**recorded("foundation-prod").outputs, "schema_version": 2}
    with pytest.raises(ValueError, match="schema 2"):
        outputs.read(values)


def test_a_missing_output_is_named(recorded: Record):
    values = {k: v for k, v in recorded("foundation-prod").outputs.items() if k != "roles"}
    with pytest.raises(ValueError, match=r"does not export roles: run pulumi up"):
        outputs.read(values)


# Refusals


def test_a_bad_stack_declares_nothing(filled: Fill, monkeypatch: pytest.MonkeyPatch):
    values, secrets = filled("foundation-prod")
    seen: list[str] = []
    register = recording._Monitor.RegisterResource

    def watch(self: Any, request: Any) -> Any:  # noqa: ANN401 -- passed on
        seen.append(request.type)
        return register(self, request)

    monkeypatch.setattr(recording._Monitor, "RegisterResource", watch)
    with pytest.raises(FaultsError, match="spot_percent"):
        recording.record("foundation-prod", values | {"rankbridge:node_groups": '[{"spot_percent": 400}]'}, secrets)
    assert set(seen) <= {"pulumi:pulumi:Stack"}


def test_a_stack_of_no_layer_is_refused(filled: Fill):
    with pytest.raises(ValueError, match="must be named foundation-<environment>"):
        recording.record("prod", *filled("foundation-prod"))


def test_an_assertion_inside_apply_cannot_be_skipped(filled: Fill, monkeypatch: pytest.MonkeyPatch):
    counted = Counted()
    export = pulumi.export

    def watch(name: str, value: Any) -> None:  # noqa: ANN401 -- passed on
        if name == "alarm_topic_arn":
            value = counted.on(value, _is_arn)
        export(name, value)

    monkeypatch.setattr(pulumi, "export", watch)
    recording.record("foundation-prod", *filled("foundation-prod"))
    assert counted.runs == 1
    recording.record("foundation-prod", *filled("foundation-prod"), preview=True)
    assert counted.runs == 1, "in a preview the value is unknown, and the count shows it"


def _is_arn(value: str) -> None:
    assert value.startswith("arn:aws:sns:")
