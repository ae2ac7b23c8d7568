"""LocalStack takes the very documents that the program renders, and what it gives back is what we can read.

What LocalStack does otherwise than AWS is asserted, too: a row of the fidelity ledger that stops being true fails here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.config import Config
from botocore.exceptions import ClientError

from infra import config, stackfile
from infra.emulator import ROOT, STACK, Emulator, EmulatorError, project, throw_away_secrets
from infra.emulator.__main__ import main as emulator_command
from infra.plan import FaultsError
from infra.recording import Recording
from infra.rules import foundation as rules
from infra.vpn import render

pytestmark = pytest.mark.real_parts
Record = Callable[..., Recording]
Client = Callable[[str], Any]


@pytest.fixture(scope="module")
def client(emulator: Emulator) -> Client:
    def make(service: str) -> Any:  # noqa: ANN401 -- boto3 makes its clients at run time
        return boto3.client(
            service,
            endpoint_url=emulator.endpoint,
            region_name="eu-central-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",  # noqa: S106 -- the emulator takes anything
            config=Config(retries={"max_attempts": 1}),
        )

    return make


@pytest.fixture(scope="module")
def vpc(client: Client) -> str:
    return str(client("ec2").create_vpc(CidrBlock="10.220.0.0/16")["Vpc"]["VpcId"])


@pytest.fixture
def local(recorded: Record) -> Recording:
    return recorded(STACK)


# VPN


@pytest.fixture(scope="module")
def connection(client: Client, vpc: str) -> dict[str, Any]:
    ec2 = client("ec2")
    values = stackfile.values(STACK) | throw_away_secrets()
    settings = config.read(STACK, values, frozenset(throw_away_secrets()))
    (link,) = settings.links
    router = ec2.create_customer_gateway(BgpAsn=link.private.asn, IpAddress=str(link.private.router), Type="ipsec.1")
    gateway = ec2.create_vpn_gateway(Type="ipsec.1", AmazonSideAsn=link.cloud.asn)["VpnGateway"]["VpnGatewayId"]
    ec2.attach_vpn_gateway(VpnGatewayId=gateway, VpcId=vpc)
    options = {
        "TunnelOptions": [
            {"TunnelInsideCidr": str(t.inside), "PreSharedKey": values[f"rankbridge:{t.psk_key}"]} for t in link.tunnels
        ]
    }
    made: dict[str, Any] = ec2.create_vpn_connection(
        CustomerGatewayId=router["CustomerGateway"]["CustomerGatewayId"],
        VpnGatewayId=gateway,
        Type="ipsec.1",
        Options=options,
    )["VpnConnection"]
    return made


def test_the_renderer_reads_localstacks_vpn_xml(connection: dict[str, Any]):
    tunnels = render.parse_configuration(connection["CustomerGatewayConfiguration"])
    assert len(tunnels) == 2
    # Made up, both the same, as the ledger says.
    assert len({t.aws_outside for t in tunnels}) == 1


def test_localstack_ignores_tunnel_options_so_its_xml_is_not_verified(connection: dict[str, Any], local: Recording):
    settings = config.read(STACK, *_filled())
    assert settings.vpn.verify_xml is False
    (link,) = settings.links
    tunnels = render.parse_configuration(connection["CustomerGatewayConfiguration"])
    psks = [throw_away_secrets()[f"rankbridge:{k}"] for k in link.psk_keys]
    endpoints = render.endpoints_of(link, [str(t.aws_outside) for t in tunnels], psks)
    with pytest.raises(FaultsError, match="AWS's inside address"):
        render.verify(endpoints, connection["CustomerGatewayConfiguration"])
    files = render.files(link.private, endpoints, settings.vpn.transport, reachable=[link.cloud.cidr])
    assert set(files) == set(json.loads(local.outputs["vpn_files"])["onprem"])


def _filled() -> tuple[dict[str, str], frozenset[str]]:
    secrets = throw_away_secrets()
    return stackfile.values(STACK) | secrets, frozenset(secrets)


def test_localstack_lacks_route_propagation_so_routes_are_static(client: Client, connection: dict[str, Any], vpc: str):
    table = client("ec2").create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
    gateway = connection["VpnGatewayId"]
    with pytest.raises(ClientError) as refused:
        client("ec2").enable_vgw_route_propagation(GatewayId=gateway, RouteTableId=table)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 501
    client("ec2").create_route(RouteTableId=table, DestinationCidrBlock="10.210.0.0/16", GatewayId=gateway)


# Nodes


def test_the_template_starts_instances_with_the_rendered_user_data(client: Client, vpc: str, local: Recording):
    ec2, scaling = client("ec2"), client("autoscaling")
    inputs = local.one(rules.TEMPLATE, "aws-gpu").inputs
    group = local.one(rules.GROUP, "aws-gpu").inputs
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=s.inputs["cidrBlock"], AvailabilityZone=s.inputs["availabilityZone"])
        for s in local.of(rules.SUBNET)
        if "private" in s.name
    ]
    ec2.create_launch_template(
        LaunchTemplateName=inputs["name"],
        LaunchTemplateData={
            "ImageId": inputs["imageId"],
            "InstanceType": inputs["instanceType"],
            "UserData": inputs["userData"],
            "MetadataOptions": {
                "HttpTokens": inputs["metadataOptions"]["httpTokens"],
                "HttpPutResponseHopLimit": inputs["metadataOptions"]["httpPutResponseHopLimit"],
            },
        },
    )
    policy = group["mixedInstancesPolicy"]
    distribution = policy["instancesDistribution"]
    scaling.create_auto_scaling_group(
        AutoScalingGroupName=group["name"],
        MinSize=group["minSize"],
        MaxSize=group["maxSize"],
        DesiredCapacity=3,  # the emulator rounds the shares of an uneven number down
        VPCZoneIdentifier=",".join(s["Subnet"]["SubnetId"] for s in subnets),
        MixedInstancesPolicy={
            "LaunchTemplate": {
                "LaunchTemplateSpecification": {"LaunchTemplateName": inputs["name"], "Version": "1"},
                "Overrides": [{"InstanceType": o["instanceType"]} for o in policy["launchTemplate"]["overrides"]],
            },
            "InstancesDistribution": {
                "OnDemandBaseCapacity": distribution["onDemandBaseCapacity"],
                "OnDemandPercentageAboveBaseCapacity": distribution["onDemandPercentageAboveBaseCapacity"],
                "SpotAllocationStrategy": distribution["spotAllocationStrategy"],
            },
        },
        LifecycleHookSpecificationList=[
            {
                "LifecycleHookName": h["name"],
                "LifecycleTransition": h["lifecycleTransition"],
                "HeartbeatTimeout": h["heartbeatTimeout"],
                "DefaultResult": h["defaultResult"],
            }
            for h in group["initialLifecycleHooks"]
        ],
        Tags=[{"Key": t["key"], "Value": t["value"], "PropagateAtLaunch": True} for t in group["tags"]],
    )
    (made,) = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[group["name"]])["AutoScalingGroups"]
    instances = [i["InstanceId"] for i in made["Instances"]]
    assert len(instances) == 3
    assert {i["AvailabilityZone"] for i in made["Instances"]} <= {"eu-central-1a", "eu-central-1b"}
    described = ec2.describe_instances(InstanceIds=instances)["Reservations"]
    tags = {t["Key"] for r in described for i in r["Instances"] for t in i["Tags"]}
    assert set(rules.REQUIRED_TAGS) <= tags
    data = ec2.describe_instance_attribute(InstanceId=instances[0], Attribute="userData")["UserData"]["Value"]
    assert data == inputs["userData"]
    document = yaml.safe_load(base64.b64decode(data))
    assert any(f["path"] == "/usr/local/sbin/rankbridge-join" for f in document["write_files"])


def test_the_join_token_is_read_back_by_its_name(client: Client, local: Recording):
    secrets = client("secretsmanager")
    secret = local.one("aws:secretsmanager/secret:Secret", "aws-agent-token").inputs
    version = local.one("aws:secretsmanager/secretVersion:SecretVersion", "aws-agent-token")
    secrets.create_secret(Name=secret["name"], SecretString=version.plain("secretString"))
    assert secrets.get_secret_value(SecretId=secret["name"])["SecretString"] == throw_away_secrets()[
        "rankbridge:k3s-agent-token"
    ]  # fmt: skip


def test_each_notice_matches_the_pattern_of_its_rule_only(client: Client, local: Recording):
    events = client("events")
    patterns = {r.name: r.inputs["eventPattern"] for r in local.of("aws:cloudwatch/eventRule:EventRule")}
    group = local.one(rules.GROUP, "aws-gpu").inputs["name"]
    for name, source, kind, detail in (
        ("aws-spot-notice", "aws.ec2", "EC2 Spot Instance Interruption Warning", {"instance-id": "i-1"}),
        ("aws-rebalance", "aws.ec2", "EC2 Instance Rebalance Recommendation", {"instance-id": "i-1"}),
        (
            "aws-terminating",
            "aws.autoscaling",
            "EC2 Instance-terminate Lifecycle Action",
            {"AutoScalingGroupName": group},
        ),
    ):
        common = {"id": "1", "account": "000000000000", "time": "2026-01-01T00:00:00Z", "region": "eu-central-1"}
        event = {**common, "resources": [], "source": source, "detail-type": kind, "detail": detail}
        matching = {
            n
            for n, p in patterns.items()
            if events.test_event_pattern(EventPattern=p, Event=json.dumps(event))["Result"]
        }
        assert matching == {name}


# Storage and identity


def test_every_policy_document_is_accepted(client: Client, local: Recording):
    iam, accepted = client("iam"), 0
    for role in local.of("aws:iam/role:Role"):
        iam.create_role(RoleName=role.inputs["name"], AssumeRolePolicyDocument=role.inputs["assumeRolePolicy"])
    for policy in local.of("aws:iam/rolePolicy:RolePolicy"):
        role_name = local.one("aws:iam/role:Role", policy.name).inputs["name"]
        iam.put_role_policy(RoleName=role_name, PolicyName=policy.name, PolicyDocument=policy.inputs["policy"])
        accepted += 1
    assert accepted == 11
    with pytest.raises(ClientError):
        iam.put_role_policy(RoleName=role_name, PolicyName="x", PolicyDocument='{"Statement": [{"Effect": "Maybe"}]}')


def test_keys_take_their_policies_and_work_under_their_aliases(client: Client, local: Recording):
    kms = client("kms")
    for key in local.of("aws:kms/key:Key"):
        made = kms.create_key(Policy=key.inputs["policy"])["KeyMetadata"]["KeyId"]
        alias = local.one("aws:kms/alias:Alias", key.name).inputs["name"]
        kms.create_alias(AliasName=alias, TargetKeyId=made)
        hidden = kms.encrypt(KeyId=alias, Plaintext=b"x")["CiphertextBlob"]
        assert kms.decrypt(CiphertextBlob=hidden)["Plaintext"] == b"x"


@pytest.fixture(scope="module")
def models(client: Client) -> str:
    name = "rankbridge-local-000000000000-models"
    client("s3").create_bucket(
        Bucket=name,
        ObjectLockEnabledForBucket=True,
        CreateBucketConfiguration={"LocationConstraint": "eu-central-1"},
    )
    return name


def test_a_bucket_takes_policy_lifecycle_and_lock(client: Client, models: str, local: Recording):
    s3 = client("s3")
    policy = local.one("aws:s3/bucketPolicy:BucketPolicy", "models").inputs["policy"]
    s3.put_bucket_policy(Bucket=models, Policy=policy)
    assert json.loads(s3.get_bucket_policy(Bucket=models)["Policy"]) == json.loads(policy)
    kind = "aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration"
    aborting = local.one(kind, "models").inputs["rules"][0]
    s3.put_bucket_lifecycle_configuration(
        Bucket=models,
        LifecycleConfiguration={
            "Rules": [
                {
                    "ID": aborting["id"],
                    "Status": aborting["status"],
                    "Filter": {"Prefix": ""},
                    "AbortIncompleteMultipartUpload": {
                        "DaysAfterInitiation": aborting["abortIncompleteMultipartUpload"]["daysAfterInitiation"]
                    },
                }
            ]
        },
    )
    lock = local.one("aws:s3/bucketObjectLockConfiguration:BucketObjectLockConfiguration", "models").inputs["rule"]
    retention = lock["defaultRetention"]
    s3.put_object_lock_configuration(
        Bucket=models,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": retention["mode"], "Days": retention["days"]}},
        },
    )
    version = s3.put_object(Bucket=models, Key="bundles/locked", Body=b"x")["VersionId"]
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.delete_object(Bucket=models, Key="bundles/locked", VersionId=version)


def test_conditional_writes_are_enforced(client: Client, models: str):
    s3 = client("s3")
    first = s3.put_object(Bucket=models, Key="channels/stable.json", Body=b"1", IfNoneMatch="*")["ETag"]
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.put_object(Bucket=models, Key="channels/stable.json", Body=b"2", IfNoneMatch="*")
    s3.put_object(Bucket=models, Key="channels/stable.json", Body=b"2", IfMatch=first)
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.put_object(Bucket=models, Key="channels/stable.json", Body=b"3", IfMatch=first)


def test_a_repository_refuses_to_move_a_tag(client: Client, local: Recording):
    inputs = local.one("aws:ecr/repository:Repository", "aws-gateway").inputs
    made = client("ecr").create_repository(
        repositoryName=inputs["name"],
        imageTagMutability=inputs["imageTagMutability"],
        encryptionConfiguration={"encryptionType": "KMS"},
    )["repository"]
    assert made["imageTagMutability"] == "IMMUTABLE"


# What the program is told to ignore on an emulator, and only there (FoundationConfig.emulator_forgets).


def test_an_alarms_tags_are_forgotten(client: Client):
    watch = client("cloudwatch")
    watch.put_metric_alarm(
        AlarmName="x",
        Namespace="AWS/VPN",
        MetricName="TunnelState",
        Statistic="Maximum",
        Period=60,
        EvaluationPeriods=3,
        ComparisonOperator="LessThanThreshold",
        Threshold=1,
        Tags=[{"Key": "owner", "Value": "x"}],
    )
    arn = watch.describe_alarms(AlarmNames=["x"])["MetricAlarms"][0]["AlarmArn"]
    assert watch.list_tags_for_resource(ResourceARN=arn)["Tags"] == []


def test_an_endpoints_policy_loses_its_version(client: Client, vpc: str, local: Recording):
    policy = local.one("aws:ec2/vpcEndpoint:VpcEndpoint", "aws-s3-gateway").inputs["policy"]
    made = client("ec2").create_vpc_endpoint(
        VpcId=vpc, ServiceName="com.amazonaws.eu-central-1.s3", VpcEndpointType="Gateway", PolicyDocument=policy
    )["VpcEndpoint"]["VpcEndpointId"]
    (described,) = client("ec2").describe_vpc_endpoints(VpcEndpointIds=[made])["VpcEndpoints"]
    assert "Version" in json.loads(policy)
    assert "Version" not in json.loads(described["PolicyDocument"])


def test_a_templates_own_tags_appear_among_its_instances(client: Client):
    ec2 = client("ec2")
    kinds = [{"ResourceType": k, "Tags": [{"Key": "a", "Value": "b"}]} for k in ("instance", "launch-template")]
    ec2.create_launch_template(
        LaunchTemplateName="tagged", LaunchTemplateData={"TagSpecifications": kinds[:1]}, TagSpecifications=kinds[1:]
    )
    (version,) = ec2.describe_launch_template_versions(LaunchTemplateName="tagged")["LaunchTemplateVersions"]
    assert len(version["LaunchTemplateData"]["TagSpecifications"]) == 2


def test_a_vpn_gateway_is_in_a_zone_called_none_and_a_connection_has_no_options(
    client: Client, connection: dict[str, Any]
):
    ec2 = client("ec2")
    (gateway,) = ec2.describe_vpn_gateways(VpnGatewayIds=[connection["VpnGatewayId"]])["VpnGateways"]
    assert gateway["AvailabilityZone"] == "None"
    (described,) = ec2.describe_vpn_connections(VpnConnectionIds=[connection["VpnConnectionId"]])["VpnConnections"]
    assert not described.get("Options")


def test_hooks_given_with_a_group_are_forgotten(client: Client, local: Recording):
    group = local.one(rules.GROUP, "aws-gpu").inputs["name"]
    assert client("autoscaling").describe_lifecycle_hooks(AutoScalingGroupName=group)["LifecycleHooks"] == []


@pytest.mark.parametrize("stack", ["foundation-dev", "foundation-prod"])
def test_nothing_but_capacity_is_ignored_where_aws_is_real(recorded: Record, stack: str):
    ignored = {r.type: r.ignored for r in recorded(stack).custom() if r.ignored}
    assert ignored == {rules.GROUP: ("desiredCapacity",)}


# The emulator itself


def test_a_reset_forgets_everything(emulator: Emulator, client: Client):
    client("sqs").create_queue(QueueName="gone")
    emulator.reset()
    assert "QueueUrls" not in client("sqs").list_queues()


def test_a_second_start_is_refused_with_the_remedy(emulator: Emulator, tmp_path: Path):
    with pytest.raises(EmulatorError, match="stop it first"):
        Emulator(tmp_path, emulator.port).start()


def test_the_compose_file_runs_the_locked_version():
    compose = yaml.safe_load((ROOT / "infra" / "emulator" / "compose.yaml").read_text())
    version = compose["services"]["localstack"]["image"].rpartition(":")[2]
    assert f"localstack-core[runtime]=={version}\n" in (ROOT / "requirements" / "localstack.in").read_text()


# The copy of the project that the engine works on


def test_the_project_is_copied_with_its_stack_pointed_at_the_emulator(tmp_path: Path):
    directory = tmp_path / "project"
    before = (stackfile.STACKS / f"Pulumi.{STACK}.yaml").read_text()
    copy = project(directory, "http://127.0.0.1:4999", virtualenv=tmp_path / "venv")
    settings = yaml.safe_load((directory / "Pulumi.yaml").read_text())
    assert settings["main"] == "infra"
    assert settings["runtime"]["options"]["virtualenv"] == str(tmp_path / "venv")
    values = stackfile.values(STACK, directory / settings["stackConfigDir"])
    read = config.read(STACK, values | dict(copy.secrets), frozenset(copy.secrets))
    assert read.emulator is not None
    assert read.emulator.endpoint == "http://127.0.0.1:4999"
    assert (directory / "infra" / "__main__.py").exists()
    assert copy.environment["PULUMI_BACKEND_URL"].startswith("file:///")
    assert (stackfile.STACKS / f"Pulumi.{STACK}.yaml").read_text() == before


def test_the_local_stack_differs_from_prod_in_its_stack_file_only():
    assert STACK in {p.name.removeprefix("Pulumi.").removesuffix(".yaml") for p in stackfile.STACKS.iterdir()}
    named = [p for p in (ROOT / "infra").rglob("*.py") if "foundation-local" in p.read_text()]
    program = {"foundation.py", "aws.py", "storage.py", "identity.py", "onprem.py", "component.py", "__main__.py"}
    assert not [p for p in named if p.name in program]


def test_without_the_cli_local_up_says_so_in_one_line(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", "/nonexistent")
    code = emulator_command(["up", "--home", str(emulator.home), "--port", str(emulator.port)])
    assert code == 1
    assert capsys.readouterr().out == (
        f"LocalStack answers at {emulator.endpoint}; for the foundation on it, install the pulumi CLI\n"
    )
